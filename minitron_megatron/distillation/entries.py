"""Makes a step's entries from the `loss.*` settings."""

from minitron_megatron.config.loss import Balance, LossConfig
from minitron_megatron.distillation.hidden import HiddenDistance
from minitron_megatron.distillation.objectives import BalancedWeight, CrossEntropy, Divergence, Entry
from minitron_megatron.distillation.teachers import Teacher
from minitron_megatron.errors import raise_if_any


def text_entry(loss: LossConfig) -> Entry:
    """Makes the entry for the text."""
    return Entry(None, CrossEntropy(), lambda step: loss.at(step).lm_weight)


def divergence_entry(
    loss: LossConfig,
    teacher: Teacher,
    weight: float = 1.0,
    name: str = "",
    first_step: int = 1,
    last_step: int | None = None,
) -> Entry:
    """Makes the entry for the predictions of a teacher.

    Args:
        loss: the divergence and its weight.
        teacher: to learn from.
        weight: factor of `loss.kd_logits_weight`.
        name: of the loss in metrics, behind that of the divergence; empty for no more than that.
        first_step, last_step: see `Entry`.
    """

    def weight_at(step: int) -> float:
        return weight * loss.at(step).kd_logits_weight

    divergence = Divergence(lambda step: loss.at(step).logits)
    full_name = f"{divergence.name}/{name}" if name else divergence.name
    return Entry(teacher, divergence, weight_at, full_name, first_step, last_step)


def loss_entries(loss: LossConfig, teacher: Teacher | None = None, hidden: HiddenDistance | None = None) -> list[Entry]:
    """Makes the entries of a step: `lm`, and for weights above 0 `kd_logits` and `kd_hidden`.

    Cross-entropy is measured even if its weight is 0.

    Args:
        loss: the losses and their weights.
        teacher: the teacher; None for plain training.
        hidden: the distance between hidden states, if `loss.hidden.weight` is above 0.

    Raises:
        ConfigError: a setting is invalid, or needs a teacher or `hidden` that is not given.
    """
    problems = loss.problems()
    if teacher is None:
        problems += [
            f"loss.{name} = {weight}, and there is no teacher: give one, or set it to 0"
            for name, weight in loss.teacher_weights.items()
            if weight
        ]
    largest = loss.largest
    if largest.hidden.weight and teacher is not None and hidden is None:
        problems.append(
            f"loss.hidden.weight = {largest.hidden.weight}, and there is no HiddenDistance: give hidden, or set it to 0"
        )
    raise_if_any(problems)
    entries = [text_entry(loss)]
    if largest.kd_logits_weight and teacher is not None:
        entries.append(divergence_entry(loss, teacher))
    if largest.hidden.weight and hidden is not None:

        def weight(step: int) -> float:
            return loss.at(step).hidden.weight

        is_dynamic = loss.hidden.balance is Balance.DYNAMIC
        entries.append(Entry(teacher, hidden, BalancedWeight(weight, Divergence.name) if is_dynamic else weight))
    return entries
