"""Makes help texts from the schemas: names, defaults and docstrings."""

import inspect
import re
import textwrap
from enum import Enum
from types import UnionType
from typing import Any, get_args

from minitron_megatron.config.compose import defaults
from minitron_megatron.config.fields import OpenSettings, hints, is_section
from minitron_megatron.config.reader import MISSING, listed_enum, show
from minitron_megatron.config.schema import SCHEMAS


def summary(verb: str) -> str:
    """Returns one line that says what a verb does."""
    return (inspect.getdoc(SCHEMAS[verb]) or "").splitlines()[0].partition(": ")[2]


def describe(verb: str, width: int = 110) -> str:
    """Returns the help text of a verb: a line for every setting with its default and meaning."""
    rows = _rows(SCHEMAS[verb], defaults(verb), "")
    column = max(len(setting) for setting, _ in rows) + 4
    return "\n".join(
        textwrap.fill(meaning, width, initial_indent=f"  {setting}".ljust(column), subsequent_indent=" " * column)
        if meaning
        else f"  {setting}"
        for setting, meaning in rows
    )


def _rows(schema: type, values: dict[str, Any], where: str) -> list[tuple[str, str]]:
    """Returns `name=default` and meaning of every setting."""
    rows, meanings = [], _meanings(schema)
    for name, hint in hints(schema).items():
        kind = get_args(hint)[0] if isinstance(hint, UnionType) else hint
        default, meaning = values[name], meanings.get(name, "")
        if is_section(kind):
            rows += _rows(kind, default, f"{where}{name}.")
            continue
        if kind is dict:
            if default is not None:
                default, meaning = "...", f"{meaning} By default: {', '.join(default)}."
        elif isinstance(kind, type) and issubclass(kind, Enum):
            meaning = f"{meaning} [{', '.join(member.value for member in kind)}]".strip()
        elif members := listed_enum(kind):
            meaning = f"{meaning} [{', '.join(member.value for member in members)}]"
        rows.append((f"{where}{name}={_shown(default)}", meaning))
    return rows


def _shown(default: Any) -> str:
    if isinstance(default, list):
        return f"[{','.join(default)}]"
    if isinstance(default, str):
        return "..." if default == MISSING else default
    return show(default)


def _meanings(schema: type) -> dict[str, str]:
    """Returns the entries below `Attributes:` in the docstrings of a class and its bases, and those of open fields."""
    meanings: dict[str, str] = {}
    docs = [inspect.cleandoc(base.__doc__ or "") for base in reversed(schema.__mro__)]
    for line in "\n".join(doc.partition("Attributes:\n")[2] for doc in docs).splitlines():
        if entry := re.match(r" {4}(\w+): (.*)", line):
            name, meanings[name] = entry[1], entry[2]
        elif line.startswith(" " * 8):
            meanings[name] += f" {line.strip()}"
    if issubclass(schema, OpenSettings):
        meanings |= {name: own.meaning for name, own in schema.open_fields().items()}
    return meanings
