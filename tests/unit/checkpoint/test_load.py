"""That every weight of a model is known to have been loaded."""

import pytest
import torch

from minitron_megatron.checkpoint import load
from minitron_megatron.checkpoint.load import load_weights, local_parameters
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.schema import DType, ParallelConfig
from minitron_megatron.errors import CheckpointError, UnsupportedModelError
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.parallel.context import parallel_context
from tests.tiny import LLAMA, without_sublayers

NETWORK = network_from_config(LLAMA)


class Damaged(RandomWeights):
    """Weights of which one is no number."""

    root = "some/checkpoint"

    def read(self, param, index):
        weight = super().read(param, index)
        if param.name == "mlp.linear_fc2.weight" and param.layer == 2:
            weight[3, 4] = torch.nan
        return weight


@pytest.fixture
def model():
    with parallel_context(ParallelConfig()) as ctx:
        [model] = build_model(NETWORK, ctx, DType.FP32)
        model.ctx = ctx
        yield model


def test_parameters_that_the_network_does_not_have_are_listed(model):
    model.decoder.gate = torch.nn.Parameter(torch.zeros(3))
    other = without_sublayers(NETWORK, 6, 7)
    with pytest.raises(UnsupportedModelError) as raised:
        list(local_parameters(model, other, model.ctx))
    listed = str(raised.value).partition(": ")[2].split(", ")
    assert "decoder.gate" in listed and all(name == "decoder.gate" or ".layers.3." in name for name in listed)


def test_a_weight_that_is_no_number_is_named(model):
    expected = "some/checkpoint leaves NaN in weights: decoder.layers.2.mlp.linear_fc2.weight"
    with pytest.raises(CheckpointError, match=f"{expected}$"):
        load_weights([model], Damaged(NETWORK, 1), model.ctx)


def test_a_weight_that_nobody_loads_is_named(model, monkeypatch):
    def all_but_one(*arguments):
        return [found for found in local_parameters(*arguments) if found[1].name != "decoder.final_layernorm.weight"]

    monkeypatch.setattr(load, "local_parameters", all_but_one)
    with pytest.raises(CheckpointError, match="leaves NaN in weights: decoder.final_layernorm.weight$"):
        load_weights([model], RandomWeights(NETWORK, 1), model.ctx)


def test_a_source_cannot_fill_a_weight_with_less_than_it_has(model):
    class Small(RandomWeights):
        def read(self, param, index):
            return super().read(param, index)[:1]

    with pytest.raises(AssertionError):
        load_weights([model], Small(NETWORK, 1), model.ctx)
