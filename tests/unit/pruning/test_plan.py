"""From scores to what stays."""

import json

import pytest
import torch

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.config.schema import DepthCriterion, DepthSearch, ParallelConfig, TargetConfig, Unit
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.model.families import network_from_config
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import DepthSettings, Scores
from minitron_megatron.pruning.target import resolve_target
from tests.tiny import LLAMA, changed, scores_by_chance, without_sublayers
from tests.unit.pruning.direct import AXES, by_axis

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


def test_a_plan_survives_its_file(tmp_path):
    plan = plan_for(random_scores(), layers=3, hidden=40, ffn=30, heads=4)
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan


@pytest.mark.parametrize("merge_heads", [False, True])
def test_a_plan_of_every_part_survives_its_file(tmp_path, merge_heads):
    scores = random_scores()
    scores.checkpoint = "fingerprint"
    target = TargetConfig(keep_layers=[0, 3], hidden=40, ffn=30, groups=1, heads=2)
    plan = make_plan(scores, target, merge_heads=merge_heads)
    assert bool(plan.merge) == merge_heads
    plan.write_file(tmp_path / "other.json")
    assert Plan.read(tmp_path / "other.json") == plan


@pytest.fixture
def file(tmp_path):
    """A plan's file, to be edited."""
    make_plan(random_scores(), TargetConfig(hidden=40, ffn=30, heads=4), merge_heads=True).write(tmp_path)
    return tmp_path / "plan.json"


def test_a_plan_can_be_edited_line_by_line(file):
    """As somebody would do it: the lines of the last layer but one go, and a range is written anew."""
    plan, lines = Plan.read(file), file.read_text().splitlines()
    rows = [line for line in lines if '"position"' in line]
    assert len(rows) == 8 and rows[3].startswith('  {"position": 3, "kind": "-", "layer": 1, "ffn": ')
    hidden = next(line for line in lines if line.startswith('"hidden"'))
    lines[lines.index(hidden)] = '"hidden": "0-9, 12,14-20",'
    file.write_text("\n".join(line for line in lines if '"layer": 2' not in line))
    edited = Plan.read(file)
    assert edited.sublayers == [0, 1, 2, 3, 6, 7] and edited.hidden == [*range(10), 12, *range(14, 21)]
    assert edited.target == without_sublayers(plan.target, 4, 5).replace(hidden_size=18)
    for name in ("elements", "merge"):
        expected = {position: kept for position, kept in getattr(plan, name).items() if position not in (4, 5)}
        assert getattr(edited, name) == expected and expected, name


def edited(change):
    """An edit of a plan's values, by name so that a failing test is found."""

    def edit(file):
        values = json.loads(file.read_text())
        change(values, values["sublayers"])
        file.write_text(json.dumps(values))

    return edit


