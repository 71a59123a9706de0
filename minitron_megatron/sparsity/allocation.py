"""Gives every layer a share of zeros of its own: the smaller, the more its zeros change what the network predicts.

One layer at a time is made sparse, and the predictions tell what that costs; how the cost grows with the share is
measured on the layer's own outputs. Costs of layers all but add up, so the shares are those of the smallest sum.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model
from torch import Tensor

from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.distillation.logit_change import MEASURES, compare_outputs
from minitron_megatron.model.axes import Param
from minitron_megatron.model.parameters import parameters
from minitron_megatron.model.torch_modules import normalize
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.schedule import PADDING, SAMPLE_IDS
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.progress import progress
from minitron_megatron.sparsity.layer_stream import LayerStream, OneLayer
from minitron_megatron.sparsity.patterns import Unstructured

SAMPLES = 4
"""Sequences that costs are measured on, each a micro-batch of its own."""

# No layer's share is further than this from that of all, and so many steps are between the two.
_REACH, _STEPS = 0.2, 4


def levels(sparsity: float) -> list[float]:
    """Returns the shares of zeros that costs are measured at, ascending; that of all is in the middle."""
    reach = min(_REACH, sparsity, 1 - sparsity)
    return [sparsity + reach * step / _STEPS for step in range(-_STEPS, _STEPS + 1)]


def layer_costs(stream: LayerStream, chosen: Sequence[Param], sparsity: float, ctx: ParallelContext) -> Tensor:
    """Measures what the zeros of each layer cost where no other layer has any. Collective.

    Args:
        stream: of `SAMPLES` samples, before the first layer; it is used up.
        chosen: matrices to make sparse, by the products of weights and norms of inputs (Wanda, 2306.11695).
        sparsity: share of zeros of all.
        ctx: this rank's place.

    Returns:
        for each layer and each of `levels` the KL divergence from the dense network's predictions, the mean over
        tokens: `[layers, levels]` in float64. The same to the bit for any number of ranks.
    """
    count, shares = len(stream.source.network.layers), levels(sparsity)
    own_changes = torch.zeros(count, len(shares), dtype=torch.float64)
    variants: list[Tensor] = []
    with watchdog(ctx.timeout_min) as heartbeat, progress("allocate", count) as advance:
        for number in range(count):
            model = stream.load(number)
            before, weights = stream.states, stream.weights(model, number)
            weights = {p.name: weights[p.name] for p in chosen if p.layer == number}
            dense, norms = _run_dense(stream, model, number, weights, ctx)
            for variant in variants:
                stream.states = variant
                stream.run(model, advance=True, after_batch=heartbeat)
            whole = {name: weight.clone() for name, weight in weights.items()}
            for place, share in enumerate(shares):
                for name, weight in weights.items():
                    scores = whole[name].float().abs() * norms[name]
                    weight.copy_(whole[name] * Unstructured(share).mask(scores))
                sparse = torch.stack([output.cpu() for output in stream.outputs(model, before)])
                own_changes[number, place] = _change(stream, sparse, dense, ctx)
                if place == _STEPS:
                    variants.append(sparse)
                heartbeat()
            stream.states = dense
            advance(1)
    growth = own_changes / own_changes[:, _STEPS : _STEPS + 1].clamp(min=torch.finfo(torch.float64).tiny)
    return _divergences(stream, model, variants, ctx)[:, None] * growth


def allocate(costs: Mapping[int, Sequence[float]], sizes: Mapping[int, int], sparsity: float) -> dict[int, float]:
    """Returns the share of zeros of each layer for which the sum of their costs is smallest.

    Between two levels a cost is taken as linear, and where it does not grow ever faster as its convex hull. Then the
    next zeros belong where they cost least.

    Args:
        costs: of each layer, at each of `levels`.
        sizes: number of weights of each layer.
        sparsity: share of zeros of all weights.
    """
    shares = levels(sparsity)
    segments = []
    for layer, own in costs.items():
        hull: list[tuple[float, float]] = []
        for point in zip(shares, own, strict=True):
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], point):
                hull.pop()
            hull.append(point)
        segments += [(_slope(a, b) / sizes[layer], layer, b[0] - a[0]) for a, b in itertools.pairwise(hull)]
    found = dict.fromkeys(costs, shares[0])
    left = (sparsity - shares[0]) * sum(sizes[layer] for layer in costs)
    for _, layer, width in sorted(segments):
        step = min(width, left / sizes[layer])
        found[layer] += step
        left -= step * sizes[layer]
    return found


def _slope(a: tuple[float, float], b: tuple[float, float]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0])


def _run_dense(
    stream: LayerStream, model: torch.nn.Module, number: int, weights: Mapping[str, Tensor], ctx: ParallelContext
) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns a layer's outputs, and the norms of the inputs of its matrices, by name, over all ranks."""
    squares: dict[str, list[Tensor]] = {name: [] for name in weights}

    def take(param: Param, x: Tensor) -> None:
        if param.name in squares:
            squares[param.name].append(x.float().square().sum(0))

    with stream.inputs(model, OneLayer(stream.source, number).network, take):
        outputs = torch.stack([output.cpu() for output in stream.outputs(model, stream.states)])
    return outputs, {name: _total(torch.stack(own), ctx).sqrt() for name, own in squares.items()}


