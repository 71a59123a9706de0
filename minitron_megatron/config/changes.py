"""Compares the settings of two runs of a verb, as the plain values that files hold."""

import dataclasses
from collections.abc import Iterator
from enum import Enum
from typing import Any, get_type_hints

from minitron_megatron.config.fields import changes_result, is_section

GONE = {"loss.lm_schedule": "constant"}
"""Settings of earlier versions that there are no more, with the value that says as much as none."""


def flat(settings: dict[str, Any], where: str = "") -> dict[str, Any]:
    """Returns settings by dotted name, without sections."""
    values: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            values |= flat(value, f"{where}{name}.")
        else:
            values[f"{where}{name}"] = value
    return values


def content(schema: type | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the settings that affect the result, by dotted name.

    Args:
        schema: the settings class; None if it is unknown, then every setting may affect the result.
        settings: plain values.
    """
    ignored = tuple(_ignored(schema, "")) if schema else ()
    return {
        name: value
        for name, value in flat(settings).items()
        if not any(name == other or name.startswith(f"{other}.") for other in ignored)
        and not (name in GONE and value == GONE[name])
    }


def defaults(schema: type, where: str = "") -> Iterator[tuple[str, Any]]:
    """Yields plain defaults of a verb's settings by dotted name: what runs of versions without a setting used."""
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if is_section(types[field.name]):
            yield from defaults(types[field.name], f"{where}{field.name}.")
        elif value is not dataclasses.MISSING and value != "???" and not isinstance(value, list | dict):
            yield f"{where}{field.name}", value.value if isinstance(value, Enum) else value


def _ignored(schema: type, where: str) -> Iterator[str]:
    """Yields dotted names of the settings and sections that do not affect the result."""
    types = get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if not changes_result(field):
            yield f"{where}{field.name}"
        elif is_section(types[field.name]):
            yield from _ignored(types[field.name], f"{where}{field.name}.")


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Returns name, old and new value of every setting that differs; None where there is no value.

    A setting that is missing on one side and off on the other (null, false, 0 or empty) does not count: one of the two
    versions did not have it.
    """
    return [
        (name, before.get(name), after.get(name))
        for name in {**before, **after}
        if before.get(name) != after.get(name)
        and ((name in before and name in after) or before.get(name) or after.get(name))
    ]
