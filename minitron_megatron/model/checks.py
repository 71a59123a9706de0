"""Validates dataclasses whose values come from untrusted files."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from minitron_megatron.errors import raise_if_any

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")

# Ten times today's largest networks, so that a damaged file cannot ask for more memory than there is.
MAX_SIZE, MAX_LAYERS = 2**22, 10_000


def type_problems(values: "DataclassInstance", where: str) -> list[str]:
    """Returns which fields of a dataclass have a value of the wrong type, or a number that is not finite."""
    problems, hints = [], _hints(type(values))
    for field in dataclasses.fields(values):
        value, kind, wanted = getattr(values, field.name), hints[field.name], None
        if kind is int:
            wanted = None if type(value) is int else "a whole number"
        elif kind is float:
            is_number = type(value) in (int, float) and math.isfinite(value)
            wanted = None if is_number else "a finite number"
        elif kind in (bool, str) and type(value) is not kind:
            wanted = "true or false" if kind is bool else "text"
        if wanted:
            problems.append(f"{where}.{field.name} = {value!r}: must be {wanted}")
    return problems


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def size_problems(values: object, names: tuple[str, ...], where: str) -> list[str]:
    """Returns which sizes are below 1 or above `MAX_SIZE`."""
    return [
        f"{where}.{name} = {getattr(values, name)}: must be at least 1 and at most {MAX_SIZE}"
        for name in names
        if not 1 <= getattr(values, name) <= MAX_SIZE
    ]


def plain_values(values: "DataclassInstance") -> dict[str, Any]:
    """Converts a dataclass to JSON values; `from_plain` reads them back."""
    return {
        name: value.value if isinstance(value, Enum) else value for name, value in dataclasses.asdict(values).items()
    }


def field_problems(kind: type, values: Mapping[str, Any], where: str, ignored: tuple[str, ...] = ()) -> list[str]:
    """Returns why a dataclass cannot be made from JSON values: unknown names, missing ones, and unknown choices."""
    fields = {field.name: field for field in dataclasses.fields(kind) if field.name not in ignored}
    problems = [
        f"{where}.{name} is no field: the fields are {', '.join(fields)}" for name in values if name not in fields
    ]
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            problems.append(f"{where}.{name} is missing: give it a value")
    for name, choices in _choices(kind).items():
        if name in values and values[name] not in [choice.value for choice in choices]:
            listed = ", ".join(choice.value for choice in choices)
            problems.append(f"{where}.{name} = {values[name]!r}: must be one of {listed}")
    return problems


def from_plain(kind: type[T], values: Mapping[str, Any], where: str) -> T:
    """Makes a dataclass from JSON values.

    Raises:
        ConfigError: a field is unknown, missing, or has an invalid value.
    """
    raise_if_any(field_problems(kind, values, where))
    choices = _choices(kind)
    return kind(**{name: choices[name](value) if name in choices else value for name, value in values.items()})


def _choices(kind: type) -> dict[str, type[Enum]]:
    """Returns the fields of a dataclass that are enums."""
    hints = _hints(kind)
    return {
        field.name: hints[field.name]
        for field in dataclasses.fields(kind)
        if isinstance(hints[field.name], type) and issubclass(hints[field.name], Enum)
    }
