"""Scores and plans of earlier versions, which knew networks of equal layers alone, are still read."""

import json

import pytest
import torch
from safetensors.torch import save_file

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.config.schema import TargetConfig, Unit
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP
from minitron_megatron.model.network import Network, transformer
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import DepthSettings, Scores

SHAPE = {
    "pattern": "*-*-",
    "hidden": 12,
    "ffn": 10,
    "num_heads": 4,
    "num_query_groups": 2,
    "head_dim": 4,
    "vocab": 101,
    "padded_vocab": 128,
    "max_positions": 2048,
    "norm": "rmsnorm",
    "norm_eps": 1e-05,
    "norm_zero_centered": False,
    "activation": "silu",
    "gated": True,
    "qkv_bias": True,
    "linear_bias": True,
    "qk_norm": False,
    "rotary_base": 10000.0,
    "rotary_fraction": 1.0,
    "rotary_scaling": None,
    "tied": True,
}
# As it was written for the scores below and the target of the test.
PLAN = """{
"checkpoint": "f",
"source": SHAPE,
"hidden": "1-2,4,6-9,11",
"sublayers": [
  {"position": 1, "kind": "-", "layer": 0, "ffn": "0,2-3,6,9"},
  {"position": 2, "kind": "*", "layer": 1, "groups": "1", "heads": ["1"], "merge": [[0]]},
  {"position": 3, "kind": "-", "layer": 1, "ffn": "1,4-5,7-8"}
]
}
"""
ATTENTION, FEED_FORWARD = Attention(4, 2, 4, bias=True, qkv_bias=True), MLP(10, bias=True)
NETWORK = Network(transformer(2, [ATTENTION, FEED_FORWARD]), 12, 101, 128, tie_embeddings=True)


@pytest.fixture
def file(tmp_path):
    (tmp_path / "plan.json").write_text(PLAN.replace("SHAPE", json.dumps(SHAPE)))
    return tmp_path / "plan.json"


@pytest.fixture
def scores(tmp_path):
    """Their folder."""

    def ones(*size):
        return torch.ones(*size, dtype=torch.int64)

    tensors = {
        "hidden": torch.arange(12).double() * 5 % 12,
        "ffn": torch.tensor([[n * step % 10 for n in range(10)] for step in (3, 7)], dtype=torch.float64),
        "head": torch.arange(8).double().view(2, 2, 2) * 3 % 8,
        "depth.loss": torch.tensor([1.0, 4.0, 3.0, 2.0]),
        "rounds.hidden": ones(12),
        "rounds.ffn": ones(2, 10),
        "rounds.head": ones(2, 2, 2),
        "rounds.depth": ones(4),
    }
    tensors["rounds.ffn"][0, 0] = tensors["rounds.head"][1, 1] = 2
    metadata = {
        "shape": SHAPE,
        "criteria": ["loss"],
        "depth_settings": {"unit": "sublayer", "search": "single", "drop": 1, "protect_first": 0, "protect_last": 0},
        "settings": {"num_samples": 7},
        "checkpoint": "f",
    }
    values = {name: json.dumps(value) for name, value in metadata.items()}
    save_file(tensors, tmp_path / "scores.safetensors", metadata=values)
    Manifest("scores").write(tmp_path)
    return tmp_path


def test_a_plan(file):
    elements = {1: {"ffn": [0, 2, 3, 6, 9]}, 2: {"groups": [1], "heads": [[1]]}, 3: {"ffn": [1, 4, 5, 7, 8]}}
    assert Plan.read(file) == Plan(NETWORK, [1, 2, 3], [1, 2, 4, 6, 7, 8, 9, 11], elements, {2: [[0]]}, "f")


def test_a_plan_for_what_has_lost_sublayers(file):
    """Layers were counted among the sublayers of the same kind."""
    values = json.loads(file.read_text())
    values["source"]["pattern"] = "**-"
    values["sublayers"] = [{"position": 2, "kind": "-", "layer": 0, "ffn": "0-4"}]
    file.write_text(json.dumps(values))
    found = Plan.read(file)
    assert found.source == NETWORK.replace(sublayers=(ATTENTION, ATTENTION, FEED_FORWARD))
    assert found.elements == {2: {"ffn": [0, 1, 2, 3, 4]}}


def test_scores_give_the_plan_that_they_gave(scores, file):
    found = Scores.read(scores)
    assert (found.network, found.checkpoint, found.settings) == (NETWORK, "f", {"num_samples": 7})
    assert found.depth_settings == DepthSettings(Unit.SUBLAYER)
    target = TargetConfig(hidden=8, ffn=5, groups=1, heads=1, attention=1, mlp=2)
    assert make_plan(found, target, merge_heads=True) == Plan.read(file)
