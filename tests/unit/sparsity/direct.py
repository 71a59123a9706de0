"""SparseGPT and GPTQ as their papers put it, in float64, a row and a column at a time: for each column the inverse of
what is left of the Hessian is computed anew. No Cholesky factor, no blocks."""

import torch
from torch import Tensor


def problem(rows: int = 6, columns: int = 16, tokens: int = 40, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Returns weights, inputs with correlated columns of unlike sizes, and their second moments, in float64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    inputs = normal(tokens, columns) @ (torch.eye(columns) + 0.4 * normal(columns, columns)) * normal(columns).exp()
    return normal(rows, columns), inputs, inputs.T @ inputs


def damped(moments: Tensor, damping: float) -> Tensor:
    return moments + damping * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)


def fix_in_turn(weight: Tensor, hessian: Tensor, order: list[int], group: int, keep: int, rounding=None) -> Tensor:
    """Fixes one row's columns in an order; of every `group` in turn `keep` stay (all if it equals `group`)."""
    weight, left = weight.clone(), list(order)
    dropped: set[int] = set()
    while left:
        column = left[0]
        if keep < group and (len(order) - len(left)) % group == 0:
            losses = {}
            for place, other in enumerate(left[:group]):
                inverse = torch.linalg.inv(hessian[left[place:]][:, left[place:]])
                losses[other] = float(weight[other] ** 2 / inverse[0, 0])
            dropped |= set(sorted(losses, key=losses.get)[: group - keep])
        inverse = torch.linalg.inv(hessian[left][:, left])
        new = torch.zeros(()) if column in dropped else weight[column]
        if rounding:
            new = rounding(new, column)
        weight[left] -= (weight[column] - new) / inverse[0, 0] * inverse[0]
        weight[column] = new
        left.pop(0)
    return weight
