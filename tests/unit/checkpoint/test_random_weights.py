"""Random weights against those with which Megatron-Core starts a model by itself."""

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoint.load import local_parameters
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.schema import DType, ParallelConfig
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.parameters import parameters
from minitron_megatron.parallel.context import parallel_context
from tests.tiny import FAMILIES


@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_they_are_distributed_as_megatrons(config):
    sizes = dict(hidden_size=96, intermediate_size=200, vocab_size=1000)
    network = network_from_config({**config, **sizes})
    weights = RandomWeights(network, seed=1)
    with parallel_context(ParallelConfig()) as ctx:
        [model] = build_model(network, ctx, DType.FP32)
        for theirs, param, index in local_parameters(model, network, ctx):
            ours = weights.read(param, index)
            assert ours.shape == theirs.shape
            if theirs.dim() == 1:
                assert torch.equal(ours, theirs), param.name
                continue
            if param.split == "vocab":
                assert not ours[network.vocab_size :].any()
                ours = ours[: network.vocab_size]
            assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05), param.name
            assert abs(ours.mean().item()) < 0.05 * ours.std().item()


def test_every_parameter_layer_and_seed_has_its_own():
    network = network_from_config(FAMILIES["llama"])
    matrices = [param for param in parameters(network) if len(param.dims) == 2]
    firsts = set()
    for seed in (1, 2):
        for param in matrices:
            index = [np.arange(n) for n in param.shape]
            firsts.add(RandomWeights(network, seed).read(param, index)[0, 0].item())
            again = RandomWeights(network, seed).read(param, index)[0, 0].item()
            assert again in firsts
    assert len(firsts) == 2 * (4 * len(network.layers) + 2)
