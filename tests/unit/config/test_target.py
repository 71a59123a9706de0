"""Sizes by name, from a registry: in Python, in files, on the command line and in the help text."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import yaml

from minitron_megatron.config import axes
from minitron_megatron.config.axes import Axis, register
from minitron_megatron.config.compose import compose, read_settings, resolve_stages, to_plain, to_yaml
from minitron_megatron.config.describe import describe
from minitron_megatron.config.fields import OPEN, OpenField, OpenSettings, hints, values
from minitron_megatron.config.schema import AxisConfig, Criterion, PruneConfig, ScoreConfig, TargetConfig
from minitron_megatron.errors import ConfigError

PRUNE = ["checkpoint=c", "scores=s", "output=o"]
SCORE = ["checkpoint=c", "output=o"]


@pytest.fixture
def further_axis(monkeypatch):
    """An axis that somebody else's kind of layer has."""
    monkeypatch.setattr(axes, "_registered", dict(axes._registered))
    register(Axis("states", "channels of the state.", "their.module", "state", by_layer=True, is_scored=True))


def problems(verb, *overrides):
    with pytest.raises(ConfigError) as raised:
        compose(verb, list(overrides))
    return raised.value.problems


def test_sizes_are_arguments_and_a_mapping():
    target = TargetConfig(2, hidden=448, ffn=[1536, 0.5], heads=None)
    assert (target.layers, target.sizes) == (2, {"hidden": 448, "ffn": [1536, 0.5]})
    assert target == TargetConfig(layers=2, sizes={"hidden": 448, "ffn": [1536, 0.5]})
    assert replace(target, hidden=8).sizes == {"hidden": 8, "ffn": [1536, 0.5]} and target.sizes["hidden"] == 448
    assert TargetConfig(heads=None).is_empty and TargetConfig(round_to=8).is_empty
    assert not any(target.is_empty for target in (TargetConfig(layers=1), TargetConfig(mlp=1), TargetConfig(1, [0])))


def test_arguments_that_are_no_settings_are_refused_as_those_of_any_dataclass():
    with pytest.raises(TypeError, match=r"TargetConfig has no hiden: it has layers, keep_layers, hidden, attention"):
        TargetConfig(hiden=3)
    for arguments, named in (((1, None, {}, 8, 9), {}), ((1,), {"layers": 2}), ((), {"sizes": {"hiden": 3}})):
        with pytest.raises((TypeError, ValueError)):
            TargetConfig(*arguments, **named)


def test_sizes_lie_flat_among_the_others(tmp_path):
    config = compose("prune", [*PRUNE, "target.ffn=[1536,0.75]", "target.hidden=0.5", "target.round_to=8"])
    assert config.target == TargetConfig(hidden=0.5, ffn=[1536, 0.75], round_to=8)
    expected = dict.fromkeys(("layers", "keep_layers", "attention", "mlp"))
    expected |= {"hidden": 0.5, "ffn": [1536, 0.75], "groups": None, "heads": None, "round_to": 8}
    assert to_plain(config)["target"] == expected == yaml.safe_load(to_yaml(config))["target"]
    (tmp_path / "prune.yaml").write_text(to_yaml(config))
    assert read_settings("prune", tmp_path / "prune.yaml") == config
    assert compose("prune", [*PRUNE, "target={hidden:0.5,ffn:[1536,0.75],round_to:8}"]) == config


@pytest.mark.parametrize(
    "override, expected",
    [
        ("target.hiden=3", "target.hiden is not a setting: did you mean target.hidden?"),
        ("ffn=3", "ffn is not a setting: did you mean target.ffn?"),
        (
            "target.zzz=3",
            "target.zzz is not a setting: there are layers, keep_layers, hidden, attention, groups, heads, mlp, "
            "ffn, round_to",
        ),
        ("target.ffn=x", "target.ffn = 'x': must be a number or a list of numbers or null"),
        ("target.ffn='8'", "target.ffn = '8': must be a number or a list of numbers or null"),
        ("target.ffn=true", "target.ffn = true: must be a number or a list of numbers or null"),
        ("target.ffn=nan", "target.ffn = nan: must be a number or a list of numbers or null"),
        ("target.ffn=[8,x]", "target.ffn = [8, 'x']: must be a number or a list of numbers or null"),
        ("target.ffn=[8,null]", "target.ffn = [8, null]: must be a number or a list of numbers or null"),
        ("target.mlp=[1,2]", "target.mlp = [1, 2]: must be a number or null"),
        ("target.layers=[1,2]", "target.layers = [1, 2]: must be a number or null"),
        ("target.hidden=[8,8]", "target.hidden = [8, 8]: is one size for all layers: give a number, and no list"),
        (
            "target.ffn=[8,0]",
            "target.ffn = [8, 0]: every entry must be a whole number of at least 1, or a fraction of at most 1.0",
        ),
        (
            "target.ffn=[8,1.5]",
            "target.ffn = [8, 1.5]: every entry must be a whole number of at least 1, or a fraction of at most 1.0",
        ),
        (
            "target.ffn=[]",
            "target.ffn = []: every entry must be a whole number of at least 1, or a fraction of at most 1.0",
        ),
    ],
)
def test_each_kind_of_bad_size_gives_one_sentence(override, expected):
    assert problems("prune", *PRUNE, "target.heads=4", override) == [expected]


