"""What tells two runs of a verb apart, as far as their settings go. Works on plain values, as files hold them."""

import dataclasses
from collections.abc import Iterator
from enum import Enum
from typing import Any, get_type_hints

from minitron_megatron.config.fields import changes_result, is_section


def flat(settings: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Settings by dotted name, without sections."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            values |= flat(value, f"{where}{name}.")
        else:
            values[f"{where}{name}"] = value
    return values


def content(schema: type | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Those settings, by dotted name, that a result depends on.

    Args:
        schema: the settings class, or None where it is not known; then a result may depend on any of them.
        settings: plain values.
    """
    ignored = tuple(_ignored(schema, "")) if schema else ()
    return {
        name: value
        for name, value in flat(settings).items()
        if not any(name == other or name.startswith(f"{other}.") for other in ignored)
    }


def defaults(schema: type, where: str = "") -> Iterator[tuple[str, Any]]:
    """Plain defaults of a verb's settings by dotted name: what a setting was before a version that has it."""
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if is_section(types[field.name]):
            yield from defaults(types[field.name], f"{where}{field.name}.")
        elif value is not dataclasses.MISSING and value != "???" and not isinstance(value, list | dict):
            yield f"{where}{field.name}", value.value if isinstance(value, Enum) else value


def _ignored(schema: type, where: str) -> Iterator[str]:
    """Dotted names of the settings and sections that change no result."""
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if not changes_result(field):
            yield f"{where}{field.name}"
        elif is_section(types[field.name]):
            yield from _ignored(types[field.name], f"{where}{field.name}.")


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Name, old and new value of everything that is not the same in both; None where there is no value.

    A setting that one of them has not, and that is off in the other (null, false, 0 or empty), makes no difference: one
    of them is of a version without it.
    """
    return [
        (name, before.get(name), after.get(name))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
        and ((name in before and name in after) or before.get(name) or after.get(name))
    ]
