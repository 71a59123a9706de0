"""The shape to prune to."""

from dataclasses import dataclass, field
from typing import Any

from minitron_megatron.config.axes import all_axes, sublayers
from minitron_megatron.config.checks import at_least
from minitron_megatron.config.fields import OPEN, OpenField, OpenSettings

Size = int | float
"""A whole number, or a fraction of the source's."""


@dataclass(init=False)
class TargetConfig(OpenSettings):
    """The shape to prune to. null keeps a size as it is.

    A size is a whole number, or a fraction of the source's, as in 0.75; fractions are rounded, and 1.0 is all. Where
    layers may differ, a list has a size for each, as in `target.ffn=[1536,1152]`.

    Attributes:
        layers: transformer layers to keep.
        keep_layers: keep exactly these layers, counted from 0, whatever their scores.
        sizes: all other sizes that are given, by the names registered in `config.axes`.
        round_to: round hidden and ffn to a multiple of this. null rounds fractions to a multiple that suits tensor
            cores and the layout, and takes whole numbers as they are.
    """

    layers: Size | None = None
    keep_layers: list[int] | None = None
    sizes: dict[str, Any] = field(default_factory=dict, metadata=OPEN)  # of `Size | list[Size]`
    round_to: int | None = None

    @classmethod
    def open_fields(cls) -> dict[str, OpenField]:
        """Returns a setting for every registered axis: a size of the layers, or a number of sublayers."""
        of_layers, of_network = Size | list[Size] | None, Size | None
        return {
            name: OpenField(
                of_layers if axis.is_size else of_network,
                f"{axis.meaning} Or a list with one for each layer." if axis.by_layer else axis.meaning,
            )
            for name, axis in all_axes().items()
        }

    @property
    def is_empty(self) -> bool:
        return self.layers is None and self.keep_layers is None and not self.sizes

    @property
    def sublayers(self) -> list[str]:
        """Kinds of sublayers whose number is given."""
        return [name for name in sublayers() if name in self.sizes]

    def problems(self, where: str = "target.") -> list[str]:
        """Returns what is wrong with the settings, one sentence each."""
        problems = at_least(where, "round_to", self.round_to, 1)
        for name, size in {"layers": self.layers, **self.sizes}.items():
            if size is not None and (problem := _size_problem(name, size)):
                problems.append(f"{where}{name} = {size}: {problem}")
        if self.keep_layers is not None:
            others = [*(["layers"] if self.layers is not None else []), *self.sublayers]
            if others:
                problems.append(f"{where}keep_layers and {where}{others[0]} are both set: set one of them")
            if self.keep_layers != sorted(set(self.keep_layers)) or not self.keep_layers or self.keep_layers[0] < 0:
                problems.append(
                    f"{where}keep_layers = {self.keep_layers}: must name at least one layer, ascending, from 0"
                )
        if self.layers is not None and self.sublayers:
            kinds = " or ".join(where + name for name in sublayers())
            problems.append(f"{where}layers is set beside {kinds}: set the one or the others")
        return problems


def _size_problem(name: str, size: Size | list[Size]) -> str | None:
    """Returns what is wrong with one size, if anything."""
    allowed = "a whole number of at least 1, or a fraction of at most 1.0"
    if not isinstance(size, list):
        return None if _is_size(size) else f"must be {allowed}"
    axis = all_axes().get(name)
    if axis is None or not axis.is_size:
        return "is a number for the whole network: give one, and no list"
    if not axis.by_layer:
        return "is one size for all layers: give a number, and no list"
    return None if size and all(map(_is_size, size)) else f"every entry must be {allowed}"


def _is_size(size: Size) -> bool:
    return size > 0 and (size == int(size) or size <= 1)
