"""Composes the settings object of a verb from its defaults, an experiment and overrides.

Hydra composes the values; the dataclasses of `schema` define keys, types and defaults. One `ConfigError` lists every
problem, in files or on the command line, and no DictConfig leaves this package.
"""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from minitron_megatron.config.fields import hints, values
from minitron_megatron.config.plugins import load_plugins
from minitron_megatron.config.reader import Reader, near, show
from minitron_megatron.config.schema import SCHEMAS, CompressConfig
from minitron_megatron.config.text import keep_text, quote_text
from minitron_megatron.errors import ConfigError, raise_if_any

GROUPS = ("experiment", "correction", "cluster")
"""Config groups: folders of `conf/` whose files make or change a recipe, or say where it runs."""

RECIPE = "recipe"
"""The file of `conf/` that adds its stages to the defaults of a recipe."""

STAGE_VERBS = [verb for verb in SCHEMAS if verb not in ("compare", "compress", "launch")]

INHERITED = ("target", "data", "parallel")
"""Sections of a recipe that its stages inherit."""

Stages = dict[str, tuple[str, Any]]
"""Verb and settings object of each stage, by name."""

_UNSET = re.compile(r"(?P<setting>\S+) = .*Environment variable '(?P<variable>[^']*)' not found", re.DOTALL)


def conf_dir() -> Path:
    """Returns the folder of the shipped YAML files, in a checkout or an installed copy."""
    return (Path(__file__).parent.parent / "conf").resolve()


def shipped(group: str) -> list[str]:
    """Returns the names of the files in one of `GROUPS`."""
    folder = conf_dir() / group
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob("*.yaml"))


def defaults(verb: str) -> dict[str, Any]:
    """Returns the default of every setting of `verb`, `???` for mandatory ones; for a recipe also its stages."""
    values: Any = OmegaConf.to_container(_composed(verb, []))
    return values


def compose(verb: str, overrides: list[str]) -> Any:
    """Composes the settings of `verb`: its defaults, then files of `GROUPS`, then `key=value` overrides.

    Args:
        verb: a key of `SCHEMAS`.
        overrides: Hydra overrides. None needs a leading `+`, because the dataclasses define which keys exist.

    Returns:
        an object of the verb's dataclass, every value resolved and checked.

    Raises:
        ConfigError: lists every problem.
    """
    problems: list[str] = []
    return _read(verb, _with_plugins(verb, overrides, problems), problems)


def load_named_plugins(verb: str, overrides: list[str]) -> None:
    """Imports the plugins that overrides of `verb` name. `compose` does so itself.

    Raises:
        ConfigError: one cannot be imported, or an override cannot be read.
    """
    _with_plugins(verb, overrides, [])


def _with_plugins(verb: str, overrides: list[str], problems: list[str]) -> DictConfig:
    """Imports all plugins and composes the overrides with Hydra. Adds problems of single overrides to `problems`."""
    raise_if_any(load_plugins([]))  # those that are installed
    texts = [text for override in overrides for text in _read_override(quote_text(verb, override), problems)]
    try:
        node = _composed(verb, texts)
        if names := _named_plugins(node):
            if unusable := load_plugins(names):
                raise ConfigError([*problems, *unusable])
            node = _composed(verb, texts)  # with the settings that they bring along
        return node
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError([*problems, str(error).strip()]) from None


def _composed(verb: str, overrides: list[str]) -> DictConfig:
    """Composes defaults and overrides with Hydra, unchecked."""
    # As plain values, so that Hydra accepts everything and `Reader` can report all problems.
    ConfigStore.instance().store(name=verb, node=to_plain(SCHEMAS[verb]()))
    name = RECIPE if verb == "compress" else verb
    with initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3", job_name="minitron"):
        return hydra_compose(config_name=name, overrides=overrides)


def _named_plugins(node: DictConfig) -> list[str]:
    """Returns the plugins of a verb, and of the stages of a recipe. Values of a wrong type are reported elsewhere."""

    def part(of: Any, name: Any) -> Any:
        return Reader().value(of, name, "") if OmegaConf.is_dict(of) and name in of else None

    stages = part(node, "stages")
    parts = [node, *(part(stages, name) for name in (stages if OmegaConf.is_dict(stages) else ()))]
    lists = [names for own in parts if isinstance(names := part(own, "plugins"), list)]
    return list(dict.fromkeys(str(name) for names in lists for name in names))


