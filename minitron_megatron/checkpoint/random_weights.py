"""Random weights as a source, the same for every layout."""

import hashlib
import math

import numpy as np
import torch

from minitron_megatron.checkpoint.source import take
from minitron_megatron.model.axes import HIDDEN, VOCAB, Param
from minitron_megatron.model.network import Network

# Megatron-Core's `init_method_std`.
_STD = 0.02


class RandomWeights:
    """Initial weights for training, distributed as Megatron-Core's own.

    Matrices are normal with a standard deviation of 0.02, divided by the square root of the number of sublayers for
    those that write to the residual stream. Norms are the identity; biases and the vocabulary's padding are zero.

    Args:
        network: the whole network.
        seed: determines the values of a parameter, with its name and the number of its sublayer.
    """

    dtype = torch.float32

    def __init__(self, network: Network, seed: int):
        self.network = network
        self.seed = seed

    def read(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`. Makes the whole parameter first, in float32."""
        return take(self._whole(param), index)

    def _whole(self, param: Param) -> torch.Tensor:
        size = param.shape
        if len(size) == 1:
            is_bias = param.name.endswith("bias")
            return torch.full(size, 0.0 if is_bias or self.network.norm_zero_centered else 1.0)
        number = None if param.position is None else self.network.number(param.position)
        digest = hashlib.sha256(f"{self.seed} {param.name} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big"))
        writes_to_residual = param.dims[0] == HIDDEN
        whole = torch.empty(size).normal_(
            std=_STD / math.sqrt(len(self.network.sublayers)) if writes_to_residual else _STD, generator=generator
        )
        if param.split == VOCAB.name:
            whole[self.network.vocab_size :] = 0
        return whole
