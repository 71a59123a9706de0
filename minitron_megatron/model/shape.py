"""The shape of a network: every size and switch that decides what its parameters are.

A network is an ordered list of sublayers. `pattern` spells it with the symbols of Megatron-Core's
hybrid models: `*` is an attention sublayer, `-` an MLP sublayer, so a dense transformer of N layers
is `*-` N times.
"""

import dataclasses
import math
from dataclasses import dataclass
from enum import Enum

from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.errors import ConfigError, raise_if_any
from minitron_megatron.parallel.layout import Layout

ATTENTION = "*"
MLP = "-"
# Ten times those of the largest networks, so that a damaged file asks for no more memory than there is.
_MAX_SIZE, _MAX_LAYERS = 2**22, 10_000


class NormKind(str, Enum):
    RMSNORM = "rmsnorm"
    LAYERNORM = "layernorm"


class Activation(str, Enum):
    SILU = "silu"
    GELU = "gelu"
    SQUARED_RELU = "squared_relu"


@dataclass(frozen=True)
class Llama3RopeScaling:
    """Llama 3.1's frequency-dependent stretching of the rotary embedding."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        raise_if_any(_type_problems(self, "shape.rotary_scaling"))


@dataclass(frozen=True)
class ModelShape:
    """Sizes and switches of a dense GPT network.

    Attributes:
        pattern: sublayers in order, `*` attention and `-` MLP.
        hidden: width of the residual stream, in channels.
        ffn: MLP neurons per MLP sublayer (of one branch, when gated).
        num_heads: query heads per attention sublayer.
        num_query_groups: groups of query heads that share one key and one value head.
        head_dim: channels per head; `num_heads * head_dim` may differ from `hidden`.
        vocab: tokens of the tokenizer.
        padded_vocab: rows of the embedding table, at least `vocab`.
        max_positions: longest sequence the model was made for, in tokens.
        norm_zero_centered: the norm multiplies by `1 + weight` (Nemotron, Gemma).
        qkv_bias: of queries, keys and values alone; `linear_bias` is of every matrix.
        qk_norm: every head's query and key are normalised, before the rotary embedding (Qwen3).
        rotary_fraction: share of each head's channels that is rotated, in (0, 1].
        tied: the output projection is the embedding table.
    """

    pattern: str
    hidden: int
    ffn: int
    num_heads: int
    num_query_groups: int
    head_dim: int
    vocab: int
    padded_vocab: int
    max_positions: int = 2048
    norm: NormKind = NormKind.RMSNORM
    norm_eps: float = 1e-5
    norm_zero_centered: bool = False
    activation: Activation = Activation.SILU
    gated: bool = True
    qkv_bias: bool = False
    linear_bias: bool = False
    qk_norm: bool = False
    rotary_base: float = 10000.0
    rotary_fraction: float = 1.0
    rotary_scaling: Llama3RopeScaling | None = None
    tied: bool = False

    def __post_init__(self):
        raise_if_any(_type_problems(self, "shape"))
        sizes = ("hidden", "ffn", "num_heads", "num_query_groups", "head_dim", "vocab", "padded_vocab")
        problems = [
            f"shape.{name} = {getattr(self, name)}: must be at least 1 and at most {_MAX_SIZE}"
            for name in sizes
            if not 1 <= getattr(self, name) <= _MAX_SIZE
        ]
        if len(self.pattern) > 2 * _MAX_LAYERS:
            problems.append(f"shape.pattern has {len(self.pattern)} sublayers: at most {2 * _MAX_LAYERS} are supported")
        if strange := set(self.pattern) - {ATTENTION, MLP}:
            problems.append(
                f"shape.pattern has sublayers {sorted(strange)}: only '*' (attention) and '-' (MLP) are supported"
            )
        if not problems and self.num_heads % self.num_query_groups:
            problems.append(
                f"shape.num_heads = {self.num_heads} is not a multiple of shape.num_query_groups = "
                f"{self.num_query_groups}: every group needs the same number of query heads"
            )
        if self.padded_vocab < self.vocab:
            problems.append(f"shape.padded_vocab = {self.padded_vocab} is below shape.vocab = {self.vocab}")
        if not 0 < self.rotary_fraction <= 1:
            problems.append(f"shape.rotary_fraction = {self.rotary_fraction}: must be above 0 and at most 1")
        if problems:
            raise ConfigError(problems)

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_query_groups

    @property
    def is_uniform(self) -> bool:
        """Whether the pattern is `*-` repeated, which is what GPTModel realises."""
        return self.pattern == (ATTENTION + MLP) * (len(self.pattern) // 2)

    @property
    def num_layers(self) -> int:
        """Transformer layers, each one attention and one MLP sublayer. Only uniform patterns have layers."""
        if not self.is_uniform:
            raise ConfigError([f"shape.pattern = {self.pattern!r} is not '*-' repeated, so it has no layer count"])
        return len(self.pattern) // 2

    @property
    def megatron_layers(self) -> list[str]:
        """The sublayers in each of Megatron-Core's layers: GPTModel's have one of each kind, HybridModel's are one."""
        return [ATTENTION + MLP] * self.num_layers if self.is_uniform else list(self.pattern)

    def sublayers(self, symbol: str) -> list[int]:
        """Positions in `pattern` of the sublayers of one kind."""
        return [position for position, s in enumerate(self.pattern) if s == symbol]

    def replace(self, **changes) -> "ModelShape":
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict:
        """Plain JSON values; `from_dict` reads them back."""
        values = dataclasses.asdict(self)
        return {k: v.value if isinstance(v, Enum) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict) -> "ModelShape":
        """The shape that plain JSON values describe.

        Raises:
            ConfigError: a field is unknown, missing or of no value that it may have.
        """
        values, problems = dict(values), _field_problems(cls, values, "shape")
        for name, kind in (("norm", NormKind), ("activation", Activation)):
            choices = [member.value for member in kind]
            if name in values and values[name] not in choices:
                problems.append(f"shape.{name} = {values[name]!r}: must be one of {', '.join(choices)}")
            elif name in values:
                values[name] = kind(values[name])
        if scaling := values.get("rotary_scaling"):
            problems += _field_problems(Llama3RopeScaling, scaling, "shape.rotary_scaling")
        raise_if_any(problems)
        if scaling:
            values["rotary_scaling"] = Llama3RopeScaling(**scaling)
        return cls(**values)


