"""Second moments of a matrix's inputs, `H = sum x x^T`: what an error in each of its weights costs.

A row of the matrix that is changed by `d` changes the output by `d H d^T`, squared and summed over all tokens. Every
method here minimises that, row by row. `H` of a wide matrix is larger than all else in memory, so there is one copy of
it and one of its factor, and of both only half where that will do (see `moment_sums.BLOCK`).
"""

import logging
from functools import cached_property

import torch
from torch import Tensor

from minitron_megatron.sparsity.moment_sums import BLOCK

logger = logging.getLogger(__name__)

# Tried in turn, relative to the damping asked for, where a factorisation fails.
_MORE_DAMPING = (1, 10, 100, 1000)


class SecondMoments:
    """The second moments of a matrix's inputs, damped so that they can be inverted.

    Inputs that are always zero ("dead") get a second moment of 1, and their weights are zeroed: nothing depends on them
    (GPTQ, 2210.17323, and SparseGPT, 2301.00774, do the same).

    Args:
        moments: `[columns, columns]`, not damped; the blocks below its diagonal are not read. It is overwritten. Its
            dtype is that of the work.
        damping: what is added to the diagonal, as a share of its mean.
        name: of the matrix, for messages.

    Attributes:
        diagonal: of the moments, not damped.
        dead: bool `[columns]`, inputs that are always zero.
    """

    def __init__(self, moments: Tensor, damping: float, name: str = "a matrix"):
        self.diagonal = moments.diagonal().clone()
        self.dead = self.diagonal <= 0
        self.added = float(damping * self.diagonal.mean())
        self.name = name
        self._upper = moments
        self._upper[self.dead] = 0
        self._upper[:, self.dead] = 0
        self._upper.diagonal().add_(self.added)
        self._upper.diagonal()[self.dead] = 1

    @cached_property
    def damped(self) -> Tensor:
        """`[columns, columns]`: positive definite, with the damping added to the diagonal."""
        for start in range(0, len(self._upper), BLOCK):
            block, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
            self._upper[later, block] = self._upper[block, later].T
        return self._upper

    def without_dead(self, weight: Tensor) -> Tensor:
        """Returns `[rows, columns]` with the weights of dead inputs zeroed; a copy if there are any."""
        return weight.masked_fill(self.dead, 0) if self.dead.any() else weight

    def by_activation(self, group: int = 1) -> Tensor:
        """Returns the columns in the order in which they are best decided: the largest second moments first.

        Args:
            group: this number of consecutive columns stay together.
        """
        sums = self.diagonal.view(-1, group).sum(1)
        groups = sums.argsort(descending=True, stable=True)
        return (groups[:, None] * group + torch.arange(group, device=groups.device)).flatten()

    def factor(self, order: Tensor | None = None) -> Tensor:
        """Returns the upper triangular `R` with `R R^T = damped`, with columns in another order if one is given.

        Its inverse is the upper Cholesky factor of the inverse, `U^T U = damped^-1`, on which GPTQ and SparseGPT work
        (SparseGPT, section 3.2); this takes a quarter of the time of those three steps. Below its diagonal is no zero.
        """
        least = torch.finfo(self.diagonal.dtype).eps * float(self._upper.diagonal().max())
        for more in _MORE_DAMPING:
            if more > 1:
                logger.warning("%s: second moments of its inputs cannot be inverted: damped %d times", self.name, more)
            own = torch.empty_like(self._upper)
            for stop in range(len(own), 0, -BLOCK):
                block = slice(max(0, stop - BLOCK), stop)
                own[:stop, block] = (
                    self._upper[:stop, block] if order is None else self.damped[order[:stop, None], order[block]]
                )
            own.diagonal().add_((more - 1) * max(self.added, least))
            if _factorise(own):
                return own
        raise FloatingPointError(f"{self.name}: the second moments of its inputs are not finite")

    def error(self, change: Tensor) -> Tensor:
        """Returns the squared change of the output, summed over tokens and rows, for a change of the weights.

        Args:
            change: `[rows, columns]`.
        """
        added = torch.full_like(self.diagonal, self.added).masked_fill_(self.dead, 1)
        error = torch.zeros((), dtype=torch.float64, device=change.device)
        for start in range(0, change.shape[1], BLOCK):
            block, later = slice(start, start + BLOCK), slice(start + BLOCK, None)
            own = change[:, block]
            error += (own @ self._upper[block, block]).mul_(own).sum() - (own.square() * added[block]).sum()
            # And as much by the block below the diagonal.
            error += 2 * (own @ self._upper[block, later]).mul_(change[:, later]).sum()
        return error


def _factorise(matrix: Tensor) -> bool:
    """Overwrites the upper triangle of a positive definite matrix by `R`, with `R R^T = matrix`.

    Returns:
        whether that was possible.
    """
    for stop in range(len(matrix), 0, -BLOCK):
        start = max(0, stop - BLOCK)
        block, later = slice(start, stop), slice(stop, None)
        matrix[:stop, block].addmm_(matrix[:stop, later], matrix[block, later].T, alpha=-1)
        lower, failed = torch.linalg.cholesky_ex(matrix[block, block].flip(0, 1))
        if failed:
            return False
        matrix[block, block] = own = lower.flip(0, 1)
        matrix[:start, block] = torch.linalg.solve_triangular(own.T, matrix[:start, block], upper=False, left=False)
    return True
