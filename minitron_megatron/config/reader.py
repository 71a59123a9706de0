"""Reads OmegaConf nodes strictly into dataclasses, and collects all problems instead of stopping at the first."""

import dataclasses
import difflib
import math
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from minitron_megatron.config.fields import hints, is_section, named_section

MISSING = "???"
"""Default of a mandatory setting."""

UNREAD = object()
"""Stands for a value that `Reader` could not read."""

_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "settings by name"}


def near(name: str, known: list[str], where: str = "") -> str:
    """Returns the end of a message about an unknown name: the closest known name, or all known names.

    Args:
        name: the unknown name.
        known: the known names, dotted for settings of a section.
        where: dotted path that precedes all of them, with its closing dot.
    """
    meant = [key for key in known if key.split(".")[-1] == name] or difflib.get_close_matches(name, known, n=1)
    if meant:
        return f"did you mean {' or '.join(where + key for key in meant)}?"
    return f"there are {', '.join(dict.fromkeys(key.split('.')[0] for key in known))}"


def keys(schema: type) -> list[str]:
    """Returns the names of all settings of a dataclass, dotted for those of its sections."""
    names = []
    for name, hint in hints(schema).items():
        names.append(name)
        if is_section(hint):
            names += [f"{name}.{key}" for key in keys(hint)]
    return names


def listed_enum(hint: Any) -> type[Enum] | None:
    """Returns the enum of a list of enum members; None for any other type."""
    kinds = [kind for kind in get_args(hint) if isinstance(kind, type) and get_origin(kind) is None]
    return next((kind for kind in kinds if issubclass(kind, Enum)), None)


def show(value: Any) -> str:
    """Formats a value as in YAML."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{', '.join(map(show, value))}]" if isinstance(value, list) else repr(value)


def _was_text(kind: Any, value: Any) -> bool:
    """Returns whether YAML has read a number or a boolean where the setting is text, or a list of texts."""
    values = [value] if kind is str else value if kind == list[str] and isinstance(value, list) else []
    return any(isinstance(one, int | float) for one in values)


class Reader:
    """Reads settings and collects their problems.

    Attributes:
        missing: a sentence for each mandatory setting that is not given.
        wrong: a sentence for each unknown key, value of a wrong type and broken interpolation.
        waits: whether a value refers to a missing one, and kept its default.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.waits = False

    def settings(self, schema: type, node: DictConfig, where: str = "", ignored: tuple[str, ...] = ()) -> Any:
        """Reads an object of `schema`. Values that cannot be read keep their defaults.

        Args:
            schema: the dataclass, with keys and types.
            node: the values by key.
            where: dotted path of `node`, with its closing dot, for messages.
            ignored: keys of `node` that the caller reads.
        """
        types, given, values = hints(schema), list(node), dict[str, Any]()
        defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(schema)}
        typed = OmegaConf.structured(schema)
        for key in given:
            if key not in types and key not in ignored:
                self.wrong.append(f"{where}{key} is not a setting: {near(str(key), keys(schema), where)}")
        for name, hint in types.items():
            value: Any = self.value(node, name, where) if name in given else defaults.get(name)
            if value == MISSING or (value == "" and defaults.get(name) == MISSING):
                self.missing.append(f"{where}{name} is missing: give {where}{name}=VALUE")
            elif name in given and value is not UNREAD:
                if is_section(hint) and OmegaConf.is_dict(value):
                    value = self.settings(hint, value, f"{where}{name}.")
                elif (section := named_section(hint)) and OmegaConf.is_dict(value):
                    value = self._named(section, value, f"{where}{name}.")
                else:
                    value = self._converted(hint, value, typed, where, name)
                if value is not UNREAD:
                    values[name] = value
        return schema(**values)

    def _named(self, section: type, node: DictConfig, where: str) -> dict[str, Any]:
        """Reads sections by names that the user has chosen."""
        read = {}
        for name in map(str, node):
            value = self.value(node, name, where)
            if OmegaConf.is_dict(value):
                read[name] = self.settings(section, value, f"{where}{name}.")
            elif value is not UNREAD:
                self.wrong.append(
                    f"{where}{name} = {show(value)}: must be settings, as in {where}{name}.{keys(section)[0]}=VALUE"
                )
        return read

    def value(self, node: DictConfig, name: str, where: str) -> Any:
        """Returns the value under `name`, interpolations resolved; a list as a list, a dict as a node."""
        try:
            value = node[name]
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_list(value) else value
        except MissingMandatoryValue:
            return MISSING
        except InterpolationToMissingValueError:
            self.waits = True  # for a missing value, which is reported where it stands
            return UNREAD
        except OmegaConfBaseException as error:
            self.wrong.append(f"{where}{name} = {node._get_node(name)}: {str(error).splitlines()[0]}")
            return UNREAD

    def _converted(self, hint: Any, value: Any, typed: DictConfig, where: str, name: str) -> Any:
        """Converts `value` to the type of its field; returns `UNREAD` and adds a problem if that fails."""
        kinds = [kind for kind in get_args(hint) if kind is not NoneType] if isinstance(hint, UnionType) else [hint]
        optional, kind = hint not in kinds, kinds[-1]
        if optional and value is None:
            return None
        members = listed_enum(kind)
        if is_section(kind):
            expected = f"settings, given one by one as in {where}{name}.{keys(kind)[0]}=VALUE"
        elif {int, float} <= set(kinds):
            # OmegaConf knows no union with a list.
            numbers = value if isinstance(value, list) and len(kinds) > 2 else [value]
            if all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
                return value
            expected = "a number or a list of numbers" if len(kinds) > 2 else "a number"
        elif isinstance(kind, type) and issubclass(kind, Enum):
            choices = [member.value for member in kind]
            if value in choices:
                return kind(value)
            expected = f"one of {', '.join(choices)}"
        elif members:
            choices = [member.value for member in members]
            if isinstance(value, list) and set(value) <= set(choices):
                return [members(item) for item in value]
            expected = f"a list, as in [a,b], of {', '.join(choices)}"
        elif _was_text(kind, value):
            expected = "text: put quotes around it where it is written, for YAML has read something else"
        else:
            try:
                if kind is dict and OmegaConf.is_dict(value):
                    return OmegaConf.to_container(value, resolve=True)
                typed[name] = value
                read: Any = OmegaConf.to_container(typed)
                converted = read[name]
                if not isinstance(converted, float) or math.isfinite(converted):
                    return converted
            except InterpolationToMissingValueError:
                return OmegaConf.to_container(value)  # the missing value is reported where it stands
            except OmegaConfBaseException:
                pass
            expected = _EXPECTED.get(kind, "a list, as in [a,b]")
        self.wrong.append(f"{where}{name} = {show(value)}: must be {expected}{' or null' if optional else ''}")
        return UNREAD
