"""Norms of the weights that go with every channel, neuron and head, from a model on any layout."""

from collections.abc import Sequence

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from minitron_megatron.checkpoint.load import local_parameters
from minitron_megatron.model.axes import Dim, Param, axis_sizes
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.groups import Groups


def squared_weights(chunks: Sequence[GPTModel], shape: ModelShape, groups: Groups, outgoing: bool) -> dict[str, Tensor]:
    """Sum of the squares of the weights that go with every element. Collective; the same on every rank.

    Args:
        chunks: this rank's model.
        shape: of the whole network.
        groups: this rank's place.
        outgoing: only the weights that multiply the element's activation, and not those that make it.

    Returns:
        in float64 on the CPU, `hidden` `[sublayer or final norm, hidden]`, where the last row also has embedding and
        output projection; `ffn` `[MLP sublayer, ffn]`; `head` `[attention sublayer, head]`.
    """
    sizes = axis_sizes(shape)
    attention, mlp = shape.sublayers(ATTENTION), shape.sublayers(MLP)
    found = {
        "hidden": torch.zeros(len(shape.pattern) + 1, shape.hidden, dtype=torch.float64, device=groups.device),
        "ffn": torch.zeros(len(mlp), shape.ffn, dtype=torch.float64, device=groups.device),
        "head": torch.zeros(len(attention), shape.num_heads, dtype=torch.float64, device=groups.device),
    }
    for chunk in chunks:
        for parameter, param, layer, index in local_parameters(chunk, shape, groups):
            # Every weight counts on one rank alone. A tied table has a copy on the last stage.
            is_copy = param.is_embedding and not chunk.pre_process
            if is_copy or groups.data_rank > 0 or (param.split is None and groups.tensor_rank > 0):
                continue
            squares = parameter.detach().double().square()
            if param.split == "vocab":  # rows that pad the vocabulary take no part
                squares[torch.from_numpy(index[0] >= shape.vocab)] = 0
            row = len(shape.pattern) if layer is None else shape.sublayers(param.sublayer)[layer]
            for axis, number in (("hidden", row), ("ffn", layer), ("head", layer)):
                for dim in _reading_dims(param, shape) if outgoing else range(len(param.dims)):
                    labels = torch.from_numpy(_labels(param.dims[dim], axis, sizes)[index[dim]]).to(squares.device)
                    if (labels >= 0).any():
                        sums = squares.movedim(dim, 0).reshape(len(labels), -1).sum(1)
                        found[axis][number].index_add_(0, labels[labels >= 0], sums[labels >= 0])
    collection = groups.collection
    for value in found.values():
        for group in (collection.tp, collection.pp, collection.dp):
            sum_over(value, group)
    return {axis: value.cpu() for axis, value in found.items()}


def _reading_dims(param: Param, shape: ModelShape) -> list[int]:
    """The dimension, if any, along which a parameter multiplies activations."""
    return [len(param.dims) - 1] if param.matmul or (shape.tied and param.is_embedding) else []


def _labels(dim: Dim, axis: str, sizes: dict[str, int]) -> np.ndarray:
    """Which element of `axis` each position of `dim` belongs to, -1 where to none; heads count over all groups."""
    labels = dim.labels(axis, sizes)
    if axis == "head":
        return np.where(labels >= 0, dim.labels("group", sizes) * sizes["head"] + labels, -1)
    return labels
