"""Computes the norms of the weights of every element of every axis, from a model in any layout."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from minitron_megatron.checkpoint.load import local_parameters
from minitron_megatron.model.axes import HIDDEN, VOCAB, Param
from minitron_megatron.model.layers import PrunableAxis
from minitron_megatron.model.network import Network
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.pruning.activation_stats import ElementSpans


def squared_weights(
    model_chunks: Sequence[torch.nn.Module], network: Network, ctx: ParallelContext, outgoing: bool
) -> dict[str, Tensor]:
    """Sums the squares of the weights of every element. Collective; the same on every rank.

    Args:
        model_chunks: this rank's model.
        network: the whole network.
        ctx: this rank's place.
        outgoing: only weights that read the element's activation, not those that produce it.

    Returns:
        by setting, `[total]` in float64 on the CPU (see `ElementSpans`). The last place of `hidden` includes embedding
        and output projection.
    """
    layout = ElementSpans(network)
    spans = {setting: layout.spans(setting) for setting in layout.totals}
    squares = {
        setting: torch.zeros(total, dtype=torch.float64, device=ctx.device) for setting, total in layout.totals.items()
    }
    for chunk in model_chunks:
        for parameter, param, index in local_parameters(chunk, network, ctx):
            # Every weight counts on one rank only. A tied embedding has a copy on the last stage.
            is_copy = param.is_embedding and not chunk.pre_process
            if is_copy or ctx.data_rank > 0 or (param.split is None and ctx.tensor_rank > 0):
                continue
            own = parameter.detach().double().square()
            if param.split == VOCAB.name:  # ignore rows that pad the vocabulary
                own[torch.from_numpy(index[0] >= network.vocab_size)] = 0
            for dim in _reading_dims(param, network) if outgoing else range(len(param.dims)):
                sums = own.movedim(dim, 0).reshape(own.size(dim), -1).sum(1)
                for setting, place, labels in _labels(param, dim, index[dim], network):
                    labels = torch.from_numpy(labels).to(sums.device)
                    belongs = labels >= 0
                    squares[setting][spans[setting][place]].index_add_(0, labels[belongs], sums[belongs])
    collection = ctx.collection
    for value in squares.values():
        for group in (collection.tp, collection.pp, collection.dp):
            sum_over(value, group)
    return {setting: value.cpu() for setting, value in squares.items()}


def _reading_dims(param: Param, network: Network) -> list[int]:
    """Returns the dimension, if any, along which a parameter multiplies activations."""
    return [len(param.dims) - 1] if param.matmul or (network.tie_embeddings and param.is_embedding) else []


def _labels(param: Param, dim: int, index: np.ndarray, network: Network) -> list[tuple[str, int, np.ndarray]]:
    """Maps positions of a dimension to elements, -1 for none, for every axis with any of them there.

    Returns:
        setting of the axis, place (see `ElementSpans`), and the labels.
    """
    final = len(network.sublayers)
    labels = param.dims[dim].labels(HIDDEN.name, param.sizes)[index]
    labelled = [(HIDDEN.name, final if param.position is None else param.position, labels)]
    if param.position is not None:
        kind = network.sublayers[param.position]
        labelled += [(axis.setting, param.position, _all_labels(param, dim, axis)[index]) for axis in kind.scored()]
    return [one for one in labelled if (one[2] >= 0).any()]


def _all_labels(param: Param, dim: int, axis: PrunableAxis) -> np.ndarray:
    """Maps every position of a dimension to an element of an axis, counted over all elements of its outer axis."""
    labels = param.dims[dim].labels(axis.axis.name, param.sizes)
    if axis.axis.within is None:
        return labels
    outer = param.dims[dim].labels(axis.axis.within, param.sizes)
    return np.where(labels >= 0, outer * param.sizes[axis.axis.name] + labels, -1)
