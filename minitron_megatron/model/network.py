"""The network description: embedding, an ordered list of sublayers, final norm, output projection.

`pattern` is the list with one symbol per sublayer, as in Megatron-Core's hybrid models: a dense transformer of N layers
is `*-` N times. `layers/` defines the symbols.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from typing import Any

from minitron_megatron.config.parallel import ModelParallelConfig
from minitron_megatron.errors import ConfigError, raise_if_any
from minitron_megatron.model.axes import HIDDEN, VOCAB
from minitron_megatron.model.checks import (
    MAX_LAYERS,
    field_problems,
    from_plain,
    plain_values,
    size_problems,
    type_problems,
)
from minitron_megatron.model.layers import KINDS, Slot, Sublayer
from minitron_megatron.model.layers.sublayer import alike
from minitron_megatron.model.norms import NormKind

_PATTERN = "pattern"
# Field names in files of earlier versions, which had the fields of all sublayers beside these, and today's names.
_FORMER_FIELDS = {
    "hidden": "hidden_size",
    "vocab": "vocab_size",
    "padded_vocab": "padded_vocab_size",
    "tied": "tie_embeddings",
}


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency-dependent scaling of the rotary embedding."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        raise_if_any(type_problems(self, "network.rotary_scaling"))


@dataclass(frozen=True)
class Network:
    """Sizes and switches of a network: everything that determines its parameters.

    Attributes:
        sublayers: in order, each with its own sizes.
        hidden_size: channels of the residual stream.
        vocab_size: tokens of the tokenizer.
        padded_vocab_size: rows of the embedding table, at least `vocab_size`.
        max_positions: longest sequence that the model was trained for, in tokens.
        norm_zero_centered: the norm multiplies by `1 + weight` (Nemotron, Gemma).
        rotary_fraction: share of each head's channels that is rotated, in (0, 1].
        tie_embeddings: the output projection shares the embedding table.
    """

    sublayers: tuple[Sublayer, ...]
    hidden_size: int
    vocab_size: int
    padded_vocab_size: int
    max_positions: int = 2048
    norm: NormKind = NormKind.RMSNORM
    norm_eps: float = 1e-5
    norm_zero_centered: bool = False
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    rotary_scaling: Llama3RopeScaling | None = None
    tie_embeddings: bool = False

    def __post_init__(self) -> None:
        raise_if_any(type_problems(self, "network"))
        problems = size_problems(self, ("hidden_size", "vocab_size", "padded_vocab_size"), "network")
        if len(self.sublayers) > 2 * MAX_LAYERS:
            problems.append(
                f"network.{_PATTERN} has {len(self.sublayers)} sublayers: at most {2 * MAX_LAYERS} are supported"
            )
        if self.padded_vocab_size < self.vocab_size:
            problems.append(
                f"network.padded_vocab_size = {self.padded_vocab_size} is below network.vocab_size = {self.vocab_size}"
            )
        if not 0 < self.rotary_fraction <= 1:
            problems.append(f"network.rotary_fraction = {self.rotary_fraction}: must be above 0 and at most 1")
        raise_if_any(problems)

    # The list of sublayers

    @cached_property
    def pattern(self) -> str:
        """The symbol of every sublayer, in order."""
        return "".join(sublayer.symbol for sublayer in self.sublayers)

    @cached_property
    def kinds(self) -> list[type[Sublayer]]:
        """The kinds of its sublayers, in the order of `KINDS`."""
        return [kind for kind in KINDS.values() if kind.symbol in self.pattern]

    def positions(self, kind: type[Sublayer]) -> list[int]:
        """Returns the positions of the sublayers of a kind."""
        return [position for position, sublayer in enumerate(self.sublayers) if type(sublayer) is kind]

    def number(self, position: int) -> int:
        """Returns the index of a sublayer among those of its kind."""
        return self.pattern[:position].count(self.pattern[position])

    @cached_property
    def layers(self) -> list[tuple[int, ...]]:
        """Positions of the sublayers in each transformer layer, as Megatron-Core's GPTModel groups them; see `Slot`."""
        layers: list[tuple[int, ...]] = []
        for position, sublayer in enumerate(self.sublayers):
            before = layers[-1] if layers else ()
            follows = len(before) == 1 and self.sublayers[before[0]].slot is Slot.MIXER
            if follows and sublayer.slot is Slot.CHANNEL:
                layers[-1] = (*before, position)
            else:
                layers.append((position,))
        return layers

    @cached_property
    def _layer_numbers(self) -> list[int]:
        return [number for number, positions in enumerate(self.layers) for _ in positions]

    def layer_of(self, position: int) -> int:
        """Returns the number of the transformer layer that a sublayer is in."""
        return self._layer_numbers[position]

    @cached_property
    def has_equal_layers(self) -> bool:
        """Whether all transformer layers are equal, so that checkpoints stack them in one tensor."""
        return len({tuple(self.sublayers[position] for position in layer) for layer in self.layers}) <= 1

    def describe(self, position: int) -> str:
        """Describes a sublayer for messages: "layer 3's attention"."""
        return f"layer {self.layer_of(position)}'s {self.sublayers[position].title}"

    def alike(self) -> Iterable[tuple[Sublayer, list[int]]]:
        """Returns each distinct sublayer once, with its positions."""
        return alike(self.sublayers)

    def replace(self, **changes: Any) -> "Network":
        return dataclasses.replace(self, **changes)

    def axis_sizes(self, position: int | None = None) -> dict[str, int]:
        """Returns the length of every axis of a sublayer's parameters, or by default of those outside of the layers.

        The vocabulary is the padded one.
        """
        own = {} if position is None else self.sublayers[position].sizes
        return {HIDDEN.name: self.hidden_size, VOCAB.name: self.padded_vocab_size, **own}

    # Plain values

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; `from_dict` reads them back.

        The fields of sublayers are below the name of their kind: one value if it is the same for all, else a list.
        """
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)[1:]}
        own["norm"] = self.norm.value
        own["rotary_scaling"] = self.rotary_scaling and dataclasses.asdict(self.rotary_scaling)
        plain: dict[str, Any] = {_PATTERN: self.pattern, **own}
        for kind in self.kinds:
            rows = [plain_values(self.sublayers[position]) for position in self.positions(kind)]
            columns = {name: [row[name] for row in rows] for name in rows[0]}
            plain[kind.name] = {name: _one_or_all(values) for name, values in columns.items()}
        return plain

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Network":
        """Makes a network from plain JSON values of this version or an earlier one.

        Raises:
            ConfigError: a field is unknown, missing or has an invalid value.
        """
        values = _from_former(values) if "hidden" in values else dict(values)
        if _PATTERN not in values:
            raise ConfigError([f"network.{_PATTERN} is missing: give the symbol of every sublayer"])
        pattern, sections = values.pop(_PATTERN), {}
        for kind in KINDS.values():
            if kind.name in values:
                sections[kind.symbol] = values.pop(kind.name)
        sublayers = _sublayers(pattern, sections)
        names = [field.name for field in dataclasses.fields(cls)[1:]]
        problems = [
            f"network.{name} is no field: the fields are {', '.join([_PATTERN, *names])} and the names of kinds"
            for name in values
            if name not in names
        ]
        problems += field_problems(cls, values, "network", ignored=("sublayers",))
        if (scaling := values.get("rotary_scaling")) is not None:
            problems += field_problems(Llama3RopeScaling, scaling, "network.rotary_scaling")
        raise_if_any(problems)
        if scaling is not None:
            values["rotary_scaling"] = Llama3RopeScaling(**scaling)
        if "norm" in values:
            values["norm"] = NormKind(values["norm"])
        return cls(sublayers, **values)


def _one_or_all(values: list) -> Any:
    return values[0] if all(value == values[0] for value in values) else values


def _sublayers(pattern: Any, sections: Mapping[str, Any]) -> tuple[Sublayer, ...]:
    """Makes the sublayers of a pattern.

    Args:
        pattern: a symbol per sublayer.
        sections: by symbol, the fields of the kind: one value for all of its sublayers, or a list.
    """
    if type(pattern) is not str:
        raise ConfigError([f"network.{_PATTERN} = {pattern!r}: must be text"])
    if len(pattern) > 2 * MAX_LAYERS:
        raise ConfigError([f"network.{_PATTERN} has {len(pattern)} sublayers: at most {2 * MAX_LAYERS} are supported"])
    if unknown := sorted(set(pattern) - set(KINDS)):
        raise ConfigError(
            [
                f"network.{_PATTERN} has sublayers {unknown}: the known ones are "
                + ", ".join(f"{symbol!r} ({kind.title})" for symbol, kind in KINDS.items())
            ]
        )
    made: dict[str, Iterator[Sublayer]] = {}
    for symbol in dict.fromkeys(pattern):
        kind, count = KINDS[symbol], pattern.count(symbol)
        where, section = f"network.{kind.name}", sections.get(symbol)
        if not isinstance(section, Mapping):
            raise ConfigError([f"{where} is missing: give the sizes of the {kind.title} sublayers"])
        lists = {name: value for name, value in section.items() if isinstance(value, list)}
        raise_if_any(
            [
                f"{where}.{name} has {len(value)} values for {count} {kind.title} sublayers: give one for each, or one "
                f"for all"
                for name, value in lists.items()
                if len(value) != count
            ]
        )
        if lists:
            rows = [{**section, **{name: value[i] for name, value in lists.items()}} for i in range(count)]
            made[symbol] = iter([from_plain(kind, row, where) for row in rows])
        else:
            made[symbol] = cycle([from_plain(kind, section, where)])
    return tuple(next(made[symbol]) for symbol in pattern)


def _from_former(values: Mapping[str, Any]) -> dict[str, Any]:
    """Converts the plain values of earlier versions, which had all fields on one level."""
    sections: dict[str, dict] = {kind.name: {} for kind in KINDS.values() if kind.former_fields}
    plain: dict[str, Any] = {}
    for name, value in values.items():
        owners = [kind for kind in KINDS.values() if name in kind.former_fields]
        for kind in owners:
            sections[kind.name][kind.former_fields[name]] = value
        if not owners:
            plain[_FORMER_FIELDS.get(name, name)] = value
    return {**plain, **sections}


def pad_vocab(vocab_size: int, multiple: int = 128) -> int:
    """Rounds a vocabulary size up to a multiple, as Megatron-LM does by default."""
    return -(-vocab_size // multiple) * multiple


def transformer(num_layers: int, layer: Iterable[Sublayer]) -> tuple[Sublayer, ...]:
    """Makes the sublayers of `num_layers` equal transformer layers.

    Raises:
        ConfigError: the number of layers is invalid.
    """
    if type(num_layers) is not int or not 0 <= num_layers <= MAX_LAYERS:
        raise ConfigError([f"the number of layers is {num_layers!r}: must be a whole number up to {MAX_LAYERS}"])
    return tuple(layer) * num_layers


def layout_problems(network: Network, layout: ModelParallelConfig, where: str = "network") -> list[str]:
    """Returns what a layout cannot split in a network, one sentence each."""
    problems = []
    for sublayer, positions in network.alike():
        layers = "" if len(positions) == network.pattern.count(sublayer.symbol) else _layers(network, positions)
        problems += sublayer.split_problems(layout.tensor, f"{where}{layers}.{sublayer.name}")
    if network.padded_vocab_size % layout.tensor:
        problems.append(
            f"{where}.padded_vocab_size = {network.padded_vocab_size} does not divide by parallel.tensor = "
            f"{layout.tensor}: choose a tensor size that divides it"
        )
    if len(network.layers) < layout.stages:
        problems.append(
            f"{where} has {len(network.layers)} layers, too few for the {layout.stages} stages of parallel.pipeline x "
            f"virtual_pipeline = {layout.pipeline} x {layout.stages // layout.pipeline}: lower one of the two"
        )
    return problems


def _layers(network: Network, positions: list[int]) -> str:
    numbers = [str(network.layer_of(position)) for position in positions]
    return f".layer{'s' * (len(numbers) > 1)} {', '.join(numbers)}"
