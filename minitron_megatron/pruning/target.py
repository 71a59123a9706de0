"""Resolves a requested shape to sizes that the network and the layout allow."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from minitron_megatron.config.schema import ModelParallelConfig, TargetConfig
from minitron_megatron.errors import raise_if_any
from minitron_megatron.model.axes import HIDDEN
from minitron_megatron.model.layers import PrunableAxis, Sublayer
from minitron_megatron.model.network import Network

# Multiples that tensor cores want for bf16 matrices: 64 at best, 8 at least.
_ALIGNMENTS = (64, 8, 1)

Size = int | float
"""A number of elements, or a fraction of the source's."""


@dataclass
class Target:
    """The resolved shape: how much of everything is kept.

    Attributes:
        hidden: channels of the residual stream.
        sublayers: all sublayers of the source, each with the sizes that it gets if it is kept.
        counts: number of sublayers to keep, by the name of their kind.
        layers: number of transformer layers to keep; None if sublayers are dropped separately.
        keep_layers: the layers to keep, instead of those of highest score.
        rounded: a sentence for each size that was rounded.
    """

    hidden: int
    sublayers: tuple[Sublayer, ...]
    counts: dict[str, int]
    layers: int | None
    keep_layers: list[int] | None = None
    rounded: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, Any]:
        """Everything that decides what is kept, as plain values: one number where all layers agree, else a list."""
        sizes: dict[str, Any] = {**self.counts, "keep_layers": self.keep_layers, HIDDEN.name: self.hidden}
        for kind in dict.fromkeys(type(sublayer) for sublayer in self.sublayers):
            own = [sublayer for sublayer in self.sublayers if type(sublayer) is kind]
            for axis in kind.prunable:
                lengths = [sublayer.sizes[axis.axis.name] for sublayer in own]
                name = f"{axis.setting}_per_{axis.axis.within}" if axis.axis.within else axis.setting
                sizes[name] = lengths[0] if len(set(lengths)) == 1 else lengths
        return sizes

    def network_of(self, source: Network) -> Network | None:
        """Returns the network that the target leaves; None if that depends on how its sublayers are ranked."""
        if self.layers is None:
            return None
        layers = (
            source.layers[: self.layers] if self.keep_layers is None else [source.layers[n] for n in self.keep_layers]
        )
        sublayers = tuple(self.sublayers[position] for layer in layers for position in layer)
        return source.replace(sublayers=sublayers, hidden_size=self.hidden)


def resolve_target(source: Network, config: TargetConfig, parallel: ModelParallelConfig) -> Target:
    """Resolves a requested shape to whole numbers.

    Args:
        source: the network to prune.
        config: sizes, or fractions of the source's.
        parallel: the layout that the result is for; fractions are rounded to what it divides.

    Raises:
        ConfigError: something is larger than in the source, or no plan can reach it.
    """
    resolver = _Resolver(config, parallel)
    hidden = resolver.size(
        HIDDEN.name,
        config.sizes.get(HIDDEN.name),
        source.hidden_size,
        resolver.multiple(source.hidden_size, 1),
        exact=config.round_to is None,
    )
    sublayers = resolver.sublayers(source)
    counts, layers = resolver.depth(source)
    raise_if_any(list(dict.fromkeys(resolver.problems)))
    rounded = list(dict.fromkeys(resolver.rounded))
    return Target(hidden, sublayers, counts, layers, config.keep_layers, rounded)


def in_terms_of_target(problem: str, network: Network, config: TargetConfig) -> str:
    """Renames a size in a layout problem to the setting by which the user chose it.

    `target.mlp.ffn_hidden_size = 31` becomes `target.ffn = 31`, if `target.ffn` is set.

    Args:
        problem: of `layout_problems`, with `target` for the network.
        network: what the target leaves.
        config: the settings.
    """
    for sublayer, _ in network.alike():
        for axis in sublayer.prunable:
            for name in _fields_of(sublayer, axis) if axis.setting in config.sizes else ():
                size = rf"^target(?:\.(layers? [\d, ]+))?\.{sublayer.name}\.{name} = (\d+)"
                if match := re.match(size, problem):
                    where = f" in {match[1]}" if match[1] else ""
                    return f"target.{axis.setting} = {match[2]}{where}{problem[match.end() :]}"
    return problem


def _fields_of(sublayer: Sublayer, axis: PrunableAxis) -> Iterator[str]:
    """Yields the fields of a sublayer that hold the number of its elements along an axis."""
    resized = sublayer.resized({axis.axis.name: sublayer.sizes[axis.axis.name] + 1})
    for own in fields(sublayer):
        size = getattr(sublayer, own.name)
        if size == sublayer.total(axis) and size != getattr(resized, own.name):
            yield own.name


