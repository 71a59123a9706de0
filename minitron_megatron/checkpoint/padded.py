"""Pads a network of unlike layers with zeros to one of equal layers.

No class of transformers has layers of unlike sizes. A neuron, a head or a sublayer whose weights are all zero adds
nothing to the residual stream, so the padded network is exactly the same function. It is as large and as slow as if all
layers were like the largest.
"""

import numpy as np
import torch

from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.errors import UnsupportedModelError
from minitron_megatron.model.axes import Param
from minitron_megatron.model.layers import Slot, Sublayer
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import parameters


class Padded:
    """Pads a source of weights to equal layers; a source itself."""

    def __init__(self, source: TensorSource):
        self.source = source
        self.network = padded_network(source.network)
        self.dtype = source.dtype
        own = source.network
        self._own = {(param.layer, param.name): param for param in parameters(own)}

    def read(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`."""
        own = self._own.get((param.layer, param.name))
        if own is None:
            return self._missing_sublayer(param, index)
        # The original elements come first along every axis; `Param.index` gives their positions in the padded tensor.
        kept = {axis: np.arange(own.sizes[axis]) for axis in own.sizes if own.sizes[axis] < param.sizes[axis]}
        places, positions = [], []
        for wanted, there in zip(index, param.index(kept), strict=True):
            _, at, of_own = np.intersect1d(wanted, there, assume_unique=True, return_indices=True)
            places.append(torch.from_numpy(at))
            positions.append(of_own)
        out = torch.zeros([len(i) for i in index], dtype=self.dtype)
        if all(len(place) for place in places):
            out[torch.meshgrid(*places, indexing="ij")] = self.source.read(own, positions)
        return out

    def _missing_sublayer(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        """Returns the values of a missing sublayer: zeros, and ones for the scale of norms."""
        is_scale = len(param.dims) == 1 and param.split is None and not param.name.endswith("bias")
        value = 1.0 if is_scale and not self.network.norm_zero_centered else 0.0
        return torch.full([len(i) for i in index], value, dtype=self.dtype)


def padded_network(network: Network) -> Network:
    """Returns the smallest network of equal layers that a network fits into.

    Raises:
        UnsupportedModelError: layers differ in more than sizes and missing sublayers.
    """
    layer = []
    for slot in Slot:
        own = [sublayer for sublayer in network.sublayers if sublayer.slot is slot]
        if own:
            layer.append(_largest(own))
    return network.replace(sublayers=tuple(layer) * len(network.layers))


def _largest(sublayers: list[Sublayer]) -> Sublayer:
    """Returns the smallest sublayer that each of the given ones fits into."""
    kind = type(sublayers[0])
    names = [axis.axis.name for axis in kind.prunable]
    if any(type(sublayer) is not kind for sublayer in sublayers):
        titles = " and ".join(dict.fromkeys(type(sublayer).title for sublayer in sublayers))
        raise UnsupportedModelError(f"format = padded: layers have {titles} in one place: pad networks of one kind")
    lengths = {name: max(sublayer.sizes[name] for sublayer in sublayers) for name in names}
    if len(padded := {sublayer.resized(lengths) for sublayer in sublayers}) > 1:
        raise UnsupportedModelError(
            f"format = padded: {kind.title} sublayers differ in more than {', '.join(names)}, and zeros pad only these"
        )
    return padded.pop()
