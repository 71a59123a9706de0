"""Files of earlier versions are still read. Those in tests/former were written by the last one whose networks had the
same sizes in every layer, each by the verb that makes it, from the weights and the text that lie beside them."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.config.compose import read_settings, resolve_stages, to_plain
from minitron_megatron.config.schema import (
    DataConfig,
    DepthConfig,
    DepthCriterion,
    DType,
    PruneConfig,
    ScoreConfig,
    TargetConfig,
    Unit,
)
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import layer_key, parameters
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.prune import prune
from minitron_megatron.pruning.score import score
from minitron_megatron.pruning.scores import Scores
from minitron_megatron.pruning.slicing import Pruned
from tests.in_memory import StateDict

FORMER = Path(__file__).parents[2] / "former"


def config() -> dict:
    return json.loads((FORMER / "checkpoint/huggingface/config.json").read_text())


@pytest.fixture(scope="module")
def weights() -> StateDict:
    """What was imported then."""
    return StateDict(network_from_config(config()), load_file(FORMER / "source.safetensors"))


def assert_equal(found: TensorSource, expected: TensorSource) -> None:
    assert found.network == expected.network
    for param in parameters(found.network):
        index = [np.arange(n) for n in param.shape]
        assert torch.equal(found.read(param, index), expected.read(param, index)), layer_key(param)


@pytest.mark.parametrize("where", ["manifest.json", "shape.json", "the args"])
def test_a_checkpoint(where, weights, tmp_path):
    root = shutil.copytree(FORMER / "checkpoint", tmp_path / "c")
    if where != "manifest.json":
        shape = json.loads((root / "manifest.json").read_text())["shape"]
        assert (shape["hidden"], shape["ffn"], shape["num_heads"], shape["tied"]) == (12, 10, 6, False)
        (root / "manifest.json").unlink()
        if where == "shape.json":  # as users described a network then
            (root / "release/common.pt").unlink()
            (root / "shape.json").write_text(json.dumps(shape))
    checkpoint = Checkpoint(root)
    assert_equal(checkpoint, weights)
    assert checkpoint.stacked and checkpoint.dtype is torch.float32


def test_a_field_that_there_never_was_is_named(tmp_path):
    root = shutil.copytree(FORMER / "checkpoint", tmp_path / "c")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["shape"] |= {"depth": 3}
    (root / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest.json does not describe a network: network.depth is no field"):
        Checkpoint(root)


def test_all_fields_of_a_network():
    """None of them has the value that it would have by default."""
    scaling = dict(factor=8.0, low_freq_factor=2.0, high_freq_factor=5.0, original_max_positions=128)
    former = dict(
        pattern="*-*-", hidden=12, ffn=10, num_heads=6, num_query_groups=2, head_dim=4, vocab=30, padded_vocab=128,
        max_positions=64, norm="layernorm", norm_eps=1e-6, norm_zero_centered=True, activation="squared_relu",
        gated=False, qkv_bias=True, linear_bias=True, qk_norm=True, rotary_base=5e3, rotary_fraction=0.5,
        rotary_scaling=scaling, tied=True,
    )  # fmt: skip
    assert Network.from_dict(former).to_dict() == dict(
        pattern="*-*-", hidden_size=12, vocab_size=30, padded_vocab_size=128, max_positions=64, norm="layernorm",
        norm_eps=1e-6, norm_zero_centered=True, rotary_base=5e3, rotary_fraction=0.5, rotary_scaling=scaling,
        tie_embeddings=True,
        attention=dict(num_heads=6, num_query_groups=2, head_dim=4, bias=True, qkv_bias=True, qk_norm=True),
        mlp=dict(ffn_hidden_size=10, activation="squared_relu", gated=False, bias=True),
    )  # fmt: skip
    without = {**former, "pattern": "--"}  # whose sizes of attention were those of the network that it came from
    assert Network.from_dict(without).kinds == [MLP]


def test_scores_of_several_rounds(weights):
    scores = Scores.read(FORMER / "scores")
    stored = load_file(FORMER / "scores/scores.safetensors")
    assert scores.network == weights.network
    assert torch.equal(scores.hidden, stored["hidden"]) and scores.rounds["hidden"].unique().tolist() == [1, 2]
    for name, stacked in (("ffn", "ffn"), ("heads", "head")):
        assert torch.equal(torch.stack(scores.elements[name]), stored[stacked])
        assert torch.equal(torch.stack(scores.element_rounds[name]), stored[f"rounds.{stacked}"])
    plan = make_plan(scores, TargetConfig(hidden=8, ffn=6, heads=4), merge_heads=True)
    assert plan == Plan.read(FORMER / "plan.json") and plan.merge


def test_scores_of_sublayers():
    scores = Scores.read(FORMER / "scores_of_sublayers")
    assert scores.depth_settings.unit is Unit.SUBLAYER and list(scores.depth) == ["loss", "kl"]
    plan = make_plan(scores, TargetConfig(hidden=8, ffn=6, heads=4, attention=2), depth_criterion=DepthCriterion.LOSS)
    assert plan == Plan.read(FORMER / "hybrid") and plan.target.positions(Attention) != plan.target.positions(MLP)


def test_a_checkpoint_that_has_lost_a_sublayer():
    """Each sublayer lies under its own number, as HybridModel counts them."""
    checkpoint = Checkpoint(FORMER / "hybrid")
    plan = Plan.read(FORMER / "hybrid")
    assert "decoder.final_norm.weight" in checkpoint.tensors and "decoder.layers.4.mlp.linear_fc2.weight" in (
        checkpoint.tensors
    )
    assert_equal(checkpoint, Pruned(Checkpoint(FORMER / "checkpoint"), plan))


def test_a_plan_for_a_network_that_had_lost_a_sublayer(weights, tmp_path):
    """It counts the layers of each kind by themselves. What is pruned by it is written as it is now."""
    rows = json.loads((FORMER / "plan_of_hybrid.json").read_text())["sublayers"]
    network = Checkpoint(FORMER / "hybrid").network
    assert any(row["layer"] != network.layer_of(row["position"]) for row in rows)
    output = prune(
        PruneConfig(str(FORMER / "hybrid"), str(tmp_path / "pruned"), plan=str(FORMER / "plan_of_hybrid.json"))
    )
    pruned, first, second = Checkpoint(output), Plan.read(FORMER / "hybrid"), Plan.read(FORMER / "plan_of_hybrid.json")
    assert pruned.network.hidden_size == 6 and "decoder.final_layernorm.weight" in pruned.tensors
    assert_equal(pruned, Pruned(weights, first.then(second)))


def test_what_was_made_then_is_skipped(tmp_path, monkeypatch):
    """With the same settings and inputs, whatever both are called now."""
    folder = shutil.copytree(FORMER, tmp_path / "former")
    monkeypatch.chdir(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    sizes = dict(hidden=8, ffn=6, heads=4)
    data = DataConfig(["text.jsonl"], "corpora", sequence_length=16, heldout_pct=20)
    common = dict(data=data, num_samples=4, micro_batch=2, dtype=DType.FP32)
    depth = DepthConfig([DepthCriterion.LOSS, DepthCriterion.KL], Unit.SUBLAYER)
    score(ScoreConfig("checkpoint", "scores", rounds=2, target=TargetConfig(**sizes), **common))
    score(ScoreConfig("checkpoint", "scores_of_sublayers", depth=depth, **common))
    target = TargetConfig(attention=2, **sizes)
    prune(PruneConfig("checkpoint", "hybrid", "scores_of_sublayers", target=target))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    target = TargetConfig(attention=2, hidden=8, ffn=5, heads=4)
    with pytest.raises(ConfigError, match=r"holds a result of other settings .* \(target.ffn was 6 and is 5\)"):
        prune(PruneConfig("checkpoint", "hybrid", "scores_of_sublayers", target=target))


def test_a_recipe():
    """Every setting of every stage is what it was, so that what is done is skipped."""
    stages = resolve_stages(read_settings("compress", FORMER / "recipe.yaml"))
    former = json.loads((FORMER / "stages.json").read_text())
    assert list(stages) == list(former)
    for name, (verb, settings) in stages.items():
        assert verb == former[name][0]
        before, after = (Manifest("run", config=values, verb=verb) for values in (former[name][1], to_plain(settings)))
        assert before.changes(after) == [], name
        assert settings.output == former[name][1]["output"]
    settings = stages["pruned"][1]
    assert settings.target == TargetConfig(layers=3, hidden=8, ffn=0.5, heads=4)
    assert (settings.merge_heads, settings.parallel.tensor, stages["scores"][1].rounds) == (True, 2, 2)
