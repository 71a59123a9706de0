"""Settings of scoring and pruning that contradict each other, each named with what to do about it."""

from dataclasses import replace

import pytest

from minitron_megatron.config.schema import (
    Aggregation,
    AxisConfig,
    DepthConfig,
    DepthCriterion,
    DepthSearch,
    PruneConfig,
    ScoreConfig,
    TargetConfig,
    Unit,
)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(hidden=0), "target.hidden = 0: must be a whole number of at least 1, or a fraction of at most 1.0"),
        (dict(ffn=1.5), "target.ffn = 1.5: must be a whole number of at least 1, or a fraction of at most 1.0"),
        (dict(keep_layers=[2, 1]), "target.keep_layers = [2, 1]: must name at least one layer, ascending, from 0"),
        (dict(keep_layers=[]), "target.keep_layers = []: must name at least one layer, ascending, from 0"),
        (dict(keep_layers=[0], layers=1), "target.keep_layers and target.layers are both set: set one of them"),
        (dict(layers=2, mlp=2), "target.layers is set beside target.attention or target.mlp: set the one or the"),
        (dict(round_to=0), "target.round_to = 0"),
    ],
    ids=str,
)
def test_targets(settings, message):
    [problem] = TargetConfig(**settings).problems()
    assert problem.startswith(message)


@pytest.mark.parametrize("size", [1, 1.0, 0.01, 40, 40.0])
def test_sizes_that_are_whole_numbers_or_fractions(size):
    assert TargetConfig(hidden=size).problems() == []


LOSS, ACCURACY = DepthCriterion.LOSS, DepthCriterion.ACCURACY


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(rounds=2), "rounds = 2 need a shape to head for: set target"),
        (
            dict(rounds=2, target=TargetConfig(layers=2), depth=DepthConfig(search=DepthSearch.GREEDY)),
            "rounds = 2 and depth.search = greedy: several rounds score every layer by itself; set depth.search=single",
        ),
        (
            dict(rounds=2, target=TargetConfig(layers=2), depth=DepthConfig(criteria=[])),
            "target.layers and rounds = 2 need one of depth.criteria",
        ),
        (
            dict(rounds=2, target=TargetConfig(mlp=2)),
            "rounds = 2 score networks of whole layers: set depth.unit=layer and target.layers, or rounds=1",
        ),
        (
            dict(rounds=2, target=TargetConfig(ffn=8), depth=DepthConfig(unit=Unit.SUBLAYER)),
            "rounds = 2 score networks of whole layers: set depth.unit=layer and target.layers, or rounds=1",
        ),
        (
            dict(depth=DepthConfig(search=DepthSearch.BLOCK)),
            "depth.search = block needs to know how many go: set target.layers",
        ),
        (
            dict(depth=DepthConfig(search=DepthSearch.GREEDY, unit=Unit.SUBLAYER), target=TargetConfig(layers=2)),
            "depth.search = greedy needs to know how many go: set target.attention or target.mlp",
        ),
        (
            dict(depth=DepthConfig(search=DepthSearch.BLOCK, unit=Unit.SUBLAYER), target=TargetConfig(mlp=2)),
            "depth.search = block skips whole layers: set depth.unit=layer",
        ),
        (dict(depth=DepthConfig(criteria=[LOSS, LOSS])), "depth.criteria = ['loss', 'loss']: names one twice"),
        (
            dict(depth=DepthConfig(criteria=[], search=DepthSearch.GREEDY), target=TargetConfig(layers=2)),
            "depth.search = greedy needs at least one of depth.criteria",
        ),
        (
            dict(depth=DepthConfig(criteria=[ACCURACY])),
            "depth.choices = None and accuracy in depth.criteria belong together: set both or neither",
        ),
        (
            dict(depth=DepthConfig(choices="file")),
            "depth.choices = file and accuracy in depth.criteria belong together: set both or neither",
        ),
        (dict(depth=DepthConfig(protect_first=-1)), "depth.protect_first = -1"),
        (
            dict(num_samples=1, ffn=AxisConfig(batch_aggregation=Aggregation.VARIANCE)),
            "num_samples = 1: a variance over sequences needs at least 2",
        ),
        (dict(rounds=0), "rounds = 0"),
        (dict(seed=-1), "seed = -1"),
    ],
    ids=str,
)
def test_scorings(settings, message):
    [problem] = ScoreConfig("checkpoint", "output", **settings).problems()
    assert problem.startswith(message)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(target=TargetConfig(ffn=8)), "scores is missing: give scores=FOLDER and target, or plan"),
        (dict(scores="scores"), "target changes nothing: set at least one of its sizes"),
        (
            dict(plan="plan.json", scores="scores", target=TargetConfig(ffn=8), merge_heads=True),
            "plan = plan.json already says what stays: leave out scores and target and merge_heads; a dry run may have",
        ),
        (dict(plan="plan.json", workers=0), "workers = 0"),
    ],
    ids=str,
)
def test_prunings(settings, message):
    [problem] = PruneConfig("checkpoint", "output", **settings).problems()
    assert problem.startswith(message)


def test_a_dry_run_of_a_plan_may_have_scores_beside_it():
    config = PruneConfig("checkpoint", "output", plan="plan.json", scores="scores")
    assert len(config.problems()) == 1 and replace(config, dry_run=True).problems() == []
