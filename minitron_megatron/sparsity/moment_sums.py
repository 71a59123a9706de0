"""Sums the second moments of a matrix's inputs over a calibration set, the same for any number of ranks.

The sum of floating-point numbers depends on their order, and with it the mask, where two weights are nearly equal. So
every micro-batch's part is rounded to one grid, a power of two for each pair of columns, on which float64 sums are
exact. The grid is far finer than the rounding of the products themselves.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.parallel.collectives import sum_over

# Of the 53 bits in which float64 holds whole numbers, the sums are expected to take so many. The rest is for
# micro-batches with larger inputs than the first one.
_BITS = 44
# Rows of the moments that are rounded at a time, to bound the memory.
_ROWS = 1024


class MomentSums:
    """`sum x x^T` over the inputs of one matrix.

    Args:
        columns: number of inputs.
        num_batches: micro-batches over all ranks.
        device: of the inputs.
        group: of the ranks that share the calibration set.
        most_norms: a token's input counts as if its L2 norm were at most this many times the median of its
            micro-batch; None for no limit. A few tokens, the first of a sequence among them, have norms hundreds of
            times as large as others and would otherwise rule the sum.
    """

    def __init__(
        self,
        columns: int,
        num_batches: int,
        device: torch.device,
        group: dist.ProcessGroup,
        most_norms: float | None = None,
    ):
        self.group = group
        self.num_batches = num_batches
        self.most_norms = most_norms
        self._sums = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._scale: Tensor | None = None
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Adds a micro-batch. Collective for the first one, of which the first rank must have tokens.

        Args:
            x: `[tokens, columns]`.
        """
        x = x.float()
        if self.most_norms is not None and len(x):
            norms = x.norm(dim=1, keepdim=True)
            tiny = torch.finfo(x.dtype).tiny
            x = x * (self.most_norms * norms.median() / norms.clamp(min=tiny)).clamp(max=1)
        moments = x.T @ x
        if self._scale is None:
            self._scale = self._grid(moments.diagonal().double())
        for start in range(0, len(moments), _ROWS):
            rows = slice(start, start + _ROWS)
            part = moments[rows].double()
            part *= self._scale[rows, None]
            part *= self._scale
            self._sums[rows] += part.round_()
        self.num_tokens += len(x)

    def total(self) -> Tensor:
        """Returns the sum over all ranks, `[columns, columns]` in float32, and frees this rank's part. Collective."""
        assert self._scale is not None
        sum_over(self._sums, self.group)
        total = torch.empty(self._sums.shape, dtype=torch.float32, device=self._sums.device)
        for start in range(0, len(total), _ROWS):
            rows = slice(start, start + _ROWS)
            total[rows] = self._sums[rows] / self._scale[rows, None] / self._scale
        del self._sums
        return total

    def _grid(self, diagonal: Tensor) -> Tensor:
        """Returns the power of two by which each column is multiplied, chosen by the first rank."""
        diagonal = diagonal.contiguous()
        if self.group.size() > 1:
            dist.broadcast(diagonal, dist.get_global_rank(self.group, 0), group=self.group)
        typical = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
        expected = torch.where(diagonal > 0, diagonal, typical) * self.num_batches
        return torch.exp2(((_BITS - expected.log2()) / 2).floor())