def _type_problems(values: object, where: str) -> list[str]:
    """Which whole numbers, finite numbers, switches and texts are none."""
    found = []
    for field in dataclasses.fields(values):
        value = getattr(values, field.name)
        if field.type is int:
            is_right, wanted = type(value) is int, "a whole number"
        elif field.type is float:
            is_right, wanted = type(value) in (int, float) and math.isfinite(value), "a finite number"
        elif field.type in (bool, str):
            is_right, wanted = type(value) is field.type, "true or false" if field.type is bool else "text"
        else:
            continue
        if not is_right:
            found.append(f"{where}.{field.name} = {value!r}: must be {wanted}")
    return found


def _field_problems(kind: type, values: dict, where: str) -> list[str]:
    """What of plain values a dataclass cannot be made from."""
    fields = dataclasses.fields(kind)
    names = [field.name for field in fields]
    unknown = [name for name in values if name not in names]
    missing = [f.name for f in fields if f.default is dataclasses.MISSING and f.name not in values]
    return [
        *(f"{where}.{name} is no field: the fields are {', '.join(names)}" for name in unknown),
        *(f"{where}.{name} is missing: give it a value" for name in missing),
    ]


def layers_pattern(num_layers: int) -> str:
    """The pattern of a dense transformer of `num_layers` layers.

    Raises:
        ConfigError: it is no number of layers.
    """
    if type(num_layers) is not int or not 0 <= num_layers <= _MAX_LAYERS:
        raise ConfigError([f"the number of layers is {num_layers!r}: must be a whole number up to {_MAX_LAYERS}"])
    return (ATTENTION + MLP) * num_layers


def pad_vocab(vocab: int, multiple: int = 128) -> int:
    """Rows of an embedding table that holds `vocab` tokens, rounded up as Megatron-LM does by default."""
    return -(-vocab // multiple) * multiple


def group_problem(shape: ModelShape, ranks: int, where: str = "shape") -> str | None:
    """Why tensor ranks cannot have several query groups each, or several of them one, whose rows Megatron-Core cuts
    evenly."""
    groups = shape.num_query_groups
    group_rows, sharing = (shape.heads_per_group + 2) * shape.head_dim, ranks // groups
    if groups % ranks and ranks % groups:
        return f"{_indivisible(shape, 'num_query_groups', ranks, where)}, or that it divides"
    if shape.num_heads % ranks:
        return _indivisible(shape, "num_heads", ranks, where)
    if sharing and group_rows % sharing:
        return (
            f"{where}.num_query_groups = {groups}, each with {group_rows} rows of queries, key and value, cannot be "
            f"shared evenly by parallel.tensor = {ranks}: choose a smaller tensor size"
        )
    return None


def _indivisible(shape: ModelShape, name: str, ranks: int, where: str) -> str:
    return (
        f"{where}.{name} = {getattr(shape, name)} does not divide by parallel.tensor = {ranks}: choose a tensor size "
        f"that divides it"
    )


def layout_problems(shape: ModelShape, layout: Layout | ParallelConfig, where: str = "shape") -> list[str]:
    """What of `shape` a layout cannot split, one sentence each."""
    problem = group_problem(shape, layout.tensor, where)
    found = [problem] if problem else []
    found += [
        _indivisible(shape, name, layout.tensor, where)
        for name in ("ffn", "padded_vocab")
        if getattr(shape, name) % layout.tensor
    ]
    virtual_pipeline = layout.virtual_pipeline or 1
    stages = layout.pipeline * virtual_pipeline
    if len(shape.megatron_layers) < stages:
        found.append(
            f"{where} has {len(shape.megatron_layers)} layers, too few for the {stages} stages of parallel.pipeline x "
            f"virtual_pipeline = {layout.pipeline} x {virtual_pipeline}: lower one of the two"
        )
    return found