def _read(verb: str, node: DictConfig, problems: list[str]) -> Any:
    """Reads and checks the settings in a node; raises for its problems and the given ones."""
    reader = Reader()
    settings = reader.settings(SCHEMAS[verb], node)
    checks = settings.problems()
    # Checks of half-read settings would mislead.
    problems += reader.missing + reader.wrong + ([] if reader.wrong else checks)
    if verb == "compress":
        _, stage_problems = _read_stages(settings, reader.value(node, "stages", ""))
        # A problem that a stage inherited is reported once, as the recipe's.
        problems += [problem for problem in stage_problems if re.sub(r"\bstages\.[^.]+\.", "", problem) not in checks]
    raise_if_any(_with_unset_variables(problems))
    return settings


def _with_unset_variables(problems: list[str]) -> list[str]:
    """Puts one sentence for each environment variable that is not set in place of all problems that come of it."""
    settings: dict[str, str] = {}
    others = []
    for problem in problems:
        if not (match := _UNSET.match(problem)):
            others.append(problem)
        elif f"oc.env:{match['variable']}" in problem:
            # Of a section and the setting in it, the longer name is that of the setting.
            settings[match["variable"]] = max(settings.get(match["variable"], ""), match["setting"], key=len)
    return [
        *(problem for problem in others if not (settings and problem.startswith("stages = "))),
        *(
            f"{setting} reads the environment variable {variable}, which is not set: set it, or give {setting}=VALUE"
            for variable, setting in settings.items()
        ),
    ]


def resolve_stages(settings: CompressConfig) -> Stages:
    """Returns verb and settings object of every stage of a recipe, by name, in the order they run.

    Stages inherit target, data, parallel and plugins from the recipe. A stage set to null is skipped.

    Raises:
        ConfigError: lists every problem of every stage, each prefixed with `stages.NAME.`.
    """
    node = OmegaConf.create({"plugins": settings.plugins, "stages": settings.stages})
    raise_if_any(load_plugins(_named_plugins(node)))
    stages, problems = _read_stages(settings, node.stages)
    raise_if_any(_with_unset_variables(problems))
    return stages


def as_used(settings: Any) -> str:
    """Returns the settings as YAML; for a recipe with every setting of every stage, as it will be used."""
    if isinstance(settings, CompressConfig):
        stages = {name: {"verb": verb, **to_plain(own)} for name, (verb, own) in resolve_stages(settings).items()}
        settings = dataclasses.replace(settings, stages=stages)
    return to_yaml(settings)


def to_plain(settings: Any) -> dict[str, Any]:
    """Returns the settings as JSON values."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            value = values(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list):
            return [plain(item) for item in value]
        return value.value if isinstance(value, Enum) else value

    return plain(settings)


class _Dumper(yaml.SafeDumper):
    """Also quotes text that OmegaConf reads as a number and PyYAML does not, such as 1e5."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\.?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), "-+.0123456789"
)


def to_yaml(settings: Any) -> str:
    """Returns the settings as YAML, in the order of the schema. `read_settings` is the inverse."""
    plain = to_plain(settings)
    # YAML reads these Unicode characters as line breaks.
    is_safe = not re.search("[\x85\u2028\u2029]", "".join(_texts(plain)))
    text = yaml.dump(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=is_safe, width=120)
    # Nothing written here is an interpolation.
    return re.sub(r"(?<!\\)\$\{", r"\\${", text)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)
    elif isinstance(value, str):
        yield value


def sweep(overrides: list[str]) -> list[list[str]]:
    """Returns every combination of overrides with several values, as in `a=1,2`; the last one varies fastest.

    Raises:
        ConfigError: no override has several values, or one cannot be read.
    """
    problems: list[str] = []
    choices = []
    for text in overrides:
        try:
            [override] = OverridesParser.create().parse_overrides([text])
        except HydraException:
            problems.append(_unreadable(text))
            continue
        if override.is_sweep_override():
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    raise_if_any(problems)
    if all(len(values) == 1 for values in choices):
        raise ConfigError(["--multirun takes a setting with several values, as in stages.distilled.steps=100,200"])
    return [list(combination) for combination in itertools.product(*choices)]


