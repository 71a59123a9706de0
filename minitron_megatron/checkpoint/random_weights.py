"""Random weights as a source: the same ones for every layout."""

import hashlib
import math

import numpy as np
import torch

from minitron_megatron.checkpoint.source import take
from minitron_megatron.model.axes import HIDDEN, Param, axis_sizes
from minitron_megatron.model.shape import ModelShape

# Megatron-Core's `init_method_std`.
_STD = 0.02


class RandomWeights:
    """Weights to start a training from, distributed as Megatron-Core's own.

    Matrices are normal with a deviation of 0.02, those that write to the residual stream divided by the square root
    of the number of sublayers that do. Norms start as the identity, biases and rows that pad the vocabulary at zero.

    Args:
        shape: of the network.
        seed: with the name of a parameter and its layer, decides its values.
    """

    dtype = torch.float32

    def __init__(self, shape: ModelShape, seed: int):
        self.shape = shape
        self.seed = seed

    def read(self, param: Param, layer: int | None, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`. The whole parameter is made first, in float32."""
        return take(self._whole(param, layer), index)

    def _whole(self, param: Param, layer: int | None) -> torch.Tensor:
        size = param.size(axis_sizes(self.shape))
        if len(size) == 1:
            is_bias = param.name.endswith("bias")
            return torch.full(size, 0.0 if is_bias or self.shape.norm_zero_centered else 1.0)
        digest = hashlib.sha256(f"{self.seed} {param.name} {layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        writes_to_residual = param.dims[0] == HIDDEN
        whole = torch.empty(size).normal_(
            std=_STD / math.sqrt(len(self.shape.pattern)) if writes_to_residual else _STD, generator=generator
        )
        if param.split == "vocab":
            whole[self.shape.vocab :] = 0
        return whole
