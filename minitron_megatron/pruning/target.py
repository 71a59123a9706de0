"""Resolves a requested shape to sizes that the network and the layout allow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minitron_megatron.config.schema import ModelParallelConfig, TargetConfig
from minitron_megatron.errors import raise_if_any
from minitron_megatron.model.axes import HIDDEN
from minitron_megatron.model.layers import PrunableAxis, Sublayer
from minitron_megatron.model.network import Network

# What tensor cores want of bf16 matrices: 64 at best, 8 at least.
_ALIGNMENTS = (64, 8, 1)

Size = int | float
"""A number of elements, or a share of those that there are."""


@dataclass
class Target:
    """How much of everything stays.

    Attributes:
        hidden: channels of the residual stream.
        sublayers: each of the source's with the sizes that it shall have, if it stays.
        counts: by the name of a kind, how many of its sublayers stay.
        layers: how many transformer layers stay; None if their sublayers stay or go by themselves.
        keep_layers: these layers, instead of those of highest score.
        rounded: what was asked for and what became of it, one sentence each.
    """

    hidden: int
    sublayers: tuple[Sublayer, ...]
    counts: dict[str, int]
    layers: int | None
    keep_layers: list[int] | None = None
    rounded: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict[str, Any]:
        """All of it that decides what stays, as plain values: one number where all layers agree, else a list."""
        sizes: dict[str, Any] = {**self.counts, "keep_layers": self.keep_layers, HIDDEN.name: self.hidden}
        for kind in dict.fromkeys(type(sublayer) for sublayer in self.sublayers):
            own = [sublayer for sublayer in self.sublayers if type(sublayer) is kind]
            for axis in kind.prunable:
                lengths = [sublayer.sizes[axis.axis.name] for sublayer in own]
                name = f"{axis.setting}_per_{axis.axis.within}" if axis.axis.within else axis.setting
                sizes[name] = lengths[0] if len(set(lengths)) == 1 else lengths
        return sizes

    def network_of(self, source: Network) -> Network | None:
        """What is left of a network, as far as that is known before its layers are ranked: None if it is not."""
        if self.layers is None:
            return None
        layers = (
            source.layers[: self.layers] if self.keep_layers is None else [source.layers[n] for n in self.keep_layers]
        )
        sublayers = tuple(self.sublayers[position] for layer in layers for position in layer)
        return source.replace(sublayers=sublayers, hidden_size=self.hidden)


def resolve_target(source: Network, config: TargetConfig, parallel: ModelParallelConfig) -> Target:
    """Resolve a requested shape to whole numbers.

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


class _Resolver:
    """Resolves sizes one by one, and gathers what is wrong or was rounded."""

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
        """The number for one size.

        Args:
            name: of the setting.
            wanted: what is asked for; None for all that there are.
            has: how many there are to choose from.
            multiple: of which it has to be one, where it may be rounded.
            exact: whole numbers are taken as they are.
            whole: that a share is of; None for `has`.
            fits: whether a number is possible.
            where: the layer it is of, where layers differ.
            owner: whose `has` is.
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
                    f"target.{name} = {wanted}{where} shall be a multiple of {multiple}, and the source has {has}: "
                    f"lower target.round_to or parallel.tensor"
                )
            elif nearest != number or share:
                why = f", a multiple of {multiple}" if multiple > 1 else ""
                self.rounded.append(f"target.{name} = {wanted} of {whole}{where} became {nearest}{why}")
            number = nearest or has
        return int(number)

    def multiple(self, has: int, shards: int) -> int:
        """What an aligned size is rounded to."""
        if self.config.round_to:
            return math.lcm(self.config.round_to, shards)
        return next(a * shards for a in _ALIGNMENTS if a * shards <= has // 8 or a == 1)

    def sublayers(self, source: Network) -> tuple[Sublayer, ...]:
        """Every sublayer of the source with the sizes that are asked for."""
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
        """What is asked for of an axis, for each of the kind's sublayers."""
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
        """A sublayer, whose outer axes are resized already, with another size along one axis."""
        outer, shards = sublayer.outer(axis), sublayer.multiple(axis, self.tensor)
        has = sublayer.total(axis)
        # A size of an outer axis that ranks cannot share is for the check of the layout to name.
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
        """How many sublayers of each kind stay, and how many whole layers, if layers stay or go as a whole."""
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