def test_numbers_of_sublayers_made_in_python_are_no_lists():
    for name in ("layers", "mlp"):
        [problem] = TargetConfig(**{name: [2, 2]}).problems()
        assert problem == f"target.{name} = [2, 2]: is a number for the whole network: give one, and no list"


def test_an_axis_that_is_registered_is_a_setting(further_axis):
    config = compose("prune", [*PRUNE, "target.states=[8,16]"])
    assert config.target.sizes == {"states": [8, 16]}
    assert "target.states=null" in describe("prune") and "states.criterion=null" in describe("score")
    assert problems("prune", *PRUNE, "target.state=3") == ["target.state is not a setting: did you mean target.states?"]
    scored = compose("score", [*SCORE, "criterion=weight", "states.criterion=random"])
    assert scored.axes["states"].criterion is Criterion.RANDOM and scored.axes["ffn"].criterion is Criterion.WEIGHT


def test_an_axis_that_nobody_registered_is_no_setting():
    assert problems("prune", *PRUNE, "target.states=3")[0].startswith("target.states is not a setting: there are")
    assert "states" not in describe("score")


def test_a_name_is_registered_once(further_axis):
    with pytest.raises(ConfigError, match=r"target.states is registered by their.module and by other.module: rename"):
        register(Axis("states", "something else.", "other.module"))
    with pytest.raises(
        ConfigError, match=r"target.ffn is registered by minitron_megatron.model.layers.mlp.MLP and by mine"
    ):
        register(Axis("ffn", "something else.", "mine"))


def test_an_axis_with_the_name_of_another_setting_is_refused(monkeypatch):
    monkeypatch.setattr(axes, "_registered", dict(axes._registered))
    register(Axis("layers", "something else.", "mine"))
    with pytest.raises(ConfigError, match="layers cannot be registered: TargetConfig has it already"):
        compose("prune", PRUNE)


def test_every_scored_axis_has_a_section_of_its_own():
    config = ScoreConfig("c", "o", criterion=Criterion.WEIGHT, ffn=AxisConfig(Criterion.RANDOM), heads=AxisConfig())
    assert list(config.axes) == ["hidden", "heads", "ffn"]
    assert [how.criterion for how in config.axes.values()] == [Criterion.WEIGHT, Criterion.WEIGHT, Criterion.RANDOM]
    assert not any(None in vars(how).values() for how in config.axes.values())
    assert compose("score", [*SCORE, "criterion=weight", "ffn.criterion=random"]) == config
    assert problems("score", *SCORE, "groups.criterion=random") == [
        "groups is not a setting: did you mean target.groups?"
    ]
    assert problems("score", *SCORE, "ffn.criterium=random") == [
        "ffn.criterium is not a setting: did you mean ffn.criterion?"
    ]


def test_a_recipe_hands_sizes_to_its_stages():
    recipe = ["run_dir=r", "source=s", "target.ffn=[8,16]", "stages.pruned.target.hidden=4"]
    settings = compose("compress", recipe)
    assert settings.target == TargetConfig(ffn=[8, 16])
    stages = resolve_stages(settings)
    assert stages["pruned"][1].target == TargetConfig(hidden=4, ffn=[8, 16])
    assert stages["scores"][1].target == TargetConfig()  # which scores of one round do not depend on
    settings = compose("compress", [*recipe, "stages.scores.rounds=2"])
    assert resolve_stages(settings)["scores"][1].target == TargetConfig(ffn=[8, 16])


def test_a_target_that_changes_no_score_is_refused():
    [problem] = problems("score", *SCORE, "target.ffn=8")
    assert problem.startswith("target has no effect on scores of one round: leave it out here and give it to prune")
    compose("score", [*SCORE, "target.ffn=8", "rounds=2"])


def test_what_is_not_given_is_null_in_plain_values():
    config = ScoreConfig("c", "o", target=TargetConfig(ffn=8), hidden=AxisConfig(Criterion.RANDOM))
    assert to_plain(config)["hidden"]["criterion"] == "random" and to_plain(config)["target"]["ffn"] == 8
    assert to_plain(PruneConfig())["target"] == dict.fromkeys(to_plain(TargetConfig()))


@dataclass(init=False)
class Parts(OpenSettings):
    """Any settings class with settings beside its own."""

    first: int = 1
    further: dict[str, Any] = field(default_factory=dict, metadata=OPEN)
    last: list[int] = field(default_factory=list)

    @classmethod
    def open_fields(cls):
        return {"number": OpenField(int | None), "section": OpenField(AxisConfig)}


def test_open_settings_stand_where_their_field_stands():
    assert list(hints(Parts)) == ["first", "number", "section", "last"]
    parts = Parts(2, number=3, section=AxisConfig())
    assert (parts.further, parts.last) == ({"number": 3}, []) and parts.last is not Parts().last
    assert values(parts) == {"first": 2, "number": 3, "section": AxisConfig(), "last": []}
    assert replace(parts, number=None) == Parts(2) and replace(parts, first=5) == Parts(5, number=3)
