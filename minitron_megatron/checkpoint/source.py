"""A source of weights: anything that can give any part of any parameter of a network.

A checkpoint on disk, a Hugging Face folder and a pruned view of either are all sources. Writers take a
source, so that every way in goes with every way out and no whole model is ever held in memory.
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
        """Read the given positions of one parameter.

        Args:
            param: of `parameters(network)`.
            index: for each dimension, the positions wanted, ascending.

        Returns:
            tensor with the lengths of `index`.
        """
        ...


def take(tensor: torch.Tensor, index: list[np.ndarray]) -> torch.Tensor:
    """`tensor` at `index[0] x index[1] x ...`, copying once per dimension that is really cut."""
    return torch.from_numpy(take_bits(bits(tensor), index)).view(tensor.dtype)
