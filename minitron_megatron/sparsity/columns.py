"""Fixes the columns of a matrix one after the other, each at zero or rounded, while later ones make up for the error.

One procedure for SparseGPT (2301.00774: it chooses what is zero on the way), for GPTQ (2210.17323: it rounds), for both
in one pass, and for GPTQ on a given mask.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minitron_megatron.sparsity.patterns import Pattern

# Columns whose updates of all later ones are applied together, as one matrix product.
BLOCK = 128

Rounding = Callable[[Tensor, int], Tensor]
"""Rounds `[rows]` weights of a column, given by its number, to their grid."""


def fix_columns(
    weight: Tensor,
    factor: Tensor,
    order: Tensor | None = None,
    pattern: Pattern | None = None,
    mask: Tensor | None = None,
    rounding: Rounding | None = None,
) -> tuple[Tensor, Tensor]:
    """Fixes the columns of a matrix in turn.

    Args:
        weight: `[rows, columns]`, without weights of dead inputs.
        factor: see `SecondMoments.factor`, in the same order.
        order: of the columns; None for their own. Consecutive groups of the pattern stay together.
        pattern: chooses the mask, block by block, on weights that make up for those fixed before: by the loss of
            setting one to zero.
        mask: bool `[rows, columns]` of the weights that may stay; all by default.
        rounding: of the weights that stay.

    Returns:
        the new weights, and the mask.
    """
    columns = weight.shape[1]
    weight = _by_column(weight, order)
    keep = torch.ones_like(weight, dtype=torch.bool) if mask is None else _by_column(mask, order)
    changes = torch.empty_like(weight)
    numbers = range(columns) if order is None else order.tolist()
    group = pattern.group if pattern else 1
    length = max(group, BLOCK - BLOCK % group)
    identity = torch.eye(length, dtype=factor.dtype, device=factor.device)
    for start in range(0, columns, length):
        block = slice(start, min(start + length, columns))
        size = block.stop - start
        scale = torch.linalg.solve_triangular(factor[block, block], identity[:size, :size], upper=True)
        own = weight[block] - scale.T @ (factor[:start, block].T @ changes[:start])
        diagonal = scale.diagonal()
        if pattern and group == 1:  # a threshold of this block, in each row
            keep[block] &= _mask(pattern, own, diagonal)
        for column in range(size):
            if pattern and group > 1 and column % group == 0:
                these = slice(column, column + group)
                keep[block][these] &= _mask(pattern, own[these], diagonal[these])
            fixed = own[column] * keep[start + column]
            if rounding:
                fixed = rounding(fixed, numbers[start + column])
            error = (own[column] - fixed) / diagonal[column]
            own[column + 1 :].addr_(scale[column, column + 1 :], error, alpha=-1)
            own[column] = fixed
        changes[block] = own - weight[block]
        weight[block] = own
    if order is not None:
        back = order.argsort()
        weight, keep = weight[back], keep[back]
    return weight.T.contiguous(), keep.T.contiguous()


def _by_column(matrix: Tensor, order: Tensor | None) -> Tensor:
    """Returns a copy of `[rows, columns]` as `[columns, rows]`, so that each column lies together in memory."""
    return (matrix if order is None else matrix[:, order]).T.clone(memory_format=torch.contiguous_format)


def _mask(pattern: Pattern, weight: Tensor, diagonal: Tensor) -> Tensor:
    """Returns which of `[columns, rows]` stay, by the loss of setting one to zero: `w^2 / factor_jj^2`."""
    return pattern.mask((weight / diagonal[:, None]).square().T).T
