"""The shape that somebody asks for, in whole numbers that the network and the layout allow."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from minitron_megatron.config.schema import ModelParallelConfig, TargetConfig
from minitron_megatron.errors import raise_if_any
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape, group_problem, layers_pattern

# What tensor cores want of bf16 matrices: 64 at best, 8 at least.
_ALIGNMENTS = (64, 8, 1)


@dataclass
class Target:
    """How many of everything shall stay.

    Attributes:
        attention, mlp: sublayers.
        keep_layers: these layers, instead of those of highest score.
        hidden, ffn: channels, and neurons per MLP.
        groups: query groups of every attention.
        heads_per_group: query heads in each of them.
        rounded: what was asked for and what became of it, one sentence each.
    """

    attention: int
    mlp: int
    keep_layers: list[int] | None
    hidden: int
    ffn: int
    groups: int
    heads_per_group: int
    rounded: list[str] = field(default_factory=list)

    @property
    def sizes(self) -> dict:
        """All of it that decides what stays."""
        return {name: value for name, value in vars(self).items() if name != "rounded"}

    def shape_of(self, source: ModelShape) -> ModelShape:
        """What a network of whole layers becomes."""
        return source.replace(
            pattern=layers_pattern(self.attention),
            hidden=self.hidden,
            ffn=self.ffn,
            num_query_groups=self.groups,
            num_heads=self.groups * self.heads_per_group,
        )

    @property
    def by_sublayer(self) -> bool:
        """Whether layers do not stay or go as a whole."""
        return self.attention != self.mlp


def _unsupported(asked: dict[str, Any]) -> list[str]:
    """What no plan can say yet: sizes by layer, and those of other kinds of layers."""
    known = ("layers", "attention", "mlp", "hidden", "ffn", "groups", "heads")
    return [
        *(
            f"target.{name} = {size}: give one size for all layers"
            for name, size in asked.items()
            if type(size) is list
        ),
        *(f"target.{name}: the network has none: leave it out" for name in asked if name not in known),
    ]


def resolve_target(source: ModelShape, config: TargetConfig, parallel: ModelParallelConfig) -> Target:
    """What `config` asks for, as numbers.

    Args:
        source: the network to prune.
        config: sizes, or fractions of the source's.
        parallel: the layout that the result is for; fractions are rounded to what it divides.

    Raises:
        ConfigError: something is larger than in the source, or no plan can reach it.
    """
    attention, mlp = len(source.sublayers(ATTENTION)), len(source.sublayers(MLP))
    asked = config.sizes if config.layers is None else {**config.sizes, "layers": config.layers}
    raise_if_any(_unsupported(asked))
    problems, rounded = [], []

    def size(
        name: str,
        has: int,
        multiple: int = 1,
        exact: bool = True,
        whole: int | None = None,
        fits: Callable[[int], bool] = bool,
    ) -> int:
        """The number for one size: `has` if none is asked for, else rounded where it may be, to the nearest multiple
        that `fits`; a share is of `whole`."""
        wanted, whole = asked.get(name, has), whole or has
        if wanted > has:
            owner = "the source's" if has == whole else "the kept groups'"
            problems.append(f"target.{name} = {wanted} is larger than {owner} {has}: pruning only removes")
        share = isinstance(wanted, float) and wanted <= 1
        found = whole * wanted if share else int(wanted)
        if found != has and (share or not exact):
            options = filter(fits, range(multiple, has + 1, multiple))
            nearest = min(options, key=lambda option: (abs(option - found), -option), default=None)
            if nearest is None:
                problems.append(
                    f"target.{name} = {wanted} shall be a multiple of {multiple}, and the source has {has}: lower "
                    f"target.round_to or parallel.tensor"
                )
            elif nearest != found or share:
                why = f", a multiple of {multiple}" if multiple > 1 else ""
                rounded.append(f"target.{name} = {wanted} of {whole} became {nearest}{why}")
            found = nearest or has
        return int(found)

    def multiple_of(has: int, shards: int) -> int:
        if config.round_to:
            return math.lcm(config.round_to, shards)
        return next(a * shards for a in _ALIGNMENTS if a * shards <= has // 8 or a == 1)

    def can_be_shared(groups: int) -> bool:
        shape = source.replace(num_query_groups=groups, num_heads=groups * source.heads_per_group)
        return group_problem(shape, parallel.tensor) is None

    exact = config.round_to is None
    groups = size("groups", source.num_query_groups, fits=can_be_shared)
    hidden = size("hidden", source.hidden, multiple_of(source.hidden, 1), exact)
    ffn = size("ffn", source.ffn, multiple_of(source.ffn, parallel.tensor), exact)
    has_heads = groups * source.heads_per_group
    heads = size("heads", has_heads, math.lcm(groups, parallel.tensor), whole=source.num_heads)
    if heads % groups:
        problems.append(
            f"target.heads = {heads} is not a multiple of the {groups} query groups: every group keeps the same "
            f"number of heads"
        )
    if "layers" in asked:
        attention = mlp = size("layers", attention)
    else:
        attention, mlp = size("attention", attention), size("mlp", mlp)
    if config.keep_layers is not None:
        if config.keep_layers[-1] >= attention:
            problems.append(
                f"target.keep_layers names layer {config.keep_layers[-1]}, and the source has {attention}: "
                f"they count from 0"
            )
        attention = mlp = len(config.keep_layers)
    raise_if_any(problems)
    return Target(attention, mlp, config.keep_layers, hidden, ffn, groups, heads // groups, rounded)
