"""Makes a step's entries from the `loss.*` settings."""

from minitron_megatron.config.loss import Balance, LossConfig
from minitron_megatron.distillation.hidden import HiddenDistance
from minitron_megatron.distillation.objectives import BalancedWeight, CrossEntropy, Divergence, Entry
from minitron_megatron.distillation.teachers import Teacher
from minitron_megatron.errors import raise_if_any


def loss_entries(
    loss: LossConfig, teacher: Teacher | None = None, hidden: HiddenDistance | None = None, steps: int = 1
) -> list[Entry]:
    """Makes the entries of a step: `lm`, and for weights above 0 `kd_logits` and `kd_hidden`.

    Cross-entropy is measured even if its weight is 0.

    Args:
        loss: the losses and their weights.
        teacher: the teacher; None for plain training.
        hidden: the distance between hidden states, if `loss.hidden.weight` is above 0.
        steps: of the whole run, over which the weight of the cross-entropy may change.

    Raises:
        ConfigError: a setting is invalid, or needs a teacher or `hidden` that is not given.
    """
    problems = loss.problems()
    if teacher is None:
        weights = {"kd_logits_weight": loss.kd_logits_weight, "hidden.weight": loss.hidden.weight}
        problems += [
            f"loss.{name} = {weight}, and there is no teacher: give one, or set it to 0"
            for name, weight in weights.items()
            if weight
        ]
    if loss.hidden.weight and teacher is not None and hidden is None:
        problems.append(
            f"loss.hidden.weight = {loss.hidden.weight}, and there is no HiddenDistance: give hidden, or set it to 0"
        )
    raise_if_any(problems)
    entries = [Entry(None, CrossEntropy(), lambda step: loss.at(step, steps).lm_weight)]
    if loss.kd_logits_weight:
        entries.append(Entry(teacher, Divergence(loss.logits), loss.kd_logits_weight))
    if loss.hidden.weight and hidden is not None:
        is_dynamic = loss.hidden.balance is Balance.DYNAMIC
        weight = BalancedWeight(loss.hidden.weight, against=Divergence.name) if is_dynamic else loss.hidden.weight
        entries.append(Entry(teacher, hidden, weight))
    return entries
