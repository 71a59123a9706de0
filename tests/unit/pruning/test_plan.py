"""From scores to what stays."""

import pytest
import torch

from minitron_megatron.config.schema import DepthCriterion, DepthSearch, ParallelConfig, TargetConfig, Unit
from minitron_megatron.errors import ConfigError
from minitron_megatron.model.families import network_from_config
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.scores import DepthSettings
from minitron_megatron.pruning.target import resolve_target
from tests.tiny import LLAMA, changed, scores_by_chance

NETWORK = network_from_config(LLAMA)  # 4 layers, hidden 48, ffn 44, 2 groups of 3 heads


def random_scores():
    return scores_by_chance(NETWORK, seed=0)


def plan_for(scores, **target):
    return make_plan(scores, TargetConfig(**target))


def test_the_top_elements_stay_in_ascending_order():
    scores = random_scores()
    plan = plan_for(scores, layers=3, hidden=40, ffn=30, heads=4)
    dropped = int(scores.depth["loss"].argmin())
    layers = [layer for layer in range(4) if layer != dropped]
    assert plan.sublayers == [position for layer in layers for position in (2 * layer, 2 * layer + 1)]
    assert plan.hidden == sorted(scores.hidden.topk(40).indices.tolist())
    assert list(plan.elements) == plan.sublayers
    for layer in layers:
        attention, mlp = plan.elements[2 * layer], plan.elements[2 * layer + 1]
        assert mlp == {"ffn": sorted(scores.elements["ffn"][layer].topk(30).indices.tolist())}
        assert attention == {
            "groups": [0, 1],
            "heads": [sorted(own.topk(2).indices.tolist()) for own in scores.elements["heads"][layer]],
        }


def test_heads_compete_within_their_group_alone():
    scores = random_scores()
    for own in scores.elements["heads"]:
        own[0] += 10  # every head of one group before every head of the other
    plan = plan_for(scores, heads=4)
    assert all([len(heads) for heads in plan.elements[position]["heads"]] == [2, 2] for position in (0, 2, 4, 6))


def test_of_equal_scores_the_lower_index_stays():
    scores = random_scores()
    for values in (scores.hidden, *scores.elements["ffn"], *scores.elements["heads"], scores.depth["loss"]):
        values.fill_(0.5)
    scores.hidden[47] = 0.6
    plan = plan_for(scores, layers=2, hidden=3, ffn=2, heads=2)
    assert plan.sublayers == [0, 1, 2, 3] and plan.hidden == [0, 1, 47]
    attention, mlp = {"groups": [0, 1], "heads": [[0], [0]]}, {"ffn": [0, 1]}
    assert plan.elements == {0: attention, 1: mlp, 2: attention, 3: mlp}


def test_what_is_not_asked_for_stays_whole():
    plan = plan_for(random_scores(), ffn=20)
    assert plan.target == changed(NETWORK, ffn_hidden_size=20)
    assert plan.sublayers == list(range(8)) and plan.hidden == list(range(48))
    whole = {"groups": [0, 1], "heads": [[0, 1, 2], [0, 1, 2]]}
    assert [plan.elements[position] for position in (0, 2, 4, 6)] == [whole] * 4


def test_a_plan_says_where_the_layers_of_the_target_come_from():
    scores = random_scores()
    scores.depth["loss"][:] = torch.tensor([3.0, 1.0, 2.0, 4.0])
    plan = plan_for(scores, layers=3)
    of_kind = {symbol: [p for p in plan.sublayers if NETWORK.pattern[p] == symbol] for symbol in "*-"}
    assert [NETWORK.layer_of(p) for symbol in "*-" for p in of_kind[symbol]] == [0, 2, 3] * 2
    assert plan.kept(of_kind["-"][1])["ffn"].tolist() == plan.elements[5]["ffn"]
    assert plan.kept(of_kind["*"][1])["group"].tolist() == plan.elements[4]["groups"]
    assert plan.kept(of_kind["*"][1])["head"].tolist() == plan.elements[4]["heads"]
    assert set(plan.kept(None)) == {"hidden"}


def test_layers_may_differ():
    plan = plan_for(random_scores(), ffn=30, heads=4)
    plan.elements[1]["ffn"].pop()
    plan.elements[2] = {"groups": [1], "heads": [[0, 2]]}
    assert plan.problems() == []
    found = [(layer.num_heads, layer.num_query_groups) for layer in plan.target.sublayers[::2]]
    assert found == [(4, 2), (2, 1), (4, 2), (4, 2)]
    assert [layer.ffn_hidden_size for layer in plan.target.sublayers[1::2]] == [29, 30, 30, 30]


