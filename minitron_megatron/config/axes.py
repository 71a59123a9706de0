"""The registry of prunable axes, each of which is a setting of `target`.

Kinds of layers, those of plugins included, register their axes here at import.
"""

from dataclasses import dataclass
from importlib import import_module

from minitron_megatron.errors import raise_if_any


@dataclass(frozen=True)
class Axis:
    """A prunable axis: a size of the layers, or a number of sublayers of one kind.

    Attributes:
        name: of the setting.
        meaning: help text.
        owner: module that registers it.
        table: name in the axis table; empty for a number of sublayers, which is no axis of a parameter.
        by_layer: whether layers may differ in this size.
        is_scored: whether its elements have scores of their own.
    """

    name: str
    meaning: str
    owner: str
    table: str = ""
    by_layer: bool = False
    is_scored: bool = False

    @property
    def is_size(self) -> bool:
        """Whether it is a size of the layers, rather than a number of sublayers."""
        return bool(self.table)


_registered: dict[str, Axis] = {}

_OWN = "minitron_megatron.model.network"
"""Importing this module registers the axes of this package's own kinds of layers."""


def register(*axes: Axis) -> None:
    """Registers axes.

    Raises:
        ConfigError: a name is already registered.
    """
    for axis in axes:
        other = _registered.get(axis.name)
        raise_if_any(
            [f"target.{axis.name} is registered by {other.owner} and by {axis.owner}: rename one of them"]
            if other
            else []
        )
        _registered[axis.name] = axis


def all_axes() -> dict[str, Axis]:
    """Returns all registered axes by name."""
    import_module(_OWN)
    return dict(_registered)


def sublayers() -> list[str]:
    """Returns the names of the axes that are numbers of sublayers."""
    return [name for name, axis in all_axes().items() if not axis.is_size]


def scored_axes() -> dict[str, Axis]:
    """Returns the axes whose elements have scores, by name."""
    return {name: axis for name, axis in all_axes().items() if axis.is_scored}
