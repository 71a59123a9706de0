"""ALPS (2406.07831): chooses mask and weights together, by ADMM on the layer's whole error.

Where SparseGPT decides column by column, ADMM alternates between the weights that change the output least and the mask
nearest to them, and makes the two agree more and more.
"""

import torch
from torch import Tensor

from minitron_megatron.sparsity.patterns import Pattern
from minitron_megatron.sparsity.second_moments import SecondMoments

STEPS = 36
_FIRST_RHO = 0.1
# The penalty grows the faster, the larger the share of the mask that still changes (section 3.2 and its appendix).
_CHECK_EVERY = 3
_GROWTH = ((0.005, 1.3), (0.0005, 1.1), (0.0, 1.05))


class Alps:
    """ADMM for one matrix. The eigenvectors of its inputs' second moments are computed once for all rows."""

    def __init__(self, moments: SecondMoments, pattern: Pattern, steps: int = STEPS):
        self.moments = moments
        self.pattern = pattern
        self.steps = steps
        # In units in which every input has a second moment of 1: one penalty fits all columns (section 3.3).
        self.scale = moments.damped.diagonal().sqrt()
        self.unit = moments.damped / self.scale[:, None] / self.scale
        self.values, self.vectors = torch.linalg.eigh(self.unit)

    def solve(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns new weights and mask of `[rows, columns]`."""
        dense = self.moments.without_dead(weight) * self.scale
        target = dense @ self.unit
        sparse, dual = dense, torch.zeros_like(dense)
        rho, mask, last = torch.full((len(weight), 1), _FIRST_RHO, dtype=weight.dtype, device=weight.device), None, None
        for step in range(self.steps):
            near = ((target - dual + rho * sparse) @ self.vectors / (self.values + rho)) @ self.vectors.T
            sparse = near + dual / rho
            mask = self.pattern.mask(sparse.square())
            sparse = sparse * mask
            dual = dual + rho * (near - sparse)
            if step % _CHECK_EVERY == _CHECK_EVERY - 1:
                if last is not None:
                    changed = (mask ^ last).sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
                    growth = torch.full_like(rho, 1.0)
                    for least, factor in reversed(_GROWTH):
                        growth = torch.where(changed > least, factor, growth)
                    rho = rho * growth
                else:
                    rho = rho * _GROWTH[0][1]
                last = mask
        assert mask is not None
        return sparse / self.scale, mask