def test_query_groups_of_a_layer_that_would_differ_are_refused():
    plan = plan_for(random_scores(), ffn=30, heads=4)
    plan.elements[2]["heads"][0].pop()
    message = "the plan keeps 1 or 2 query heads of layer 1's attention, depending on the query group: each must keep"
    with pytest.raises(ConfigError, match=message):
        _ = plan.target


def searched(search, unit=Unit.LAYER, drop=2, protect=(1, 1), rounds=None):
    """Scores of a search for layers."""
    scores = random_scores()
    values = torch.rand(8 if unit is Unit.SUBLAYER else 4, generator=torch.Generator().manual_seed(1)).double()
    scores.depth = {"loss": values, "kl": values.flip(0)}
    scores.depth_settings = DepthSettings(unit, search, drop, *protect)
    scores.rounds = {} if rounds is None else {"depth": torch.tensor(rounds)}
    return scores


@pytest.mark.parametrize(
    "scores, target, criterion, message",
    [
        (
            searched(DepthSearch.SINGLE, protect=(2, 1)),
            dict(layers=2),
            None,
            r"target keeps 2 layers, and 3 are protected \(depth.protect_first = 2, depth.protect_last = 1\): keep",
        ),
        (
            searched(DepthSearch.SINGLE, Unit.SUBLAYER, protect=(1, 1)),
            dict(attention=1, mlp=4),
            None,
            "target keeps 1 sublayers, and 2 are protected",
        ),
        (
            searched(DepthSearch.BLOCK),
            dict(layers=3),
            None,
            r"target.layers = 3 leaves out 1 of 4, and the scores are of leaving out 2 \(block\): score again with "
            "that target, or set target.layers=2",
        ),
        (
            searched(DepthSearch.GREEDY, rounds=[3, 1, 2, 3]),
            dict(layers=1),
            None,
            r"target.layers = 1 leaves out 3 of 4, and the scores are of leaving out 2 \(greedy\): score again",
        ),
        (
            searched(DepthSearch.GREEDY, Unit.SUBLAYER, protect=(0, 0), rounds=[3, 1, 2, 3, 3, 3, 3, 3]),
            dict(attention=3, mlp=2),
            None,
            r"target.mlp = 2 leaves out 2 of 4, and the scores are of leaving out 1 \(greedy\): .* target.mlp=3",
        ),
        (
            searched(DepthSearch.SINGLE),
            dict(attention=3, mlp=2),
            None,
            "target.attention = 3 and target.mlp = 2 differ, and the scores are of whole layers: score with depth.unit",
        ),
        (
            searched(DepthSearch.SINGLE),
            dict(layers=3),
            DepthCriterion.LOGITS,
            r"depth_criterion = logits was not scored: there are loss, kl; score with depth.criteria=\[logits\]",
        ),
    ],
    ids=["protected", "protected sublayers", "block", "greedy", "greedy sublayers", "whole layers", "criterion"],
)
def test_shapes_that_no_plan_reaches_are_named(scores, target, criterion, message):
    with pytest.raises(ConfigError, match=message):
        make_plan(scores, TargetConfig(**target), depth_criterion=criterion)


def test_layers_that_were_never_scored_can_still_be_named():
    scores = random_scores()
    scores.depth = {}
    with pytest.raises(ConfigError, match="was not scored: there are none; .* or set target.keep_layers"):
        plan_for(scores, layers=3)
    assert plan_for(scores, keep_layers=[0, 3]).sublayers == [0, 1, 6, 7]
    with pytest.raises(ConfigError, match="target.keep_layers names layer 4, and the source has 4: they count from 0"):
        plan_for(scores, keep_layers=[0, 4])
    assert plan_for(scores, ffn=30).sublayers == list(range(8))


