"""Shares of zeros by layer: costs as transformers has them, and the smallest sum as a linear program finds it."""

import numpy as np
import pytest
import torch
from scipy.optimize import linprog

from minitron_megatron.checkpoint.companions import matrices
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.schema import DType, ParallelConfig
from minitron_megatron.data.samples import rank_batches
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.sparsity.allocation import SAMPLES, allocate, layer_costs, levels
from minitron_megatron.sparsity.layer_stream import LayerStream
from tests.in_memory import as_transformers_model
from tests.tiny import LLAMA, hf_model, import_hf, literate

LENGTH = 24


class Tokens:
    """Random sequences, as samples."""

    tokens = torch.randint(0, LLAMA["vocab_size"], (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        rows = {"loss_mask": torch.ones(LENGTH), "position_ids": torch.arange(LENGTH)}
        return {"tokens": self.tokens[index], **rows}


def test_a_layers_cost_is_the_divergence_of_transformers_predictions(tmp_path):
    checkpoint = Checkpoint(import_hf(tmp_path, literate(hf_model(**LLAMA))))
    with parallel_context(ParallelConfig()) as ctx:
        batches = list(rank_batches(Tokens(), 0, SAMPLES, 1, 0, 1))
        stream = LayerStream(checkpoint, batches, ctx, DType.FP32)
        costs = layer_costs(stream, list(matrices(checkpoint.network)), 0.5, ctx)
    model = as_transformers_model(checkpoint)
    norms = {}

    def keep(module, args):
        norms.setdefault(module, args[0].flatten(0, 1).norm(dim=0))  # of the dense model, which runs first

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(keep)
    with torch.no_grad():
        dense = model(Tokens.tokens).logits.log_softmax(-1)
        for number, layer in enumerate(model.model.layers):
            linears = [module for module in layer.modules() if isinstance(module, torch.nn.Linear)]
            whole = [linear.weight.clone() for linear in linears]
            for linear in linears:
                scores = linear.weight.abs() * norms[linear]
                dropped = scores.argsort(dim=1, stable=True)[:, : scores.shape[1] // 2]
                linear.weight.scatter_(1, dropped, 0)
            sparse = model(Tokens.tokens).logits.log_softmax(-1)
            divergence = (dense.exp() * (dense - sparse)).sum(-1).mean()
            assert costs[number, len(levels(0.5)) // 2] == pytest.approx(float(divergence), rel=1e-3), number
            for linear, weight in zip(linears, whole, strict=True):
                linear.weight.copy_(weight)
    assert (costs.diff(dim=1) > 0).all()  # more zeros cost more


@pytest.mark.parametrize("seed", range(5))
def test_shares_are_those_of_a_linear_program(seed):
    """Of convex costs: the least sum of variables that are above every piece of their cost, and as many zeros."""
    draw, sparsity, count = np.random.default_rng(seed), 0.45, 6
    shares = np.array(levels(sparsity))
    pieces = len(shares) - 1
    slopes = np.sort(draw.random((count, pieces)), axis=1)
    costs = np.cumsum(np.concatenate([draw.random((count, 1)), slopes * np.diff(shares)], axis=1), axis=1)
    sizes = draw.integers(100, 1000, count)
    # Variables are the shares, and then the costs.
    rows, bounds = [], []
    for layer in range(count):
        for piece in range(pieces):
            row = np.zeros(2 * count)
            row[layer], row[count + layer] = slopes[layer, piece], -1
            rows.append(row)
            bounds.append(slopes[layer, piece] * shares[piece] - costs[layer, piece])
    best = linprog(
        [0] * count + [1] * count,
        A_ub=rows,
        b_ub=bounds,
        A_eq=[[*sizes, *([0] * count)]],
        b_eq=[sparsity * sizes.sum()],
        bounds=[(shares[0], shares[-1])] * count + [(0, None)] * count,
    )
    found = allocate(dict(enumerate(costs.tolist())), dict(enumerate(sizes.tolist())), sparsity)
    assert list(found.values()) == pytest.approx(best.x[:count])
    assert np.dot(list(found.values()), sizes) == pytest.approx(sparsity * sizes.sum())
