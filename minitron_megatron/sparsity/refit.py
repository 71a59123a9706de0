"""Refits the weights that stay, so that the outputs change least: a least-squares problem per row."""

import torch
from torch import Tensor

from minitron_megatron.sparsity.second_moments import SecondMoments


def refit(weight: Tensor, mask: Tensor, moments: SecondMoments, iterations: int, start: Tensor | None = None) -> Tensor:
    """Minimises `(w - w0) H (w - w0)^T` over the weights of a mask, with damped H, for all rows at once.

    Conjugate gradients with a Jacobi preconditioner, restricted to the mask (ALPS, 2406.07831, section 3.3). Every row
    has a step length of its own, so the result does not depend on the rows beside it.

    Args:
        weight: the dense weights, `[rows, columns]`.
        mask: bool, true where a weight stays.
        moments: of the inputs.
        iterations: number of conjugate-gradient steps.
        start: to begin with; the dense weights by default.

    Returns:
        the new weights, zero outside of the mask.
    """
    weight = moments.without_dead(weight)
    damped = moments.damped
    diagonal = damped.diagonal()
    solution = (weight if start is None else start) * mask
    residual = ((weight - solution) @ damped) * mask
    scaled = residual / diagonal
    direction = scaled.clone()
    product = (residual * scaled).sum(1, keepdim=True)
    tiny = torch.finfo(weight.dtype).tiny
    for _ in range(iterations):
        image = (direction @ damped) * mask
        step = product / (direction * image).sum(1, keepdim=True).clamp(min=tiny)
        solution += step * direction
        residual -= step * image
        scaled = residual / diagonal
        before, product = product, (residual * scaled).sum(1, keepdim=True)
        direction = scaled + product / before.clamp(min=tiny) * direction
    return solution
