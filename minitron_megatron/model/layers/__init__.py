"""The kinds of layers, by their symbol in a network's pattern."""

from minitron_megatron.config import axes
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP
from minitron_megatron.model.layers.sublayer import CACHE_SCALE, CachedTensor, PrunableAxis, Slot, Sublayer

__all__ = [
    "CACHE_SCALE",
    "DENSE",
    "KINDS",
    "CachedTensor",
    "PrunableAxis",
    "Slot",
    "Sublayer",
    "prunable_axes",
    "register",
]

DENSE: tuple[type[Sublayer], ...] = (Attention, MLP)
"""The sublayers of a dense transformer layer, as Megatron-Core's TransformerConfig describes it."""

KINDS: dict[str, type[Sublayer]] = {}
"""Every kind by its symbol. `register` fills it."""


def register(kind: type[Sublayer]) -> type[Sublayer]:
    """Registers a kind. Can be used as a class decorator.

    Raises:
        ValueError: another kind has its symbol, its name or a setting of its axes already.
    """
    for other in KINDS.values():
        names = {"symbol": "symbol", "name": "name"}
        clashes = [what for what, name in names.items() if getattr(other, name) == getattr(kind, name)]
        shared = {axis.setting for axis in other.prunable} & {axis.setting for axis in kind.prunable}
        clashes += [f"setting {setting}" for setting in sorted(shared)]
        if clashes:
            raise ValueError(
                f"{kind.__module__}.{kind.__qualname__} cannot be registered: its {' and '.join(clashes)} is that of "
                f"{other.__module__}.{other.__qualname__}; give it another one"
            )
    KINDS[kind.symbol] = kind
    where = f"{kind.__module__}.{kind.__qualname__}"
    number = f"{kind.title} sublayers to keep, where sublayers are scored by themselves."
    scored = kind.scored()
    axes.register(
        axes.Axis(kind.name, number, where),
        *(
            axes.Axis(axis.setting, axis.meaning, where, axis.axis.name, by_layer=True, is_scored=axis in scored)
            for axis in kind.prunable
        ),
    )
    return kind


def prunable_axes() -> dict[str, tuple[type[Sublayer], PrunableAxis]]:
    """Returns kind and axis by the axis' setting."""
    return {axis.setting: (kind, axis) for kind in KINDS.values() for axis in kind.prunable}


for _kind in DENSE:
    register(_kind)
