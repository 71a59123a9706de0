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
        factor: see `SecondMoments.inverse_factor`, in the same order.
        order: of the columns; None for their own. Consecutive groups of the pattern stay together.
        pattern: chooses the mask, block by block, on weights that make up for those fixed before: by the loss of
            setting one to zero, `w^2 / factor_jj^2`.
        mask: bool `[rows, columns]` of the weights that may stay; all by default.
        rounding: of the weights that stay.

    Returns:
        the new weights, and the mask.
    """
    rows, columns = weight.shape
    weight = weight.clone() if order is None else weight[:, order]
    if mask is None:
        keep = torch.ones(rows, columns, dtype=torch.bool, device=weight.device)
    else:
        keep = mask.clone() if order is None else mask[:, order]
    numbers = range(columns) if order is None else order.tolist()
    group = pattern.group if pattern else 1
    length = max(group, BLOCK - BLOCK % group)
    for start in range(0, columns, length):
        block = slice(start, min(start + length, columns))
        own, scale = weight[:, block].clone(), factor[block, block]
        diagonal = scale.diagonal()
        errors = torch.empty_like(own)
        if pattern and group == 1:  # a threshold of this block, in each row
            keep[:, block] &= pattern.mask(own.square() / diagonal.square())
        for column in range(own.shape[1]):
            if pattern and group > 1 and column % group == 0:
                these = slice(column, column + group)
                scores = own[:, these].square() / diagonal[these].square()
                keep[:, start + column : start + column + group] &= pattern.mask(scores)
            fixed = own[:, column] * keep[:, start + column]
            if rounding:
                fixed = rounding(fixed, numbers[start + column])
            errors[:, column] = (own[:, column] - fixed) / diagonal[column]
            own[:, column + 1 :].addr_(errors[:, column], scale[column, column + 1 :], alpha=-1)
            own[:, column] = fixed
        weight[:, block] = own
        weight[:, block.stop :].addmm_(errors, factor[block, block.stop :], alpha=-1)
    if order is not None:
        back = order.argsort()
        weight, keep = weight[:, back], keep[:, back]
    return weight, keep
