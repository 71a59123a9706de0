"""What every kind of layer says about itself.

A kind is one file in this folder: a frozen dataclass with the sizes and switches of one sublayer, and everything else
that the package has to know of it. Nothing outside of the folder names a kind, its axes or its parameters. Modules of
Megatron-Core are imported where they are used, so that sizes, counts and settings need no torch.

How to add one: docs/architecture.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from minitron_megatron.model.axes import Axis, Row

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from torch import Tensor

    from minitron_megatron.model.kv_cache import Cursor
    from minitron_megatron.model.network import Network

Own = TypeVar("Own", bound="Sublayer")


class Slot(Enum):
    """The half of Megatron-Core's TransformerLayer that a sublayer fills.

    Two sublayers that follow each other, the first in the first slot and the second in the second, are one transformer
    layer; a sublayer without its other half is one by itself.
    """

    MIXER = ("self_attention", "input_layernorm", "self_attn_bda")
    CHANNEL = ("mlp", "pre_mlp_layernorm", "mlp_bda")

    def __init__(self, module: str, norm: str, bda: str):
        self.module = module
        self.norm = norm
        self.bda = bda


@dataclass(frozen=True)
class PrunableAxis:
    """An axis of a kind whose elements can be pruned.

    Attributes:
        setting: its name in `target.*`, in plans and in figures.
        axis: in the axis table. If it lies within another prunable axis of the kind, elements are ranked within each
            element of that one, each of which keeps as many, and its setting counts those of all together.
        elements: what one of them is, for people: `neuron`.
        meaning: of the setting, for `--help`.
        is_aligned: sizes are rounded to what tensor cores want; `target.round_to` applies.
    """

    setting: str
    axis: Axis
    elements: str
    meaning: str
    is_aligned: bool = False


@dataclass
class Tap:
    """Where a kind's activations are watched for scoring.

    Attributes:
        setting: of the prunable axis that they score.
        module: of Megatron-Core, on this rank.
        at_input: watch the module's first argument, else what it returns.
        elements: from what is watched to one number per token and element of this rank, `[seq, batch, elements]`.
    """

    setting: str
    module: torch.nn.Module
    at_input: bool
    elements: Callable[[Any], Tensor]


@dataclass
class LayerModules:
    """How Megatron-Core builds a sublayer, as the parts of a TransformerLayer's spec.

    Attributes:
        norm: in front of it; IdentityOp where a linear layer does the norm as well.
        module: the sublayer itself.
        bda: adds its output to the residual stream.
        key_map: prefixes of parameters below the layer's key, from the module's to the axis table's.
    """

    norm: Any
    module: Any
    bda: Any
    key_map: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a network. Subclasses are kinds; their fields are its sizes and switches.

    Attributes:
        symbol: one letter in the network's pattern, as Megatron-Core's hybrid models have it.
        name: of the kind, in JSON and in `target.*`, where it is the number of such sublayers to keep.
        title: of the kind, for people.
        slot: which half of a transformer layer it fills.
        prunable: its prunable axes; an axis stands before those that lie within it.
        merged: setting of the axis whose kept elements can take a share of dropped ones (2407.14679, section 2.3).
        former_fields: today's field by the name that it had in files of earlier versions, which knew two kinds.
        te_states: modules that keep a state of Transformer Engine's beside their weights.
    """

    symbol: ClassVar[str]
    name: ClassVar[str]
    title: ClassVar[str]
    slot: ClassVar[Slot]
    prunable: ClassVar[tuple[PrunableAxis, ...]] = ()
    merged: ClassVar[str | None] = None
    former_fields: ClassVar[Mapping[str, str]] = {}
    te_states: ClassVar[tuple[str, ...]] = ()

    # Sizes

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each of its own axes."""
        raise NotImplementedError

    def resized(self: Own, lengths: Mapping[str, int]) -> Own:
        """The same with other lengths of prunable axes, by the axis' name."""
        raise NotImplementedError

    def total(self, axis: PrunableAxis) -> int:
        """Elements of a prunable axis, within all elements of the axes that it lies within."""
        return self.sizes[axis.axis.name] * (self.sizes[axis.axis.within] if axis.axis.within else 1)

    @classmethod
    def axis(cls, setting: str) -> PrunableAxis:
        """The prunable axis with a setting."""
        return next(axis for axis in cls.prunable if axis.setting == setting)

    @classmethod
    def outer(cls, axis: PrunableAxis) -> PrunableAxis | None:
        """The prunable axis that another one lies within."""
        return next((other for other in cls.prunable if other.axis.name == axis.axis.within), None)

    @classmethod
    def scored(cls) -> list[PrunableAxis]:
        """The axes that have scores of their own. An axis around another one has the sum of what lies within."""
        outer = {axis.axis.within for axis in cls.prunable}
        return [axis for axis in cls.prunable if axis.axis.name not in outer]

    def score_shape(self, axis: PrunableAxis) -> tuple[int, ...]:
        """Shape of the scores of an axis, that of what it lies within first."""
        own = (self.sizes[axis.axis.name],)
        return (self.sizes[axis.axis.within], *own) if axis.axis.within else own

    def split_problems(self, ranks: int, where: str) -> list[str]:
        """Why so many tensor-parallel ranks cannot share it, one sentence each."""
        raise NotImplementedError

    def multiple(self, axis: PrunableAxis, ranks: int) -> int:
        """What sizes of an axis must be a multiple of, so that so many tensor-parallel ranks can share it."""
        return ranks

    # The axis table

    def rows(self, network: Network) -> list[Row]:
        """Its rows of the axis table, in the order of the forward pass."""
        raise NotImplementedError

    # Costs

    def flops_per_token(self, sequence_length: int) -> float:
        """Operations per token beside those of its matrices, which are two per parameter."""
        return 0.0

    def activation_bytes(
        self, network: Network, micro_batch: int, sequence_length: int, tensor_ranks: int, number_bytes: int
    ) -> int:
        """Bytes that a tensor-parallel rank keeps of one micro-batch for the backward pass, without the norm before.

        Args:
            network: that it is part of.
            micro_batch: sequences.
            sequence_length: tokens of each.
            tensor_ranks: that share it.
            number_bytes: of a number in the format of computation.
        """
        raise NotImplementedError

    def cache_bytes_per_token(self, number_bytes: int) -> int:
        """Bytes that generation keeps of every token."""
        return 0

    # Megatron-Core

    def megatron_fields(self) -> dict[str, Any]:
        """Fields of Megatron-Core's TransformerConfig that describe it."""
        raise NotImplementedError

    def modules(self, config: TransformerConfig) -> LayerModules:
        """Its modules: Transformer Engine's on CUDA where that imports, else local ones."""
        raise NotImplementedError

    @classmethod
    def of_config(cls: type[Own], config: TransformerConfig) -> Own:
        """The sublayer that somebody's own TransformerConfig describes."""
        raise NotImplementedError

    def first_projection(self, layer: TransformerLayer) -> torch.nn.Module:
        """The linear layer that may do the norm before the sublayer as well."""
        raise NotImplementedError

    def taps(self, layer: TransformerLayer, before_activation: bool) -> list[Tap]:
        """Where to watch its activations.

        Args:
            layer: Megatron-Core's transformer layer that holds it.
            before_activation: watch neurons before their activation and gate, where there is one.
        """
        return []

    def caching(self, layer: TransformerLayer, cursor: Cursor) -> AbstractContextManager[None]:
        """A context within which the sublayer remembers what generation needs of earlier tokens.

        Args:
            layer: Megatron-Core's transformer layer that holds it.
            cursor: where new tokens stand.
        """
        return nullcontext()

    # Megatron-LM's command line

    def to_args(self) -> dict[str, Any]:
        """Args of Megatron-LM that describe it."""
        return {}

    @classmethod
    def from_args(cls: type[Own], get: Callable[..., Any]) -> Own:
        """The sublayer that args of Megatron-LM describe.

        Args:
            get: `get(name, ..., default=None)`, the first of these args that is there.
        """
        raise NotImplementedError


def alike(sublayers: Sequence[Sublayer]) -> Iterator[tuple[Sublayer, list[int]]]:
    """Each different sublayer once, with the indices at which it stands."""
    indices: dict[Sublayer, list[int]] = {}
    for index, sublayer in enumerate(sublayers):
        indices.setdefault(sublayer, []).append(index)
    return iter(indices.items())
