"""Every gradient of a network, put together from the parts that the ranks of a layout hold."""

import functools

import numpy as np
import torch

from minitron_megatron.checkpoint.load import local_parameters
from minitron_megatron.model.axes import axis_sizes


def local_gradients(chunks, shape, groups) -> list:
    """The gradients of this rank's chunks, each with its key, its layer, and where in the whole tensor it lies."""
    return [
        (param.stacked_key, layer, index, parameter.main_grad.detach().cpu().clone())
        for chunk in chunks
        for parameter, param, layer, index in local_parameters(chunk, shape, groups)
    ]


class Gradients:
    """The gradients of all ranks as a source of tensors, as `read_hf_tensor` takes one; copies must agree."""

    dtype = torch.float32

    def __init__(self, shape, of_ranks):
        self.shape = shape
        self.of_ranks = of_ranks

    @functools.cached_property
    def whole(self) -> dict:
        found = {}
        for gradients in self.of_ranks:
            for key, layer, index, gradient in gradients:
                found.setdefault((key, layer), []).append((index, gradient))
        return found

    def read(self, param, layer, index):
        out = torch.full(param.size(axis_sizes(self.shape)), torch.nan)
        for own, gradient in self.whole[param.stacked_key, layer]:
            place = tuple(torch.from_numpy(i) for i in np.ix_(*own))
            assert out[place].isnan().all() or close(gradient, out[place]), param
            out[place] = gradient
        return out[tuple(torch.from_numpy(i) for i in np.ix_(*index))]


def close(a, b, tolerance=1e-5) -> bool:
    """Whether two tensors are equal, relative to the largest value."""
    return (a - b).abs().max().item() <= tolerance * max(b.abs().max().item(), 1e-12)
