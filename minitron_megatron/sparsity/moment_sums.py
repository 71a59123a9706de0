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
BLOCK = 512
"""Columns of second moments that are worked on together. Blocks below the diagonal, which are as those above it, are
left out: they take no time and, as nothing touches their pages, no memory on a CPU."""


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
        # A block of rows each, from its own columns on.
        self._sums = [
            torch.zeros(min(BLOCK, columns - start), columns - start, dtype=torch.float64, device=device)
            for start in range(0, columns, BLOCK)
        ]
        self._scale: Tensor | None = None
        self.num_tokens = 0

    @staticmethod
    def num_bytes(columns: int) -> int:
        """Returns how much memory the sums for so many columns take."""
        return sum(min(BLOCK, columns - start) * (columns - start) for start in range(0, columns, BLOCK)) * 8

    def add(self, x: Tensor) -> None:
        """Adds a micro-batch. Collective for the first one, of which the first rank must have tokens.

        Args:
            x: `[tokens, columns]`.
        """
        x = x.to(torch.float32, copy=True)
        if self.most_norms is not None and len(x):
            norms = x.norm(dim=1, keepdim=True)
            tiny = torch.finfo(x.dtype).tiny
            x *= (self.most_norms * norms.median() / norms.clamp(min=tiny)).clamp(max=1)
        if self._scale is None:
            self._scale = self._grid(x.norm(dim=0).double().square())
        x *= self._scale
        for number, sums in enumerate(self._sums):
            start = number * BLOCK
            sums += (x[:, start : start + BLOCK].T @ x[:, start:]).double().round_()
        self.num_tokens += len(x)

    def total(self) -> Tensor:
        """Returns the sum over all ranks, and frees this rank's part. Collective.

        Returns:
            `[columns, columns]` in float32, without the blocks below the diagonal.
        """
        assert self._scale is not None
        scale = self._scale.double()
        total = torch.empty(len(scale), len(scale), dtype=torch.float32, device=scale.device)
        for start in range(0, len(scale), BLOCK):
            rows, sums = slice(start, start + BLOCK), sum_over(self._sums.pop(0), self.group)
            total[rows, start:] = sums / scale[rows, None] / scale[start:]
        return total

    def _grid(self, diagonal: Tensor) -> Tensor:
        """Returns the power of two by which each column is multiplied, in float32, chosen by the first rank."""
        diagonal = diagonal.contiguous()
        if self.group.size() > 1:
            dist.broadcast(diagonal, dist.get_global_rank(self.group, 0), group=self.group)
        typical = diagonal.mean().clamp(min=torch.finfo(torch.float32).tiny)
        expected = torch.where(diagonal > 0, diagonal, typical) * self.num_batches
        return torch.exp2(((_BITS - expected.log2()) / 2).floor()).float()
