"""Second moments of a matrix's inputs, `H = sum x x^T`: what an error in each of its weights costs.

A row of the matrix that is changed by `d` changes the output by `d H d^T`, squared and summed over all tokens. Every
method here minimises that, row by row.
"""

import logging
from functools import cached_property

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

# Tried in turn, relative to the damping asked for, where a factorisation fails.
_MORE_DAMPING = (1, 10, 100, 1000)


class SecondMoments:
    """The second moments of a matrix's inputs, damped so that they can be inverted.

    Inputs that are always zero ("dead") get a second moment of 1, and their weights are zeroed: nothing depends on them
    (GPTQ, 2210.17323, and SparseGPT, 2301.00774, do the same).

    Args:
        moments: `[columns, columns]`, not damped. Its dtype is that of the work.
        damping: what is added to the diagonal, as a share of its mean.
        name: of the matrix, for messages.

    Attributes:
        diagonal: of `moments`.
        dead: bool `[columns]`, inputs that are always zero.
    """

    def __init__(self, moments: Tensor, damping: float, name: str = "a matrix"):
        self.diagonal = moments.diagonal().clone()
        self.dead = self.diagonal <= 0
        self.added = float(damping * self.diagonal.mean())
        self.name = name
        self._moments = moments

    @cached_property
    def damped(self) -> Tensor:
        """`[columns, columns]`: positive definite, with the damping added to the diagonal."""
        damped = self._moments.clone()
        damped[self.dead] = 0
        damped[:, self.dead] = 0
        damped.diagonal().add_(self.added)
        damped.diagonal()[self.dead] = 1
        return damped

    def without_dead(self, weight: Tensor) -> Tensor:
        """Returns a copy of `[rows, columns]` with the weights of dead inputs zeroed."""
        return weight.masked_fill(self.dead, 0)

    def by_activation(self, group: int = 1) -> Tensor:
        """Returns the columns in the order in which they are best decided: the largest second moments first.

        Args:
            group: this number of consecutive columns stay together.
        """
        sums = self.diagonal.view(-1, group).sum(1)
        groups = sums.argsort(descending=True, stable=True)
        return (groups[:, None] * group + torch.arange(group, device=groups.device)).flatten()

    def inverse_factor(self, order: Tensor | None = None) -> Tensor:
        """Returns the upper Cholesky factor of the inverse, with columns in another order if one is given.

        Row i of it says how the columns after i make up for an error in column i, once all before i are fixed
        (SparseGPT, section 3.2).
        """
        damped = self.damped if order is None else self.damped[order][:, order]
        least = torch.finfo(damped.dtype).eps * float(damped.diagonal().max())
        for more in _MORE_DAMPING:
            if more > 1:
                logger.warning("%s: second moments of its inputs cannot be inverted: damped %d times", self.name, more)
            own = damped.clone()
            own.diagonal().add_((more - 1) * max(self.added, least))
            lower, failed = torch.linalg.cholesky_ex(own)
            if not failed:
                torch.cholesky_inverse(lower, out=own)
                del lower
                upper, failed = torch.linalg.cholesky_ex(own, upper=True)
            if not failed:
                return upper
        raise FloatingPointError(f"{self.name}: the second moments of its inputs are not finite")

    def error(self, change: Tensor) -> Tensor:
        """Returns the squared change of the output, summed over tokens and rows, for a change of the weights.

        Args:
            change: `[rows, columns]`.
        """
        return ((change @ self._moments).double() * change).sum()