def test_protected_layers_stay_whatever_their_scores():
    scores = searched(DepthSearch.SINGLE, protect=(1, 1))
    scores.depth["loss"][:] = torch.tensor([0.0, 3.0, 2.0, 1.0])
    assert plan_for(scores, layers=3).sublayers == [0, 1, 2, 3, 6, 7]
    scores = searched(DepthSearch.SINGLE, Unit.SUBLAYER, protect=(1, 0))
    scores.depth["loss"][:] = torch.tensor([0.0, 0.0, 3.0, 1.0, 2.0, 2.0, 1.0, 3.0])
    plan = plan_for(scores, attention=3, mlp=2)
    assert plan.sublayers == [0, 1, 2, 4, 7]


def test_layers_are_chosen_by_the_criterion_that_is_asked_for():
    scores = random_scores()
    scores.depth = {"loss": torch.tensor([4.0, 1.0, 2.0, 3.0]), "kl": torch.tensor([4.0, 3.0, 2.0, 1.0])}
    for criterion, gone in ((None, 1), (DepthCriterion.LOSS, 1), (DepthCriterion.KL, 3)):
        plan = make_plan(scores, TargetConfig(layers=3), depth_criterion=criterion)
        assert plan.sublayers == [p for p in range(8) if p // 2 != gone]


def test_the_order_of_a_greedy_search_counts_and_not_its_numbers():
    scores = searched(DepthSearch.GREEDY, protect=(0, 0), rounds=[1, 3, 2, 3])
    scores.depth["loss"][:] = torch.tensor([9.0, 1.0, 8.0, 2.0])
    assert plan_for(scores, layers=2).sublayers == [2, 3, 6, 7]


def test_a_group_is_as_important_as_its_heads_together():
    scores = random_scores()

    def groups(*heads):
        scores.elements["heads"] = [torch.tensor(heads, dtype=torch.float64)] * 4
        plan = plan_for(scores, groups=1, heads=2)
        return [plan.elements[position] for position in (0, 2, 4, 6)]

    assert groups([9, 0, 0], [4, 4, 4]) == [{"groups": [1], "heads": [[0, 1]]}] * 4
    assert groups([9, 2, 2], [4, 4, 4]) == [{"groups": [0], "heads": [[0, 1]]}] * 4


def test_all_of_everything_is_a_fraction_and_one_of_everything_a_number():
    """41 channels are no multiple of what fractions are rounded to."""
    source = NETWORK.replace(hidden_size=41)
    names = ("layers", "hidden", "ffn", "groups", "heads")
    whole = resolve_target(source, TargetConfig(**{name: 1.0 for name in names}), ParallelConfig())
    assert whole.network_of(source) == source and whole.rounded == []
    one = resolve_target(source, TargetConfig(**{name: 1 for name in names}), ParallelConfig())
    sizes = {name: 1 for name in ("attention", "mlp", "hidden", "ffn", "groups", "heads_per_group")}
    assert one.sizes == {**sizes, "keep_layers": None} and one.layers == 1
    # Of the heads of the groups that stay, which are fewer.
    fewer = resolve_target(source, TargetConfig(groups=1, heads=1.0), ParallelConfig())
    assert (fewer.sizes["groups"], fewer.sizes["heads_per_group"]) == (1, 3)


def test_a_multiple_that_the_source_does_not_reach_is_refused():
    with pytest.raises(ConfigError) as raised:
        plan_for(random_scores(), hidden=32, round_to=64)
    assert raised.value.problems == [
        "target.hidden = 32 must be a multiple of 64, and the source has 48: lower target.round_to or parallel.tensor"
    ]


def test_targets_that_cannot_be_are_all_listed():
    with pytest.raises(ConfigError) as raised:
        plan_for(random_scores(), layers=5, hidden=49, ffn=45, heads=7)
    larger = "is larger than the source's"
    assert raised.value.problems == [
        f"target.hidden = 49 {larger} 48: pruning only removes",
        f"target.heads = 7 {larger} 6: pruning only removes",
        "target.heads = 7 is not a multiple of the 2 query groups: every query group keeps the same number of heads",
        f"target.ffn = 45 {larger} 44: pruning only removes",
        f"target.layers = 5 {larger} 4: pruning only removes",
    ]


@pytest.mark.parametrize("target", [dict(ffn=-5), dict(ffn=1.5), dict(hidden=0), dict(keep_layers=[2, 1])], ids=str)
def test_a_target_of_no_meaning_is_refused_by_the_function_too(target):
    scores = random_scores()
    scores.depth = {}
    with pytest.raises(ConfigError, match=f"target.{next(iter(target))}"):
        make_plan(scores, TargetConfig(**target))