class _Resolver:
    """Resolves sizes one by one, and collects problems and roundings."""

    def __init__(self, config: TargetConfig, parallel: ModelParallelConfig):
        self.config = config
        self.tensor = parallel.tensor
        self.problems: list[str] = []
        self.rounded: list[str] = []

    def size(
        self,
        name: str,
        wanted: Size | None,
        has: int,
        multiple: int = 1,
        exact: bool = True,
        whole: int | None = None,
        fits: Callable[[int], bool] = bool,
        where: str = "",
        owner: str = "the source's",
    ) -> int:
        """Resolves one size to a whole number.

        Args:
            name: of the setting.
            wanted: requested size; None for all of `has`.
            has: largest possible size.
            multiple: what a rounded size must be a multiple of.
            exact: take whole numbers as they are.
            whole: size that a fraction refers to; None for `has`.
            fits: returns whether a size is possible.
            where: layer, for messages, if layers differ.
            owner: what `has` is the size of, for messages.
        """
        whole, wanted = whole or has, has if wanted is None else wanted
        if wanted > has:
            self.problems.append(f"target.{name} = {wanted}{where} is larger than {owner} {has}: pruning only removes")
        share = isinstance(wanted, float) and wanted <= 1
        number = whole * wanted if share else int(wanted)
        if number != has and (share or not exact):
            options = filter(fits, range(multiple, has + 1, multiple))
            nearest = min(options, key=lambda option: (abs(option - number), -option), default=None)
            if nearest is None:
                self.problems.append(
                    f"target.{name} = {wanted}{where} must be a multiple of {multiple}, and the source has {has}: "
                    f"lower target.round_to or parallel.tensor"
                )
            elif nearest != number or share:
                why = f", a multiple of {multiple}" if multiple > 1 else ""
                self.rounded.append(f"target.{name} = {wanted} of {whole}{where} became {nearest}{why}")
            number = nearest or has
        return int(number)

    def multiple(self, has: int, shards: int) -> int:
        """Returns what an aligned size is rounded to a multiple of."""
        if self.config.round_to:
            return math.lcm(self.config.round_to, shards)
        return next(a * shards for a in _ALIGNMENTS if a * shards <= has // 8 or a == 1)

    def sublayers(self, source: Network) -> tuple[Sublayer, ...]:
        """Returns every sublayer of the source with the requested sizes."""
        resized = list(source.sublayers)
        for kind in source.kinds:
            positions = source.positions(kind)
            for axis in kind.prunable:
                differ = len({(source.sublayers[p], resized[p]) for p in positions}) > 1
                by_layer = differ or isinstance(self.config.sizes.get(axis.setting), list)
                done: dict[tuple, Sublayer] = {}
                for position, wanted in zip(positions, self._by_sublayer(axis, kind, len(positions)), strict=True):
                    where = f" in {source.describe(position)}" if by_layer else ""
                    case = source.sublayers[position], resized[position], axis, wanted, where
                    if case not in done:
                        done[case] = self._resized(*case)
                    resized[position] = done[case]
        return tuple(resized)

    def _by_sublayer(self, axis: PrunableAxis, kind: type[Sublayer], count: int) -> list[Size | None]:
        """Returns the requested size of an axis for each sublayer of the kind."""
        given = self.config.sizes.get(axis.setting)
        if not isinstance(given, list):
            return [given] * count
        if len(given) != count:
            self.problems.append(
                f"target.{axis.setting} has {len(given)} sizes, and the source has {count} {kind.title} sublayers: "
                f"give one for each, or one for all"
            )
            return [None] * count
        return given

    def _resized(
        self, source: Sublayer, sublayer: Sublayer, axis: PrunableAxis, wanted: Size | None, where: str
    ) -> Sublayer:
        """Resizes a sublayer along one axis; its outer axes are already resized."""
        outer, shards = sublayer.outer(axis), sublayer.multiple(axis, self.tensor)
        has = sublayer.total(axis)
        # If ranks cannot share the outer axis, the check of the layout reports it.
        is_unsplittable = outer is not None and bool(sublayer.split_problems(self.tensor, ""))

        def with_total(total: int) -> Sublayer:
            return sublayer.resized({axis.axis.name: total // (sublayer.total(outer) if outer else 1)})

        total = self.size(
            axis.setting,
            wanted,
            has,
            self.multiple(has, shards) if axis.is_aligned else shards,
            exact=self.config.round_to is None or not axis.is_aligned,
            whole=source.total(axis),
            fits=lambda size: bool(size) and (is_unsplittable or not with_total(size).split_problems(self.tensor, "")),
            where=where,
            owner="the source's" if has == source.total(axis) else f"the kept {outer.setting if outer else ''}'",
        )
        if outer and total % sublayer.total(outer):
            self.problems.append(
                f"target.{axis.setting} = {total}{where} is not a multiple of the {sublayer.total(outer)} "
                f"{outer.elements}s: every {outer.elements} keeps the same number of {axis.setting}"
            )
            return sublayer
        return with_total(min(total, has))

    def depth(self, source: Network) -> tuple[dict[str, int], int | None]:
        """Returns how many sublayers of each kind are kept, and how many layers; None if not as whole layers."""
        asked, has = self.config.sizes, len(source.layers)
        counts = {kind.name: len(source.positions(kind)) for kind in source.kinds}
        for name in counts:
            counts[name] = self.size(name, asked.get(name), counts[name])
        layers: int | None = has
        if any(name in asked for name in counts):
            is_whole = all(len(layer) == len(source.kinds) for layer in source.layers)
            layers = next(iter(counts.values())) if is_whole and len(set(counts.values())) == 1 else None
        elif self.config.layers is not None or self.config.keep_layers is not None:
            layers = self.size("layers", self.config.layers, has)
            if self.config.keep_layers is not None:
                if self.config.keep_layers[-1] >= has:
                    self.problems.append(
                        f"target.keep_layers names layer {self.config.keep_layers[-1]}, and the source has {has}: "
                        f"they count from 0"
                    )
                layers = len(self.config.keep_layers)
            counts = {name: min(count, layers) for name, count in counts.items()}
        return counts, layers
