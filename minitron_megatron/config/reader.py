"""Strict reading of OmegaConf nodes into dataclasses, going on after a problem so that all are found."""

import dataclasses
import difflib
import math
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationToMissingValueError, MissingMandatoryValue, OmegaConfBaseException

from minitron_megatron.config.fields import hints, is_section

MISSING = "???"
"""Default of a setting that has to be given."""

UNREAD = object()
"""What `Reader` returns instead of a value that cannot be had."""

_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "text", dict: "settings by name"}


def near(name: str, known: list[str], where: str = "") -> str:
    """The end of a message about an unknown name: the one that was probably meant, or all that there are.

    Args:
        name: what was written.
        known: what could have been, dotted where it lies in a section.
        where: dotted path of them all, with its closing dot.
    """
    meant = [key for key in known if key.split(".")[-1] == name] or difflib.get_close_matches(name, known, n=1)
    if meant:
        return f"did you mean {' or '.join(where + key for key in meant)}?"
    return f"there are {', '.join(dict.fromkeys(key.split('.')[0] for key in known))}"


def keys(schema: type) -> list[str]:
    """All settings of a dataclass, those of its sections dotted."""
    names = []
    for name, hint in hints(schema).items():
        names.append(name)
        if is_section(hint):
            names += [f"{name}.{key}" for key in keys(hint)]
    return names


def listed_enum(hint: Any) -> type[Enum] | None:
    """The enum whose members a list of this type has, if it does."""
    kinds = [kind for kind in get_args(hint) if isinstance(kind, type) and get_origin(kind) is None]
    return next((kind for kind in kinds if issubclass(kind, Enum)), None)


def show(value: Any) -> str:
    """A value as it is written in YAML."""
    if isinstance(value, Enum):
        return value.value
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    return f"[{', '.join(map(show, value))}]" if isinstance(value, list) else repr(value)


class Reader:
    """Reads settings and collects what is wrong with them.

    Attributes:
        missing: one sentence per mandatory value that is not given.
        wrong: one sentence per unknown key, value of a wrong type or broken interpolation.
        waits: whether a value depends on one that is not given, and kept its default meanwhile.
    """

    def __init__(self) -> None:
        self.missing: list[str] = []
        self.wrong: list[str] = []
        self.waits = False

    def settings(self, schema: type, node: DictConfig, where: str = "", ignored: tuple[str, ...] = ()) -> Any:
        """An object of `schema`. What cannot be read keeps its default.

        Args:
            schema: the dataclass that says which keys exist and of which type they are.
            node: the values, by key.
            where: dotted path of `node`, with its closing dot, for messages.
            ignored: keys of `node` that somebody else reads.
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
                else:
                    value = self._converted(hint, value, typed, where, name)
                if value is not UNREAD:
                    values[name] = value
        return schema(**values)

    def value(self, node: DictConfig, name: str, where: str) -> Any:
        """The value under `name`, its interpolations resolved; a list as a list, a dict as a node."""
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
        """`value` as the type of its field, or `UNREAD` and a problem."""
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