def _divergences(
    stream: LayerStream, model: torch.nn.Module, variants: Sequence[Tensor], ctx: ParallelContext
) -> Tensor:
    """Returns the KL divergence of predictions from several last hidden states, the mean over the tokens of all ranks.

    Args:
        stream: after the last layer of the dense network.
        model: of it, which knows the kind of norm.
        variants: hidden states of the same form.
        ctx: this rank's place.
    """
    source, config = stream.source, unwrap_model(model).config
    norm, weight = _head(source)
    norm = {name: value.to(ctx.device) for name, value in norm.items()}
    weight = weight.to(ctx.device, stream.states.dtype)
    sums = []
    for number, batch in enumerate(stream.batches):
        is_row = (batch[SAMPLE_IDS] != PADDING).expand(stream.states.shape[1], -1).flatten().to(ctx.device)
        hiddens = [
            normalize(states[number].to(ctx.device), norm["weight"], norm.get("bias"), config).flatten(0, 1)
            for states in (stream.states, *variants)
        ]
        labels = torch.zeros_like(is_row, dtype=torch.long)
        found = compare_outputs(hiddens, weight, labels, is_row, ctx.collection.tp, source.network.vocab_size)
        kl = found[1:, MEASURES.index("kl")].double().sum(1)
        sums.append(torch.cat([kl, is_row.double().sum()[None]]))
    total = _total(torch.stack(sums), ctx).cpu()
    return total[:-1] / total[-1]


def _head(source: TensorSource) -> tuple[dict[str, Tensor], Tensor]:
    """Returns weight and bias of a network's final norm, and its output weight `[vocab, hidden]`."""
    embedding, *others = (param for param in parameters(source.network) if param.position is None)
    vectors, matrices = ([p for p in others if len(p.dims) == number] for number in (1, 2))

    def read(param: Param) -> Tensor:
        return source.read(param, [np.arange(size) for size in param.shape])

    return {p.name.rpartition(".")[2]: read(p) for p in vectors}, read(*matrices or [embedding])


def _change(stream: LayerStream, states: Tensor, before: Tensor, ctx: ParallelContext) -> Tensor:
    """Returns the squared change of hidden states as a share of their squares, the mean over tokens of all ranks."""
    sums = []
    for batch, own, old in zip(stream.batches, states.double(), before.double(), strict=True):
        is_row = batch[SAMPLE_IDS] != PADDING
        ratios = ((own - old).square().sum(2) / old.square().sum(2))[:, is_row]
        sums.append(torch.stack([ratios.sum(), torch.tensor(float(ratios.numel()), dtype=torch.float64)]))
    total = _total(torch.stack(sums).to(ctx.device), ctx).cpu()
    return total[0] / total[1]


def _total(parts: Tensor, ctx: ParallelContext) -> Tensor:
    """Returns the sum over the micro-batches of all ranks, `[...]` of `[batches, ...]`, in one order for any number."""
    group = ctx.collection.dp
    every = [torch.empty_like(parts) for _ in range(group.size())]
    dist.all_gather(every, parts.contiguous(), group=group)
    return torch.stack(every, 1).flatten(0, 1)[:SAMPLES].sum(0)
