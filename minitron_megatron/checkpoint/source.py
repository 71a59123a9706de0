"""A source of weights: anything that can return any part of any parameter of a network.

A checkpoint on disk, a Hugging Face folder and a pruned view of either are sources. Writers take a source, so every
input format combines with every output format, and no whole model is ever in memory.
"""

from typing import Protocol

import numpy as np
import torch

from minitron_megatron.checkpoint.row_io import bits, take_bits
from minitron_megatron.model.axes import Param
from minitron_megatron.model.network import Network


class TensorSource(Protocol):
    """Weights of a network, by the names and axes of the axis table."""

    network: Network
    dtype: torch.dtype

    def read(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        """Reads some positions of one parameter.

        Args:
            param: of `parameters(network)`, or one of the source's own companions.
            index: for each dimension, ascending positions.

        Returns:
            a tensor with the lengths of `index`.
        """
        ...


def take(tensor: torch.Tensor, index: list[np.ndarray]) -> torch.Tensor:
    """Returns `tensor` at `index[0] x index[1] x ...`, with one copy per sliced dimension."""
    return torch.from_numpy(take_bits(bits(tensor), index)).view(tensor.dtype)