def read_settings(verb: str, path: Path) -> Any:
    """Reads the settings of `verb` from a file with all of them, as `to_yaml` writes it.

    Raises:
        ConfigError: lists every problem.
    """
    try:
        node = OmegaConf.load(path)
        written = yaml.load(path.read_text(encoding="utf-8"), yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError([f"--config {path} cannot be read: {error}"]) from None
    if not isinstance(node, DictConfig):
        raise ConfigError([f"--config {path} holds no settings: write them as `minitron {verb} ... --cfg` does"])
    keep_text(verb, node, written)
    raise_if_any(load_plugins(_named_plugins(node)))
    return _read(verb, node, [])


def _unreadable(text: str) -> str:
    return f"{text!r} cannot be read: write key=value, and quote special characters: 'key=\"a=b\"'"


def _read_override(text: str, problems: list[str]) -> list[str]:
    """Returns the override in the form that Hydra can apply, or nothing after adding a problem."""
    try:
        [override] = OverridesParser.create().parse_overrides([text])
    except HydraException:
        problems.append(_unreadable(text))
        return []
    key = override.key_or_group
    if override.is_sweep_override():
        problems.append(f"{text!r} is several values: give one, or a list in brackets, as in {key}=[a,b]")
    elif not key or key.split(".")[0] == "hydra":
        problems.append(f"{text!r} sets nothing that is read here: write key=value")
    elif key in GROUPS:
        value = override.get_value_element_as_str()
        if value in shipped(key):
            return [f"+{key}={value}"]
        unknown = f"{key} = {value}: not in {conf_dir() / key}; {near(value, shipped(key))}"
        raise ConfigError([*problems, unknown])  # without the file most other settings would seem wrong
    else:
        return [text if override.is_delete() else f"++{text.lstrip('+')}"]
    return []


def _read_stages(recipe: CompressConfig, node: Any) -> tuple[Stages, list[str]]:
    """Returns the stages that can be read, and the problems of all of them."""
    stages: Stages = {}
    problems: list[str] = []
    for name in node if OmegaConf.is_dict(node) else ():
        where, reader = f"stages.{name}.", Reader()
        stage = reader.value(node, name, "stages.")
        if stage is None:
            continue
        if not OmegaConf.is_dict(stage):
            problems += reader.wrong or [f"stages.{name} = {show(stage)}: must be a verb and its settings, or null"]
            continue
        verb = reader.value(stage, "verb", where) if "verb" in stage else None
        if verb is None:
            others = [str(other) for other in node if other != name]
            problems.append(f"{where}verb is missing: give {where}verb=VERB; {near(str(name), others)}")
        elif verb not in STAGE_VERBS:
            problems.append(f"{where}verb = {show(verb)} is not a verb of a stage: {near(str(verb), STAGE_VERBS)}")
        else:
            _inherit(recipe, stage, SCHEMAS[verb])
            settings = reader.settings(SCHEMAS[verb], stage, where, ignored=("verb",))
            half_read = reader.wrong or reader.waits
            problems += reader.missing + reader.wrong + ([] if half_read else settings.problems(where))
            stages[str(name)] = (verb, settings)
    return stages, problems


def _inherit(recipe: CompressConfig, stage: DictConfig, schema: type) -> None:
    """Fills what a stage leaves open in the shared sections from its recipe, and adds the recipe's plugins."""
    if recipe.plugins:
        own = Reader().value(stage, "plugins", "") if "plugins" in stage else []
        with open_dict(stage):
            stage["plugins"] = list(dict.fromkeys([*recipe.plugins, *own])) if isinstance(own, list) else own
    types = hints(schema)
    sections = [name for name in INHERITED if name in types]
    # Scores depend on the target only in several rounds and in some searches.
    if not getattr(Reader().settings(schema, stage, ignored=("verb",)), "depends_on_target", True):
        sections.remove("target")
    for section in sections:
        with open_dict(stage):
            if section not in stage:
                stage[section] = {}
            own = Reader().value(stage, section, "")
            if OmegaConf.is_dict(own):
                # Only settings that the verb has.
                handed = {name for name in hints(types[section]) if name not in own}
                own.update(
                    {name: value for name, value in to_plain(getattr(recipe, section)).items() if name in handed}
                )
