"""The methods that choose masks and that round, each in one function.

A method prepares a matrix, and returns what solves any of its rows: rows are independent of each other. A new one is a
function like those below, and an entry in `METHODS`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minitron_megatron.config.sparsify import SparsifyMethod
from minitron_megatron.sparsity.alps import Alps
from minitron_megatron.sparsity.columns import Rounding, fix_columns
from minitron_megatron.sparsity.grids import Grid
from minitron_megatron.sparsity.patterns import NofM, Pattern
from minitron_megatron.sparsity.second_moments import SecondMoments


@dataclass(frozen=True)
class Matrix:
    """A matrix to sparsify or to round.

    Attributes:
        weight: `[rows, columns]` in float32.
        moments: second moments of its inputs.
        by_activation: decide columns in the order of their inputs' second moments; else in their own.
        parts: rows of each of the matrices that are stored as this one, such as those of queries, keys and values.
    """

    weight: Tensor
    moments: SecondMoments
    by_activation: bool = True
    parts: Sequence[np.ndarray] = ()

    def order(self, group: int = 1) -> Tensor | None:
        """Returns the order in which columns are decided, groups of consecutive ones together; None for their own."""
        return self.moments.by_activation(group) if self.by_activation else None


SparseRows = Callable[[slice], tuple[Tensor, Tensor]]
"""Returns new weights and mask of some rows."""


def magnitude(matrix: Matrix, pattern: Pattern) -> SparseRows:
    """Keeps the largest weights: of an unstructured pattern those of each whole matrix."""
    scores = matrix.weight.abs()
    mask = pattern.mask(scores) if isinstance(pattern, NofM) else pattern.mask_of_matrices(scores, matrix.parts)
    return lambda rows: (matrix.weight[rows] * mask[rows], mask[rows])


def wanda(matrix: Matrix, pattern: Pattern) -> SparseRows:
    """Keeps the largest products of a weight and the norm of its input (2306.11695)."""
    norms = matrix.moments.diagonal.sqrt()

    def solve(rows: slice) -> tuple[Tensor, Tensor]:
        weight = matrix.weight[rows]
        mask = pattern.mask(weight.abs() * norms)
        return weight * mask, mask

    return solve


def sparsegpt(matrix: Matrix, pattern: Pattern) -> SparseRows:
    """Decides column by column, on weights that make up for those dropped before (2301.00774)."""
    order = matrix.order(pattern.group)
    factor = matrix.moments.factor(order)

    def solve(rows: slice) -> tuple[Tensor, Tensor]:
        return fix_columns(matrix.moments.without_dead(matrix.weight[rows]), factor, order, pattern)

    return solve


def alps(matrix: Matrix, pattern: Pattern) -> SparseRows:
    """Chooses mask and weights together, by ADMM (2406.07831)."""
    solver = Alps(matrix.moments, pattern)
    return lambda rows: solver.solve(matrix.weight[rows])


METHODS: dict[SparsifyMethod, Callable[[Matrix, Pattern], SparseRows]] = {
    SparsifyMethod.MAGNITUDE: magnitude,
    SparsifyMethod.WANDA: wanda,
    SparsifyMethod.SPARSEGPT: sparsegpt,
    SparsifyMethod.ALPS: alps,
}


def sparsegpt_rounded(
    matrix: Matrix, pattern: Pattern, grid: Grid, dtype: torch.dtype
) -> Callable[[slice], tuple[Tensor, Tensor, Tensor]]:
    """Decides and rounds column by column in one pass (section 3.5 of SparseGPT).

    Args:
        matrix: to work on.
        pattern: to bring it to.
        grid: to round to.
        dtype: of the scales.

    Returns:
        what returns new weights, mask and scales of some rows.
    """
    order = matrix.order(pattern.group)
    factor = matrix.moments.factor(order)

    def solve(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
        weight = matrix.moments.without_dead(matrix.weight[rows])
        scales = grid.scales(weight, dtype)
        return *fix_columns(weight, factor, order, pattern, rounding=rounding(grid, scales)), scales

    return solve


def gptq(matrix: Matrix, grid: Grid, dtype: torch.dtype) -> Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]:
    """Rounds column by column, on weights that make up for the error so far (2210.17323). Groups are those of the given
    columns, whatever the order.

    Args:
        matrix: whose inputs count; its weights do not.
        grid: to round to.
        dtype: of the scales.

    Returns:
        what returns new weights and scales of some rows, given their weights and mask.
    """
    order = matrix.order()
    factor = matrix.moments.factor(order)

    def solve(weight: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        weight = matrix.moments.without_dead(weight)
        scales = grid.scales(weight, dtype)
        return fix_columns(weight, factor, order, mask=mask, rounding=rounding(grid, scales))[0], scales

    return solve


def rounding(grid: Grid, scales: Tensor) -> Rounding:
    """Returns what rounds columns of rows with these scales."""
    spread = grid.spread(scales)
    return lambda values, column: grid.round(values, spread[:, column])
