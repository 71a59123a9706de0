"""Plans and scores in their files: read as they were written, edited by hand, and refused where they are broken."""

import json

import pytest
import torch

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.config.schema import DepthSearch, TargetConfig, Unit
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import DepthSettings, Scores
from tests.tiny import without_sublayers
from tests.unit.pruning.direct import AXES, by_axis
from tests.unit.pruning.test_plan import NETWORK, plan_for, random_scores


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
