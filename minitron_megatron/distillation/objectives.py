"""The losses of a student: a list of entries, each an objective with its weight and, if it has one, its teacher.

There are two kinds of objectives. A `PredictionObjective` takes the student's predictions, on the last pipeline stage;
all objectives with the same `compute` share a pass over the logits. A `StateObjective` takes hidden states inside of
the student, and enters the backward pass there. A new objective is a class that follows one of the two protocols.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import reduce
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.config.loss import LogitsConfig
from minitron_megatron.distillation.linear_losses import Predictions, linear_distillation_loss
from minitron_megatron.distillation.teachers import Targets, Teacher, Wanted
from minitron_megatron.parallel.schedule import Batch


class Objective(Protocol):
    """Adds one loss to a student's step, on the ranks where its inputs live.

    Attributes:
        name: of its loss in metrics.
        wanted: what it needs from its teacher; empty if it has none.
    """

    name: str
    wanted: Wanted

    def problems(self, vocab: int) -> list[str]:
        """Returns what is wrong with its settings, or impossible with this vocabulary size, one sentence each."""


@runtime_checkable
class PredictionObjective(Objective, Protocol):
    """Takes the student's predictions.

    Attributes:
        compute: computes all of a step's objectives that have this function.
    """

    compute: "ComputeLoss"


@runtime_checkable
class StateObjective(Objective, Protocol):
    """Takes hidden states of the student.

    Attributes:
        pair_names: names of its losses, whose mean is weighted; the same on every rank.
    """

    pair_names: Sequence[str]

    def watch(
        self, batches: Sequence[Batch], targets: Targets, weight: float, training: bool
    ) -> AbstractContextManager[Tensor]:
        """Adds the losses to the backward pass while the student runs over the micro-batches inside the block.

        Args:
            batches: the step's micro-batches.
            targets: the teacher's, for these batches.
            weight: of the mean over all losses.
            training: whether gradients are computed; else the losses are only measured.

        Yields:
            float64 `[2, losses]`: numerators and denominators that no other rank adds, complete when the block ends.
        """


Weight = float | Callable[[int], float]
"""Of a loss per valid token: a number, or a function of the step, from 1."""


class Term(NamedTuple):
    """An objective on predictions in one micro-batch.

    Attributes:
        objective: the loss.
        weight: in this step.
        target: the teacher's predictions.
        step: from 1.
        vocab: tokens that it looks at, from the first one on: those that student and teacher both have.
    """

    objective: PredictionObjective
    weight: float
    target: Any
    step: int
    vocab: int


class Text(NamedTuple):
    """The text of a micro-batch: the next tokens `[tokens]`, and a mask `[tokens]`, 1 for tokens that count."""

    labels: Tensor
    mask: Tensor


ComputeLoss = Callable[[Predictions, Text, Sequence[Term], dist.ProcessGroup, int, int], tuple[Tensor, Tensor]]
"""Computes objectives on predictions. Takes the student's predictions, the text, the objectives, the tensor-parallel
group, the tokens of the tokenizer, and the tokens whose logits may exist at one time. Returns the weighted loss, a sum
over the valid tokens, and float64 `[objectives]`, their own sums without gradient; both the same on every rank of the
group."""


def fused_prediction_loss(
    student: Predictions,
    text: Text,
    terms: Sequence[Term],
    group: dist.ProcessGroup,
    vocab: int,
    chunk_tokens: int,
) -> tuple[Tensor, Tensor]:
    """Computes divergences and cross-entropy; see `ComputeLoss`.

    Cross-entropy and the first divergence over the whole vocabulary share one pass over the student's logits. Every
    further divergence takes a pass of its own.
    """
    configs = {
        number: term.objective.config_at(term.step)
        for number, term in enumerate(terms)
        if isinstance(term.objective, Divergence)
    }
    texts = [number for number in range(len(terms)) if number not in configs]
    lm_weight = sum(terms[number].weight for number in texts)
    sums = torch.zeros(len(terms), dtype=torch.float64, device=student.hidden.device)

    def run_pass(
        lm_weight: float,
        target: Predictions | None = None,
        kd_weight: float = 0.0,
        config: LogitsConfig | None = None,
        vocab: int = vocab,
    ) -> tuple[Tensor, Tensor]:
        return linear_distillation_loss(
            *student, *text, group, vocab, target, kd_weight, lm_weight, chunk_tokens, config
        )

    losses, is_text_left = [], bool(texts)
    for number, config in configs.items():
        term = terms[number]
        shares = is_text_left and term.vocab == vocab
        loss, (sums[number], lm) = run_pass(lm_weight if shares else 0.0, term.target, term.weight, config, term.vocab)
        if shares:
            sums[texts], is_text_left = lm, False
        losses.append(loss)
    if is_text_left:
        loss, (_, lm) = run_pass(lm_weight)
        sums[texts] = lm
        losses.append(loss)
    return reduce(torch.add, losses), sums


class Divergence:
    """Divergence of the student's predictions from its teacher's.

    Args:
        config: which divergence; a function of the step, from 1, if it changes.
    """

    name = "kd_logits"
    wanted = Wanted(predictions=True)
    compute = staticmethod(fused_prediction_loss)

    def __init__(self, config: LogitsConfig | Callable[[int], LogitsConfig] | None = None):
        self.config = config or LogitsConfig()

    def config_at(self, step: int) -> LogitsConfig:
        """Returns the settings at a step."""
        return self.config(step) if callable(self.config) else self.config

    def problems(self, vocab: int) -> list[str]:
        """Returns what is wrong with its settings, or impossible with this vocabulary size."""
        return self.config_at(1).problems() + self.config_at(1).vocab_problems(vocab)


class CrossEntropy:
    """Cross-entropy of the text, in nats per token. Needs no teacher."""

    name = "lm"
    wanted = Wanted()
    compute = staticmethod(fused_prediction_loss)

    def problems(self, vocab: int) -> list[str]:
        """Returns nothing: it has no settings."""
        return []


class BalancedWeight:
    """A weight times alpha, the loss of another entry divided by the own entry's, both of the previous step (Minitron,
    2407.14679, section 3).

    Args:
        weight: factor of alpha; a function of the step, from 1, if it changes.
        against: name of the other entry.

    Attributes:
        alpha: of the next step; None before the first one, which measures both losses in advance.
    """

    def __init__(self, weight: "Weight", against: str):
        self.weight = weight
        self.against = against
        self.alpha: float | None = None

    def __call__(self, step: int) -> float:
        weight = self.weight(step) if callable(self.weight) else self.weight
        return (1.0 if self.alpha is None else self.alpha) * weight

    def update(self, own: float, other: float) -> None:
        """Sets alpha from the losses of a step."""
        self.alpha = other / max(own, 1e-12)


@dataclass
class Entry:
    """One term of the student's loss.

    Attributes:
        teacher: gives the targets; None for an objective on the text.
        objective: the loss.
        weight: of the loss per valid token; a function of the step, from 1, if it changes.
        name: of the loss in metrics; by default the objective's.
        first_step, last_step: between which it counts; None for the end of the run. In other steps nothing is measured.
    """

    teacher: Teacher | None
    objective: Objective
    weight: Weight = 1.0
    name: str = ""
    first_step: int = 1
    last_step: int | None = None

    def __post_init__(self) -> None:
        self.name = self.name or self.objective.name

    def counts_at(self, step: int) -> bool:
        """Returns whether it counts at a step."""
        return self.first_step <= step and (self.last_step is None or step <= self.last_step)

    def weight_at(self, step: int) -> float:
        """Returns the weight at a step."""
        return self.weight(step) if callable(self.weight) else self.weight
