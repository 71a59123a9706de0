"""From scores to what stays."""

import json

import pytest
import torch

from minitron_megatron.checkpoint.manifest import Manifest
from minitron_megatron.config.schema import TargetConfig
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.model.families import shape_from_config
from minitron_megatron.pruning.plan import Plan, make_plan
from minitron_megatron.pruning.scores import WIDTH, Scores
from tests.tiny import LLAMA

SHAPE = shape_from_config(LLAMA)  # 4 layers, hidden 48, ffn 44, 2 groups of 3 heads


def random_scores(seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(48,), (4, 44), (4, 2, 3), (4,)]
    *width, depth = (torch.rand(*size, generator=generator, dtype=torch.float64) for size in sizes)
    return Scores(SHAPE, *width, {"loss": depth})


def plan_for(scores, **target):
    return make_plan(scores, TargetConfig(**target))


def test_the_top_elements_stay_in_ascending_order():
    scores = random_scores()
    plan = plan_for(scores, layers=3, hidden=40, ffn=30, heads=4)
    dropped = int(scores.depth["loss"].argmin())
    layers = [layer for layer in range(4) if layer != dropped]
    assert plan.sublayers == [position for layer in layers for position in (2 * layer, 2 * layer + 1)]
    assert plan.hidden == sorted(scores.hidden.topk(40).indices.tolist())
    assert list(plan.ffn) == [2 * layer + 1 for layer in layers]
    assert list(plan.head) == [2 * layer for layer in layers]
    for layer in layers:
        assert plan.ffn[2 * layer + 1] == sorted(scores.ffn[layer].topk(30).indices.tolist())
        for group in range(2):
            assert plan.head[2 * layer][group] == sorted(scores.head[layer, group].topk(2).indices.tolist())


def test_heads_compete_within_their_group_alone():
    scores = random_scores()
    scores.head[:, 0] += 10  # every head of one group before every head of the other
    plan = plan_for(scores, heads=4)
    assert all(len(group) == 2 for groups in plan.head.values() for group in groups)


def test_of_equal_scores_the_lower_index_stays():
    scores = random_scores()
    for values in (scores.hidden, scores.ffn, scores.head, scores.depth["loss"]):
        values.fill_(0.5)
    scores.hidden[47] = 0.6
    plan = plan_for(scores, layers=2, hidden=3, ffn=2, heads=2)
    assert plan.sublayers == [0, 1, 2, 3] and plan.hidden == [0, 1, 47]
    assert plan.ffn == {1: [0, 1], 3: [0, 1]} and plan.head == {0: [[0], [0]], 2: [[0], [0]]}


def test_what_is_not_asked_for_stays_whole():
    plan = plan_for(random_scores(), ffn=20)
    assert plan.target == SHAPE.replace(ffn=20)
    assert plan.sublayers == list(range(8)) and plan.hidden == list(range(48))
    assert set(map(str, plan.head.values())) == {str([[0, 1, 2], [0, 1, 2]])}


def test_a_plan_says_where_the_layers_of_the_target_come_from():
    scores = random_scores()
    scores.depth["loss"][:] = torch.tensor([3.0, 1.0, 2.0, 4.0])
    plan = plan_for(scores, layers=3)
    assert [plan.source_layer(symbol, layer) for symbol in "*-" for layer in range(3)] == [0, 2, 3] * 2
    assert plan.kept("-", 1)["ffn"].tolist() == plan.ffn[5]
    assert plan.kept("*", 1)["head"].tolist() == plan.head[4]
    assert set(plan.kept(None, None)) == {"hidden"}


def test_a_plan_survives_its_file(tmp_path):
    plan = plan_for(random_scores(), layers=3, hidden=40, ffn=30, heads=4)
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan


@pytest.mark.parametrize("text", [None, "{", "[]", "{}", json.dumps({"source": SHAPE.to_dict(), "kept": 3})])
def test_a_file_that_is_no_plan_is_named(text, tmp_path):
    if text is not None:
        (tmp_path / "plan.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"plan\.json is not a plan"):
        Plan.read(tmp_path)


def test_scores_survive_their_file(tmp_path):
    scores = random_scores()
    scores.settings = {"num_samples": 7}
    scores.write(tmp_path)
    Manifest("scores").write(tmp_path)
    found = Scores.read(tmp_path)
    assert (found.shape, found.settings) == (SHAPE, {"num_samples": 7})
    assert all(torch.equal(getattr(found, name), getattr(scores, name)) for name in WIDTH)


def test_scores_that_are_not_whole_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not the finished output of `score`: it has no manifest.json"):
        Scores.read(tmp_path)
    Manifest("scores").write(tmp_path)
    with pytest.raises(CheckpointError, match="scores.safetensors is not whole"):
        Scores.read(tmp_path)
    random_scores().write(tmp_path)
    file = tmp_path / "scores.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="scores.safetensors is not whole"):
        Scores.read(tmp_path)


def test_targets_that_cannot_be_are_all_listed():
    with pytest.raises(ConfigError) as raised:
        plan_for(random_scores(), layers=5, hidden=49, ffn=45, heads=7)
    larger = "is larger than the source's"
    assert raised.value.problems == [
        f"target.hidden = 49 {larger} 48: pruning only removes",
        f"target.ffn = 45 {larger} 44: pruning only removes",
        f"target.heads = 7 {larger} 6: pruning only removes",
        "target.heads = 7 is not a multiple of the 2 query groups: every group keeps the same number of heads",
        f"target.layers = 5 {larger} 4: pruning only removes",
    ]
