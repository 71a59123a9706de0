"""Every gradient of a network, put together from the parts that the ranks of a layout hold."""

import functools
from collections.abc import Sequence

import numpy as np
import torch

from minitron_megatron.checkpoint.load import local_parameters
from minitron_megatron.model.axes import Param
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import layer_key
from minitron_megatron.parallel.context import ParallelContext


def local_gradients(model_chunks: Sequence[torch.nn.Module], network: Network, ctx: ParallelContext) -> list[tuple]:
    """The gradients of this rank's chunks, each with its key and where in the whole tensor it lies."""
    return [
        (layer_key(param), index, parameter.main_grad.detach().cpu().clone())
        for chunk in model_chunks
        for parameter, param, index in local_parameters(chunk, network, ctx)
    ]


class Gradients:
    """The gradients of all ranks as a source of tensors, as `read_hf_tensor` takes one; copies must agree."""

    dtype = torch.float32

    def __init__(self, network: Network, of_ranks: list[list[tuple]]):
        self.network = network
        self.of_ranks = of_ranks

    @functools.cached_property
    def whole(self) -> dict[str, list[tuple]]:
        parts: dict[str, list[tuple]] = {}
        for gradients in self.of_ranks:
            for key, index, gradient in gradients:
                parts.setdefault(key, []).append((index, gradient))
        return parts

    def read(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        out = torch.full(param.shape, torch.nan)
        for own, gradient in self.whole[layer_key(param)]:
            place = tuple(torch.from_numpy(i) for i in np.ix_(*own))
            assert out[place].isnan().all() or close(gradient, out[place]), param
            out[place] = gradient
        return out[tuple(torch.from_numpy(i) for i in np.ix_(*index))]


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two tensors are equal, relative to the largest value."""
    return (a - b).abs().max().item() <= tolerance * max(b.abs().max().item(), 1e-12)
