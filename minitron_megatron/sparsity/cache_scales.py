"""Measures the scales with which what generation caches, such as keys and values, is cached in FP8.

A scale is the largest absolute value over the calibration set, divided by the largest number of the format, so that no
value that was seen overflows. It is one number for a tensor of a layer, as vLLM reads it. A maximum is exact, and so
the same for any number of ranks.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.errors import DataError
from minitron_megatron.model.axes import Param

_LARGEST = torch.finfo(torch.float8_e4m3fn).max


class CacheScale:
    """The scale of one cached tensor of a layer.

    Args:
        param: the scale, of `cache_scales`.
        device: of the tensor.
        group: of the ranks that share the calibration set.
    """

    def __init__(self, param: Param, device: torch.device, group: dist.ProcessGroup):
        self.param = param
        self.group = group
        self._largest = torch.zeros(1, dtype=torch.float32, device=device)

    def add(self, x: Tensor) -> None:
        """Adds a micro-batch, of any shape."""
        self._largest = torch.maximum(self._largest, x.abs().amax().float())

    def total(self) -> Tensor:
        """Returns the scale over all ranks, `[1]` in float32 on the CPU. Collective.

        Raises:
            DataError: a value is not finite; on every rank.
        """
        largest = self._largest.nan_to_num(nan=torch.inf, posinf=torch.inf)  # a maximum may lose NaN
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        if not largest.isfinite():
            raise DataError(
                f"what layer {self.param.layer} caches is not finite ({self.param.name}): set dtype=bf16 or fp32, or "
                f"look at data.text and the weights"
            )
        scale = (largest / _LARGEST).cpu()
        return torch.where(scale > 0, scale, 1.0)  # of a tensor of zeros
