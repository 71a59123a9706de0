"""Modules that are imported before anything else is read."""

import sys

import pytest

from minitron_megatron import cli
from minitron_megatron.config import axes, verbs
from minitron_megatron.config.compose import compose, load_named_plugins, read_settings, resolve_stages, to_yaml
from minitron_megatron.config.plugins import load_plugins
from minitron_megatron.config.schema import SCHEMAS, CompressConfig, InspectConfig, TargetConfig
from minitron_megatron.errors import ConfigError

PRUNE = ["checkpoint=c", "scores=s", "output=o"]
RECIPE = ["run_dir=r", "source=s"]

REGISTERS = """
from minitron_megatron.config.axes import Axis, register

register(Axis("{name}", "what {name} are.", __name__, "{name}"))
"""


@pytest.fixture
def plugins(tmp_path, monkeypatch):
    """A folder of modules that can be imported; each registers an axis of its own, and `broken` does not import."""
    for module, name in (("their_states", "states"), ("their_experts", "experts")):
        (tmp_path / f"{module}.py").write_text(REGISTERS.format(name=name))
    (tmp_path / "broken.py").write_text("import math\n\nmath.sqrt(-1)\n")
    (tmp_path / "needs_more.py").write_text("import no_such_module_at_all\n")
    (tmp_path / "twice.py").write_text(REGISTERS.format(name="ffn"))
    monkeypatch.setattr(axes, "_registered", dict(axes._registered))
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def problems(verb, *overrides):
    with pytest.raises(ConfigError) as raised:
        compose(verb, list(overrides))
    return raised.value.problems


def test_a_plugin_brings_settings_along(plugins):
    assert problems("prune", *PRUNE, "target.states=3")[0].startswith("target.states is not a setting")
    config = compose("prune", [*PRUNE, "target.states=3", "plugins=[their_states]"])
    assert config.target == TargetConfig(states=3) and config.plugins == ["their_states"]


def test_the_help_text_shows_the_settings_of_plugins_that_are_named(plugins, capsys):
    assert cli.main(["prune", "--help"]) == 0
    assert "target.states" not in capsys.readouterr().out
    assert cli.main(["prune", "--help", "plugins=[their_states]"]) == 0
    assert "target.states=null" in capsys.readouterr().out


def test_a_setting_of_a_plugin_can_be_referred_to_while_it_is_null(plugins):
    overrides = [*PRUNE, "target.ffn=8", "plugins=[their_states]", "target.hidden=${target.states}"]
    assert compose("prune", overrides).target == TargetConfig(ffn=8)


def test_a_file_of_settings_names_its_plugins(plugins, tmp_path):
    file = tmp_path / "prune.yaml"
    file.write_text("{checkpoint: c, scores: s, output: o, target: {states: 3}, plugins: [their_states]}")
    config = read_settings("prune", file)
    assert config.target.sizes == {"states": 3}
    file.write_text(to_yaml(config))
    assert read_settings("prune", file) == config


def test_plugins_of_a_recipe_are_those_of_all_its_stages(plugins):
    recipe = [
        *RECIPE,
        "target.states=3",
        "plugins=[their_states]",
        "stages.pruned.plugins=[their_experts,their_states]",
    ]
    stages = resolve_stages(compose("compress", [*recipe, "stages.pruned.target.experts=4"]))
    assert stages["pruned"][1].plugins == ["their_states", "their_experts"]
    assert stages["pruned"][1].target == TargetConfig(states=3, experts=4)
    assert all(stage.plugins == ["their_states"] for name, (_, stage) in stages.items() if name != "pruned")


def test_a_recipe_made_in_python_loads_its_plugins(plugins):
    stage = {"verb": "prune", "checkpoint": "c", "scores": "s", "output": "o", "target": {"states": 3}}
    recipe = CompressConfig("r", "s", stages={"pruned": stage}, plugins=["their_states"])
    assert resolve_stages(recipe)["pruned"][1].target == TargetConfig(states=3)


def test_a_function_called_from_python_loads_them_first(plugins, monkeypatch):
    found = []
    module = type(sys)("minitron_megatron.report.inspect")
    module.inspect = lambda config: found.append("states" in axes.all_axes())
    monkeypatch.setitem(sys.modules, module.__name__, module)
    inspect = verbs.verb_function("inspect")
    inspect(InspectConfig("p", plugins=["their_states"]))
    assert found == [True]
    with pytest.raises(ConfigError, match="plugins has 'their_stats', which cannot be imported"):
        inspect(InspectConfig("p", plugins=["their_stats"]))


@pytest.mark.parametrize(
    "name, expected",
    [
        (
            "their_stats",
            r"plugins has 'their_stats', which cannot be imported: No module named 'their_stats'\. Install it, or",
        ),
        ("needs_more", r"plugins has 'needs_more', which cannot be imported: No module named 'no_such_module_at_all'"),
        ("broken", r"plugins has 'broken', .* ValueError: .* \(.*/broken\.py, line 3\)\. Fix the module"),
        (
            "twice",
            r"plugins has 'twice', .* target\.ffn is registered by minitron_megatron\.model\.layers\.mlp\.MLP and by "
            r"twice",
        ),
        ("3", r"plugins has '3', which cannot be imported: No module named '3'"),
        ('""', r"plugins has '', which cannot be imported: ValueError"),
    ],
)
def test_a_plugin_that_does_not_import_is_the_only_problem_and_is_named(name, expected, plugins):
    with pytest.raises(ConfigError, match=expected) as raised:
        compose("prune", [f"plugins=[their_states,{name}]", "nonsense=3"])
    assert len(raised.value.problems) == 1
    with pytest.raises(ConfigError, match=expected):
        load_named_plugins("prune", [f"plugins=[{name}]"])


@pytest.mark.parametrize("value", ["3", "their_states"])
def test_what_is_no_list_of_names_is_told_as_any_other_value(value, plugins):
    [problem] = problems("inspect", "path=p", f"plugins={value}")
    assert problem.startswith("plugins = ") and problem.endswith("must be a list, as in [a,b]")


def test_plugins_of_installed_packages_are_loaded_unasked(plugins):
    info = plugins / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their_package\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[minitron_megatron.plugins]\nstates = their_states\n")
    assert compose("prune", [*PRUNE, "target.states=3"]).plugins == []
    assert load_plugins([]) == []
    (info / "entry_points.txt").write_text("[minitron_megatron.plugins]\nstates = their_states\nbad = broken\n")
    [problem] = problems("prune", *PRUNE, "target.ffn=3")
    assert problem.startswith("the installed plugin bad = broken cannot be imported: ValueError")


def test_every_verb_of_a_network_takes_plugins():
    takes = [verb for verb, schema in SCHEMAS.items() if hasattr(schema(), "plugins")]
    assert takes == [verb for verb in SCHEMAS if verb != "compare"]