BROKEN = {
    "no JSON": (lambda file: file.write_text("{"), "is not a plan: Expecting property name"),
    "cut short": (lambda file: file.write_text(file.read_text()[:-20]), "is not a plan: "),
    "gone": (lambda file: file.unlink(), "is not a plan: .*No such file"),
    "a list": (lambda file: file.write_text("[]"), "is not a plan: "),
    "nothing": (lambda file: file.write_text("{}"), "is not a plan: it has no 'source'"),
    "no source": (edited(lambda v, rows: v.pop("source")), "it has no 'source'"),
    "no checkpoint": (edited(lambda v, rows: v.pop("checkpoint")), "it has no 'checkpoint'"),
    "no sublayers": (edited(lambda v, rows: v.pop("sublayers")), "it has no 'sublayers'"),
    "empty": (edited(lambda v, rows: rows.clear()), "sublayers keeps nothing: keep at least one"),
    "strange source": (edited(lambda v, rows: v["source"].update(width=3)), "network.width is no field"),
    "no position": (edited(lambda v, rows: rows[2].pop("position")), "it has no 'position'"),
    "position as text": (edited(lambda v, rows: rows[2].update(position="2")), "position = '2' must be 0 to 7"),
    "position too large": (edited(lambda v, rows: rows[7].update(position=8)), "position = 8 must be 0 to 7"),
    "twice": (edited(lambda v, rows: rows.insert(3, rows[2])), "sublayers does not ascend, or names something twice"),
    "order": (edited(lambda v, rows: rows.reverse()), "sublayers does not ascend, or names something twice"),
    "kind": (edited(lambda v, rows: rows[2].update(kind="-")), r"sublayer 2: kind and layer must be '\*' and 1"),
    "layer": (edited(lambda v, rows: rows[2].update(layer=2)), r"sublayer 2: kind and layer must be '\*' and 1"),
    "no neurons": (
        edited(lambda v, rows: rows[1].update(ffn="")),
        "sublayer 1: ffn keeps nothing: keep at least one",
    ),
    "lost neurons": (edited(lambda v, rows: rows[1].pop("ffn")), "it has no 'ffn'"),
    "too many neurons": (
        edited(lambda v, rows: rows[1].update(ffn="0-44")),
        "sublayer 1: ffn names 0 to 44, and there are 0 to 43",
    ),
    "no numbers": (
        edited(lambda v, rows: rows[1].update(ffn="0-x")),
        "sublayer 1: ffn = '0-x' must be text of numbers",
    ),
    "three numbers": (edited(lambda v, rows: v.update(hidden="0-4-8")), "hidden = '0-4-8' must be text of numbers"),
    "backwards": (edited(lambda v, rows: v.update(hidden="0-5,9-7")), "hidden = '0-5,9-7' must be .* ascending ranges"),
    "open end": (edited(lambda v, rows: v.update(hidden="5-")), "hidden = '5-' must be text of numbers"),
    "below 0": (edited(lambda v, rows: v.update(hidden="-3")), "hidden = '-3' must be text of numbers"),
    "a list for a range": (edited(lambda v, rows: v.update(hidden=[0, 1])), r"hidden = \[0, 1\] must be text"),
    "overlap": (edited(lambda v, rows: v.update(hidden="0-5,3-9")), "hidden does not ascend, or names something twice"),
    "groups": (
        edited(lambda v, rows: rows[0].update(groups="0-2")),
        "sublayer 0: groups names 0 to 2, and there are 0 to 1",
    ),
    "lists": (edited(lambda v, rows: rows[0]["heads"].pop()), "sublayer 0: heads has 1 lists for 2 kept groups"),
    "heads": (
        edited(lambda v, rows: rows[0].update(heads=["0-1", "3"])),
        "sublayer 0: heads of query group 1 names 3 to 3",
    ),
    "merged": (
        edited(lambda v, rows: rows[0]["merge"][0].pop()),
        "sublayer 0: merge must name one of 3 query heads for each query head that stays",
    ),
    "merged with": (edited(lambda v, rows: rows[0].update(merge=[[0, 3], [1, 2]])), "sublayer 0: merge must name one"),
    "merged here alone": (
        edited(lambda v, rows: rows[0].pop("merge")),
        "sublayer 0: merge must name one of 3 query heads",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_every_kind_of_broken_plan_gives_an_error_that_names_the_field(file, name):
    edit, message = BROKEN[name]
    edit(file)
    with pytest.raises((CheckpointError, ConfigError), match=message) as raised:
        Plan.read(file)
    assert str(raised.value).startswith(f"{file}")


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


def test_scores_survive_their_file(tmp_path):
    scores = random_scores()
    scores.settings, scores.checkpoint = {"num_samples": 7}, "fingerprint"
    scores.depth["kl"] = torch.tensor([torch.nan, 1.0, 2.0, torch.nan], dtype=torch.float64)
    scores.depth_settings = DepthSettings(Unit.LAYER, DepthSearch.GREEDY, 2, 1, 1)
    scores.rounds = {"depth": torch.tensor([3, 1, 2, 3])}
    scores.write(tmp_path)
    Manifest("scores").write(tmp_path)
    found = Scores.read(tmp_path)
    assert (found.network, found.settings, found.checkpoint) == (NETWORK, {"num_samples": 7}, "fingerprint")
    assert found.depth_settings == scores.depth_settings
    assert all(torch.equal(by_axis(found)[name], by_axis(scores)[name]) for name in AXES)
    assert found.elements.keys() == scores.elements.keys() == {"ffn", "heads"} and found.element_rounds == {}
    # The first criterion is the one that layers are chosen by.
    assert list(found.depth) == ["loss", "kl"] and list(found.rounds) == ["depth"]
    for name, values in {**scores.depth, **scores.rounds}.items():
        torch.testing.assert_close(({**found.depth, **found.rounds})[name], values, rtol=0, atol=0, equal_nan=True)


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
