"""Pruning is indexing: a plan turns any source of weights into a smaller one."""

import numpy as np
import torch

from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.model.axes import Param, axis_sizes
from minitron_megatron.pruning.plan import Plan


class Pruned:
    """What a plan leaves of a source, as a source. Nothing is read before it is asked for."""

    def __init__(self, source: TensorSource, plan: Plan):
        assert source.shape == plan.source
        self.source = source
        self.plan = plan
        self.shape = plan.target
        self.dtype = source.dtype
        self._sizes = axis_sizes(source.shape)

    def read(self, param: Param, layer: int | None, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`."""
        kept = param.index(self.plan.kept(param.sublayer, layer), self._sizes)
        if layer is not None:
            layer = self.plan.source_layer(param.sublayer, layer)
        return self.source.read(param, layer, [k[i] for k, i in zip(kept, index, strict=True)])
