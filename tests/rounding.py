"""How far a result may be off for the number format that it was computed in, and no further.

A format of unit roundoff u (2^-8 for bf16, 2^-11 for fp16, 2^-24 for fp32) rounds a number x to x (1 + d), |d| <= u.
All bounds here follow from that: Higham, Accuracy and Stability of Numerical Algorithms, chapter 3; Higham and Mary,
A New Approach to Probabilistic Rounding Error Analysis (2019).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

# Times the root of the sum of squares that a sum of independent errors stays below but for one case in 100,000:
# 2 exp(-5^2 / 2) by Hoeffding's inequality.
_DEVIATIONS = 5.0

# Times another computation's own error in the same format that a computation may be off. Two that round equally often,
# in different places, have errors of one size, and by half as much again of more or larger steps.
AS_PRECISE = 1.5


def unit_roundoff(dtype: torch.dtype) -> float:
    """The largest relative error of rounding a number to the nearest one of a format."""
    return torch.finfo(dtype).eps / 2


def of_operations(count: int, dtype: torch.dtype) -> float:
    """The largest relative error of `count` operations one after another, or of a sum of that many terms of one sign.

    Higham's gamma, n u / (1 - n u), which holds for any order of the sum.
    """
    total = count * unit_roundoff(dtype)
    assert total < 1
    return total / (1 - total)


def of_rounded(parts: Iterable[tuple[Tensor, Tensor, torch.dtype]]) -> float:
    """The error of a number that is computed from rounded values, to first order.

    A value x of which the number has the derivative g adds g x d, |d| <= u; the errors d are independent.

    Args:
        parts: values, the number's derivatives by them, and the format that they are rounded to.
    """
    squares = sum((unit_roundoff(dtype) * values * slopes).square().sum().item() for values, slopes, dtype in parts)
    return _DEVIATIONS * squares**0.5


def between_means(errors: Tensor, count: int) -> float:
    """How far apart the means of `count` values may be that two computations in a format make.

    Args:
        errors: what the format does to some of the values in one of the two; in the other one it does as much.
    """
    one = errors.double().square().mean().sqrt().item() / count**0.5
    return _DEVIATIONS * 2**0.5 * one


def assert_rounded(found: Tensor, exact: Tensor, error: float | Tensor = 0.0) -> None:
    """A result in a format is what a computation in a wider one gives, rounded once.

    Args:
        found: in the format.
        exact: what it should be, in a wider format.
        error: by how much the wider computation may be off, for each element or for all.
    """
    bound = unit_roundoff(found.dtype) * (exact.abs() + error) + error
    excess = ((found.to(exact.dtype) - exact).abs() / bound).nan_to_num(posinf=torch.inf).max().item()
    assert excess <= 1, f"off by {excess:.3g} times what rounding to {found.dtype} gives"


def assert_as_precise(
    found: Tensor, other: Tensor, exact: Tensor, dtype: torch.dtype, factor: float = AS_PRECISE
) -> None:
    """A result is about as near to the exact one as another computation in the same format.

    Distances are of whole tensors, so that chance has no part in it: one element may happen to be exact, not all.
    Where the other one is exact, a last rounding stays: |d| <= u of each element is |d| <= u of the norm.

    Args:
        found: what is tested.
        other: the same by a definition or by others, in the same format.
        exact: the same in float64, of the same inputs.
        dtype: the format.
        factor: how many times the other's error is allowed.
    """
    exact = exact.double()
    own_error, error = ((x.double() - exact).norm().item() for x in (found, other))
    bound = max(factor * error, unit_roundoff(dtype) * exact.norm().item())
    assert own_error <= bound, f"off by {own_error:.3g}, {own_error / bound:.3g} times what {dtype} gives"
