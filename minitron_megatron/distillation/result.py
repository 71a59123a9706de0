"""The losses that a step measures, over all ranks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass
class EntryResult:
    """The losses of one entry in a step.

    Attributes:
        weight: of its loss.
        numerators, denominators: by name of a loss, two sums over valid tokens whose quotient is the loss. An entry has
            one loss of its own name, or one per pair of hidden states.
    """

    weight: float
    numerators: dict[str, float]
    denominators: dict[str, float]

    @property
    def pair_losses(self) -> dict[str, float]:
        """Each of its losses, by name; NaN without a valid token, for a mean of nothing is no number."""
        return {
            name: value / max(self.denominators[name], 1e-30) if value or self.denominators[name] else math.nan
            for name, value in self.numerators.items()
        }

    @property
    def loss(self) -> float:
        """The mean of its losses."""
        return sum(self.pair_losses.values()) / max(len(self.numerators), 1)


@dataclass
class StepResult:
    """The losses of a step (or a validation), over all ranks.

    Attributes:
        entries: results by the entries' names, in the order of the step's entries.
        num_tokens: valid tokens; if there are none, all losses are NaN.
        alpha: factor of a balanced entry's weight; see `BalancedWeight`.
        teacher_s: seconds that the teachers took on this rank.
        teacher_text_loss: cross-entropy of a teacher that is trained beside its student; None without one.
    """

    entries: dict[str, EntryResult]
    num_tokens: int
    alpha: float = 1.0
    teacher_s: float = 0.0
    teacher_text_loss: float | None = None

    @property
    def losses(self) -> dict[str, float]:
        """The loss of every entry per valid token, unweighted."""
        return {name: entry.loss for name, entry in self.entries.items()}

    @property
    def total(self) -> float:
        """The weighted sum that is minimised."""
        total = 0.0
        for entry in self.entries.values():  # from Python 3.12 on, sum() uses compensated summation
            total += entry.weight * entry.loss
        return total

    @property
    def is_finite(self) -> bool:
        """Whether every loss is finite."""
        return all(map(math.isfinite, (*self.losses.values(), self.teacher_text_loss or 0.0)))


def combine(results: Sequence[StepResult]) -> StepResult:
    """Combines several results with the same entries into one, in which each token counts the same."""
    first = results[0]
    entries = {}
    for name, entry in first.entries.items():
        parts = [result.entries[name] for result in results]
        numerators = {loss: sum(part.numerators[loss] for part in parts) for loss in entry.numerators}
        denominators = {loss: sum(part.denominators[loss] for part in parts) for loss in entry.denominators}
        entries[name] = EntryResult(entry.weight, numerators, denominators)
    return StepResult(entries, sum(result.num_tokens for result in results), first.alpha)
