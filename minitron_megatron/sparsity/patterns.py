"""Sparsity patterns: which weights stay, given a score for each.

A pattern is either N of every M weights of a row (2:4 is what NVIDIA's sparse tensor cores take), or a share of them
anywhere (unstructured). Of equal scores the one with the lower index stays, so that a mask is a function of the scores.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class NofM:
    """N of every M consecutive weights of a row stay."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:
        """The share of weights that are zero."""
        return 1 - self.n / self.m

    @property
    def group(self) -> int:
        """Number of consecutive columns among which a mask is chosen."""
        return self.m

    def mask(self, scores: Tensor) -> Tensor:
        """Returns the mask with the highest scores.

        Args:
            scores: `[rows, columns]`, a multiple of M columns.

        Returns:
            bool `[rows, columns]`, true where a weight stays.
        """
        groups = scores.unflatten(1, (-1, self.m))
        # The number of weights of the group that go before each one: sorting such short rows is 50 times slower.
        rank = torch.zeros_like(groups, dtype=torch.int8)
        for i in range(self.m):
            for j in range(i):
                first = groups[..., j] >= groups[..., i]
                rank[..., i] += first
                rank[..., j] += ~first
        return (rank < self.n).flatten(1)

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Unstructured:
    """A share of the weights of each row is zero, anywhere."""

    sparsity: float

    @property
    def group(self) -> int:
        """Number of consecutive columns among which a mask is chosen; see `NofM.group`."""
        return 1

    def mask(self, scores: Tensor) -> Tensor:
        """Returns the mask with the highest scores of each row; see `NofM.mask`."""
        return self._highest(scores)

    def mask_of_matrices(self, scores: Tensor, parts: Sequence[np.ndarray]) -> Tensor:
        """Returns the mask with the highest scores of each of several matrices that are stored as one.

        Args:
            scores: `[rows, columns]`.
            parts: rows of each matrix.
        """
        mask = torch.empty_like(scores, dtype=torch.bool)
        for part in parts:
            rows = torch.from_numpy(part).to(scores.device)
            mask[rows] = self._highest(scores[rows].reshape(1, -1)).view(len(rows), -1)
        return mask

    def _highest(self, scores: Tensor) -> Tensor:
        num_zeros = int(scores.shape[1] * self.sparsity)
        # Descending in both score and index reversed: of equal scores the later ones go first.
        lowest = scores.flip(1).argsort(dim=1, stable=True)[:, :num_zeros]
        return torch.ones_like(scores, dtype=torch.bool).scatter_(1, scores.shape[1] - 1 - lowest, False)

    def __str__(self) -> str:
        return "unstructured"


Pattern = NofM | Unstructured


def broken_groups(weight: Tensor, pattern: Pattern) -> int:
    """Returns the number of groups of `[rows, columns]` that have more weights than an N:M pattern allows."""
    if isinstance(pattern, Unstructured):
        return 0
    return int(((weight != 0).unflatten(1, (-1, pattern.m)).sum(2) > pattern.n).sum())
