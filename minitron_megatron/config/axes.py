"""Which sizes of a network can be made smaller, under the names that `target` has for them.

Whoever builds a kind of layer registers its sizes here, at import; so does a plugin. From then on they are settings.
"""

from dataclasses import dataclass
from importlib import import_module

from minitron_megatron.errors import raise_if_any


@dataclass(frozen=True)
class Axis:
    """One of them.

    Attributes:
        name: of the setting.
        meaning: for the help text.
        owner: module that registers it.
        table: what the axis table calls it; empty of a number of sublayers, which is no axis of a parameter.
        by_layer: whether every layer may have a size of its own.
        is_scored: whether its elements are ranked by scores of theirs.
    """

    name: str
    meaning: str
    owner: str
    table: str = ""
    by_layer: bool = False
    is_scored: bool = False

    @property
    def is_size(self) -> bool:
        """Whether it is a size of the layers, or else a number of sublayers of one kind."""
        return bool(self.table)


_registered: dict[str, Axis] = {}

_OWN = "minitron_megatron.model.network"
"""Whose import registers the sizes that this package knows, in rooms above this one."""


def register(*axes: Axis) -> None:
    """Make axes known.

    Raises:
        ConfigError: a name is registered already.
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
    """What is registered, by name."""
    import_module(_OWN)
    return dict(_registered)


def sublayers() -> list[str]:
    """Names of the numbers of sublayers."""
    return [name for name, axis in all_axes().items() if not axis.is_size]


def scored_axes() -> dict[str, Axis]:
    """What scores are computed of, by name."""
    return {name: axis for name, axis in all_axes().items() if axis.is_scored}
