"""Scoring in rounds: what scoring, pruning and scoring again by hand gives, in any layout."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.schema import DataConfig, DepthConfig, ParallelConfig, PruneConfig, TargetConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.model.network import layout_problems
from minitron_megatron.model.parameters import parameters
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.prune import prune
from minitron_megatron.pruning.score import _round_target, score
from minitron_megatron.pruning.scores import Scores
from tests.ranks import run_on_ranks
from tests.tiny import changed
from tests.unit.pruning.direct import assert_same, by_axis, rounds_by_axis


def laid_over(whole: Scores, parts: list[tuple[Plan, Scores]]) -> Scores:
    """Scores of the whole, and on top of them, one after another, those of what plans left of it."""
    ffn, heads = whole.elements["ffn"], whole.elements["heads"]
    rounds = {"hidden": torch.ones(48, dtype=torch.int64), "depth": torch.ones(4, dtype=torch.int64)}
    of_elements = {"ffn": [torch.ones(44, dtype=torch.int64) for _ in range(4)]}
    of_elements["heads"] = [torch.ones(2, 3, dtype=torch.int64) for _ in range(4)]
    for number, (plan, part) in enumerate(parts, start=2):
        for i, channel in enumerate(plan.hidden):
            whole.hidden[channel] = part.hidden[i]
            rounds["hidden"][channel] = number
        for new, old in enumerate(p // 2 for p in plan.sublayers[::2]):
            whole.depth["block_influence"][old] = part.depth["block_influence"][new]
            rounds["depth"][old] = number
            attention, mlp = plan.elements[2 * old], plan.elements[2 * old + 1]
            for i, neuron in enumerate(mlp["ffn"]):
                ffn[old][neuron] = part.elements["ffn"][new][i]
                of_elements["ffn"][old][neuron] = number
            for g, group in enumerate(attention["groups"]):
                for h, head in enumerate(attention["heads"][g]):
                    heads[old][group, head] = part.elements["heads"][new][g, h]
                    of_elements["heads"][old][group, head] = number
    whole.rounds, whole.element_rounds = rounds, of_elements
    return whole


@pytest.mark.parametrize(
    "target, ways",
    [
        (
            dict(layers=2, hidden=40, ffn=36, heads=2),
            [dict(layers=3, hidden=44, ffn=40, heads=4)],
        ),
        (
            dict(layers=1, hidden=42, ffn=38, groups=1),
            [dict(layers=3, hidden=46, ffn=42), dict(layers=2, hidden=44, ffn=40, groups=1)],
        ),
        (
            dict(hidden=40, ffn=[36, 40, 44, 30], heads=[2, 4, 6, 4]),
            [dict(hidden=44, ffn=[40, 40, 44, 36], heads=[4, 4, 6, 4])],
        ),
        # Layers that are named go at once, whatever their scores.
        (dict(keep_layers=[1, 2], hidden=40), [dict(keep_layers=[1, 2], hidden=44)]),
    ],
    ids=["two", "three", "two, sizes by layer", "two, named layers"],
)
def test_rounds_are_scoring_pruning_and_scoring_by_hand(settings, tmp_path, target, ways):
    depth = DepthConfig(protect_first=0, protect_last=0)
    rounds = len(ways) + 1
    found = Scores.read(score(settings(depth=depth, rounds=rounds, save_rounds=True, target=TargetConfig(**target))))

    checkpoint = settings().checkpoint
    first = whole = Scores.read(score(settings("scores_1", depth=depth)))
    so_far, parts = None, []
    for number, way in enumerate(ways, start=1):
        output, scores = tmp_path / f"by_hand_{number}", str(tmp_path / f"scores_{number}")
        prune(PruneConfig(checkpoint, str(output), scores, target=TargetConfig(**way)))
        step = Plan.read(output)
        so_far = so_far.then(step) if so_far else step
        between = Checkpoint(tmp_path / f"scores.round_{number}")
        assert between.network == Checkpoint(output).network
        index = [np.arange(128), np.arange(0, between.network.hidden_size, 3)]
        param = parameters(between.network)[0]
        assert torch.equal(between.read(param, index), Checkpoint(output).read(param, index))
        checkpoint = str(output)
        parts.append((so_far, Scores.read(score(settings(f"scores_{number + 1}", depth=depth, checkpoint=checkpoint)))))
    last = replace(parts[-1][1])
    expected = laid_over(whole, parts)
    torch.testing.assert_close(by_axis(found), by_axis(expected), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(rounds_by_axis(found), rounds_by_axis(expected), rtol=0, atol=0)
    torch.testing.assert_close(found.depth, expected.depth, rtol=1e-6, atol=1e-8)
    assert torch.equal(found.rounds["depth"], expected.rounds["depth"])
    assert found.settings["rounds"] == rounds and found.checkpoint == first.checkpoint

    final = dict(target)
    if final.pop("keep_layers", None):
        final["layers"] = 2
    plan, by_hand = make_plan(found, TargetConfig(**target)), so_far.then(make_plan(last, TargetConfig(**final)))
    assert replace(plan, checkpoint=None) == replace(by_hand, checkpoint=None)


def test_rounds_on_several_ranks_are_those_of_one(settings, tmp_path):
    wanted = dict(rounds=2, save_rounds=True, target=TargetConfig(layers=2, hidden=40, ffn=36))
    expected = Scores.read(score(settings("one", **wanted)))
    split = settings("many", **wanted, parallel=ParallelConfig(tensor=2, pipeline=2))
    run_on_ranks(4, score, split)
    found = Scores.read(tmp_path / "many")
    assert_same(found, expected, 1e-6)
    assert rounds_by_axis(found)["ffn"].unique().tolist() == [1, 2]
    one, many = (Checkpoint(tmp_path / f"{name}.round_1") for name in ("one", "many"))
    assert one.network == many.network != Checkpoint(split.checkpoint).network
    param = parameters(one.network)[0]
    index = [np.arange(size) for size in param.shape]
    assert torch.equal(one.read(param, index), many.read(param, index))


def test_a_round_of_another_text_is_not_taken_for_this_one(inputs, settings, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_bytes((inputs / "text.jsonl").read_bytes())
    config = settings(
        rounds=2,
        save_rounds=True,
        target=TargetConfig(ffn=36),
        data=DataConfig([str(text)], str(tmp_path / "corpora"), 16),
    )
    score(config)
    shutil.rmtree(tmp_path / "scores")
    text.write_text("".join(sorted(text.read_text().splitlines(keepends=True))))
    with pytest.raises(ConfigError, match="scores.round_1 holds a result of other settings or inputs"):
        score(config)


def test_a_target_that_a_round_cannot_reach_is_named_before_any_work(settings, tmp_path):
    wanted = dict(rounds=3, target=TargetConfig(layers=1), parallel=ParallelConfig(pipeline=3))
    with pytest.raises(ConfigError, match="what round 2 leaves"):
        score(settings(**wanted))
    assert list(tmp_path.iterdir()) == []


def test_rounds_go_the_same_way_in_any_layout(settings):
    """Two tensor ranks divide 44 and 38 neurons, and not all numbers between them; four share two groups of heads."""
    target = TargetConfig(layers=3, hidden=41, ffn=38, heads=4)
    config = settings("one", rounds=3, target=target)
    checkpoint = Checkpoint(config.checkpoint)

    def sizes(config, checkpoint, tensor):
        split = replace(config, parallel=ParallelConfig(tensor=tensor))
        return [_round_target(split, checkpoint, number) for number in range(1, config.rounds)]

    targets = sizes(config, checkpoint, 1)
    assert targets == sizes(config, checkpoint, 2)
    assert [(one.sizes["hidden"], one.sizes["ffn"]) for one in targets] == [(46, 42), (43, 40)]
    wide = SimpleNamespace(network=changed(checkpoint.network, num_heads=16))
    for changes in (dict(heads=8), dict(groups=1, heads=4)):
        config = settings("one", rounds=4, target=TargetConfig(**changes))
        assert sizes(config, wide, 1) == sizes(config, wide, 2) == sizes(config, wide, 4)
        for way in sizes(config, wide, 4):
            assert layout_problems(way.network_of(wide.network), ParallelConfig(tensor=4)) == []
