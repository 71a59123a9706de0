"""The interface of a teacher: anything that gives targets for the samples of a step.

A step runs its teachers first, one after another, over all of its micro-batches, and then the student, whose objectives
compare it with the teachers' targets. A new way to teach is a class that follows `Teacher`.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from minitron_megatron.distillation.pairs import Tap
from minitron_megatron.distillation.result import StepResult
from minitron_megatron.parallel.schedule import Batch


@dataclass(frozen=True)
class Wanted:
    """What objectives want from a teacher for every micro-batch; the same on every rank.

    Attributes:
        predictions: whether its predictions are wanted, on the last pipeline stage.
        states: hidden states with the pipeline rank that wants each, repeated for every use there.
        vocab: tokens of the student; 0 if they are the teacher's own.
        padded_vocab: rows of the student's output layer over all tensor ranks, as which the teacher's are split; 0 for
            as its own are.
    """

    predictions: bool = False
    states: tuple[tuple[Tap, int], ...] = ()
    vocab: int = 0
    padded_vocab: int = 0

    def __or__(self, other: "Wanted") -> "Wanted":
        vocabularies = max(self.vocab, other.vocab), max(self.padded_vocab, other.padded_vocab)
        return Wanted(self.predictions or other.predictions, self.states + other.states, *vocabularies)


class Targets(Protocol):
    """A teacher's targets for the micro-batches of one step, which are numbered from 0.

    Attributes:
        seconds: that the teacher took on this rank.
        text_loss: its own cross-entropy in nats per token, if it was trained on the text in this step.
    """

    seconds: float
    text_loss: float | None

    def predictions(self, number: int) -> Any:
        """Returns its predictions for a micro-batch, on the last pipeline stage, in the form that the objectives take:
        `Predictions`, if the teacher is a model."""

    def state(self, tap: Tap, number: int) -> Tensor:
        """Returns a hidden state `[seq(/tp), batch, hidden]` for a micro-batch, on a pipeline rank that wants it."""

    def release(self, tap: Tap, number: int) -> None:
        """Releases one use of a state, which may be freed after the last."""


class Teacher(Protocol):
    """Gives targets for the samples of a step. Its methods are collective: every rank calls them.

    Attributes:
        name: what messages call it.
        vocab: tokens that it predicts. Of a student with more or fewer, those that both have are compared.
    """

    name: str
    vocab: int

    def prepare(self, wanted: Wanted) -> None:
        """Sets what every step will want. Called once, before the first step."""

    def problems(self, student: torch.nn.Module) -> list[str]:
        """Returns why it cannot teach a student, one sentence each.

        Args:
            student: a part of the student on this rank, without Megatron's wrappers.
        """

    def teach(self, batches: Sequence[Batch], training: bool) -> AbstractContextManager[Targets]:
        """Yields the targets of a step, which are valid while the block runs.

        Args:
            batches: the step's micro-batches, with the `sample_ids` of their samples if known.
            training: whether the student is trained in this step; a teacher may be trained too.
        """

    def free(self) -> None:
        """Frees what it can load again. Called before each step in which it does not teach."""

    def evaluate(self, batches: Sequence[Batch]) -> StepResult | None:
        """Measures the teacher itself on the text, without gradients; None if it does not predict the text."""
