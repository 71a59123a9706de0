"""Metadata of settings: whether one affects the result, and settings that are registered at run time."""

import dataclasses
from types import MappingProxyType
from typing import Any, TypeGuard, get_args, get_origin, get_type_hints

from minitron_megatron.errors import raise_if_any

SAME_RESULT = MappingProxyType({"changes_result": False})
"""Marks a setting that does not affect the result: a folder, a layout, a number of processes.

On a section it applies to all of its settings.
"""


def changes_result(field: dataclasses.Field[Any]) -> bool:
    """Returns whether a setting affects the result of its verb. It does unless it is marked `SAME_RESULT`."""
    return field.metadata.get("changes_result", True)


OPEN = MappingProxyType({"open": True})
"""Marks the field in which an `OpenSettings` keeps its registered settings."""


@dataclasses.dataclass(frozen=True)
class OpenField:
    """A setting that was registered at run time.

    Attributes:
        hint: its type, as that of a field; a settings class makes it a section.
        meaning: help text.
    """

    hint: Any
    meaning: str = ""

    @property
    def default(self) -> Any:
        """None, or a section with its defaults."""
        return self.hint() if is_section(self.hint) else None


@dataclasses.dataclass(init=False)
class OpenSettings:
    """Base of settings classes that have registered settings in addition to their fields; `open_fields` lists them.

    Users write them like any other setting, in files, in overrides and as keyword arguments. Values that are not the
    default are kept by name in the field marked `OPEN`. Subclasses are decorated with `@dataclass(init=False)`.

    Raises:
        TypeError: an argument is none of the settings.
    """

    @classmethod
    def open_fields(cls) -> dict[str, OpenField]:
        """Returns the registered settings by name."""
        raise NotImplementedError

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = {field.name: field for field in _in_order(self)}
        positional = [name for name, field in fields.items() if not field.kw_only]
        given = dict(**dict(zip(positional[: len(args)], args, strict=True)), **kwargs)
        [store] = [name for name, field in fields.items() if _is_open(field)]
        named = {name: value for name, value in given.items() if name not in fields}
        further = {**given.pop(store, {}), **named}
        known = self.open_fields()
        if unknown := [name for name in further if name not in known]:
            raise TypeError(f"{type(self).__name__} has no {', '.join(unknown)}: it has {', '.join(hints(type(self)))}")
        for name, field in fields.items():
            if name in given:
                setattr(self, name, given[name])
            elif field.default_factory is not dataclasses.MISSING:
                setattr(self, name, field.default_factory())
            else:
                setattr(self, name, field.default)
        setattr(self, store, {name: value for name, value in further.items() if value != known[name].default})


def is_section(hint: Any) -> TypeGuard[type]:
    """Returns whether a setting of this type is a section, with settings of its own."""
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def named_section(hint: Any) -> type | None:
    """Returns the section of which a setting of this type has any number, by names that users choose; or None."""
    values = get_args(hint)[1:] if get_origin(hint) is dict else ()
    return next((kind for kind in values if is_section(kind)), None)


def _is_open(field: dataclasses.Field[Any]) -> bool:
    return field.metadata.get("open", False)


def _in_order(schema: Any) -> list[dataclasses.Field[Any]]:
    """Returns the fields, keyword-only ones last, whichever base they come from."""
    return sorted(dataclasses.fields(schema), key=lambda field: bool(field.kw_only))


def hints(schema: type) -> dict[str, Any]:
    """Returns the type of every setting of a settings class, by name and in order.

    Raises:
        ConfigError: a registered setting has the name of a field.
    """
    types, by_name = get_type_hints(schema), dict[str, Any]()
    for field in _in_order(schema):
        if not _is_open(field):
            by_name[field.name] = types[field.name]
            continue
        assert issubclass(schema, OpenSettings)
        further = {name: own.hint for name, own in schema.open_fields().items()}
        raise_if_any(
            [f"{name} cannot be registered: {schema.__name__} has it already" for name in further if name in types]
        )
        by_name |= further
    return by_name


def values(settings: Any) -> dict[str, Any]:
    """Returns the value of every setting, by name and in order."""
    by_name: dict[str, Any] = {}
    for field in _in_order(settings):
        value = getattr(settings, field.name)
        if not _is_open(field):
            by_name[field.name] = value
            continue
        by_name |= {name: value.get(name, own.default) for name, own in settings.open_fields().items()}
    return by_name
