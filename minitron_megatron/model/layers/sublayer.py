"""The interface of a kind of layer.

A kind is one file, here or in a plugin: a frozen dataclass with the sizes and switches of one sublayer, and everything
else that the package needs to know about it. Nothing else names a kind, its axes or its parameters. Modules of
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

CACHE_SCALE = "_cache_scale"
"""How names of the scales of cached tensors end, in the axis table and in checkpoints."""


class Slot(Enum):
    """The half of Megatron-Core's TransformerLayer that a sublayer fills.

    A MIXER sublayer and the CHANNEL sublayer after it form one transformer layer; a sublayer without its other half is
    a layer by itself.
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
        axis: in the axis table. If it is within another prunable axis of the kind, elements are ranked within each
            outer element, each of which keeps the same number, and the setting counts all of them together.
        elements: name of one element for people: `neuron`.
        meaning: of the setting, for `--help`.
        is_aligned: sizes are rounded to multiples for tensor cores; `target.round_to` applies.
    """

    setting: str
    axis: Axis
    elements: str
    meaning: str
    is_aligned: bool = False


@dataclass
class Tap:
    """Where a kind's activations are captured for scoring.

    Attributes:
        setting: of the prunable axis that they score.
        module: of Megatron-Core, on this rank.
        at_input: capture the module's first argument; else its output.
        elements: maps the captured tensor to one number per token and element of this rank, `[seq, batch, elements]`.
    """

    setting: str
    module: torch.nn.Module
    at_input: bool
    elements: Callable[[Any], Tensor]


@dataclass(frozen=True)
class CachedTensor:
    """A tensor that generation caches for every token, and that can be cached in 8 bits with one scale.

    Attributes:
        scale: row of the axis table of its scale, one number; its name ends with `CACHE_SCALE`.
        module: of Megatron-Core's layer, by name, that is called with the tensor as it is cached.
        argument: place of the tensor among the module's arguments; it is `[seq, batch, ...]`.
    """

    scale: Row
    module: str
    argument: int


@dataclass
class LayerModules:
    """The parts of a TransformerLayer's spec with which Megatron-Core builds a sublayer.

    Attributes:
        norm: before the sublayer; IdentityOp where it is fused into a linear layer.
        module: the sublayer itself.
        bda: adds its output to the residual stream.
        key_map: maps prefixes of parameter names within the layer, from the module's to the axis table's.
    """

    norm: Any
    module: Any
    bda: Any
    key_map: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of a network. Subclasses are kinds; their fields are its sizes and switches.

    Attributes:
        symbol: one letter in the network's pattern, as in Megatron-Core's hybrid models.
        name: of the kind, in JSON and in `target.*`, where it is the number of such sublayers to keep.
        title: of the kind, for people.
        slot: which half of a transformer layer it fills.
        prunable: its prunable axes; an axis precedes those within it.
        merged: setting of the axis whose kept elements can take a share of dropped ones (2407.14679, section 2.3).
        former_fields: field names in files of earlier versions, which had two kinds, and today's names.
        te_states: modules that keep an extra state of Transformer Engine beside their weights.
        cached: all that generation caches per token, if it can be cached in 8 bits; else empty.
    """

    symbol: ClassVar[str]
    name: ClassVar[str]
    title: ClassVar[str]
    slot: ClassVar[Slot]
    prunable: ClassVar[tuple[PrunableAxis, ...]] = ()
    merged: ClassVar[str | None] = None
    former_fields: ClassVar[Mapping[str, str]] = {}
    te_states: ClassVar[tuple[str, ...]] = ()
    cached: ClassVar[tuple[CachedTensor, ...]] = ()

    # Sizes

    @property
    def sizes(self) -> dict[str, int]:
        """Length of each of its own axes."""
        raise NotImplementedError

    def resized(self: Own, lengths: Mapping[str, int]) -> Own:
        """Returns the sublayer with other lengths of prunable axes, by the axis' name."""
        raise NotImplementedError

    def total(self, axis: PrunableAxis) -> int:
        """Returns the number of elements of a prunable axis, over all elements of the axis around it."""
        return self.sizes[axis.axis.name] * (self.sizes[axis.axis.within] if axis.axis.within else 1)

    @classmethod
    def axis(cls, setting: str) -> PrunableAxis:
        """Returns the prunable axis with a setting."""
        return next(axis for axis in cls.prunable if axis.setting == setting)

    @classmethod
    def outer(cls, axis: PrunableAxis) -> PrunableAxis | None:
        """Returns the prunable axis around another one, if any."""
        return next((other for other in cls.prunable if other.axis.name == axis.axis.within), None)

    @classmethod
    def scored(cls) -> list[PrunableAxis]:
        """Returns the axes with scores of their own. An axis around another one gets the sum of the inner scores."""
        outer = {axis.axis.within for axis in cls.prunable}
        return [axis for axis in cls.prunable if axis.axis.name not in outer]

    def score_shape(self, axis: PrunableAxis) -> tuple[int, ...]:
        """Returns the shape of the scores of an axis: `(elements,)`, or `(outer elements, elements)`."""
        own = (self.sizes[axis.axis.name],)
        return (self.sizes[axis.axis.within], *own) if axis.axis.within else own

    def split_problems(self, ranks: int, where: str) -> list[str]:
        """Returns why this number of tensor-parallel ranks cannot split it, one sentence each."""
        raise NotImplementedError

    def multiple(self, axis: PrunableAxis, ranks: int) -> int:
        """Returns what sizes of an axis must be a multiple of, for this number of tensor-parallel ranks."""
        return ranks

    # The axis table

    def rows(self, network: Network) -> list[Row]:
        """Returns its rows of the axis table, in the order of the forward pass."""
        raise NotImplementedError

    # Costs

    def flops_per_token(self, sequence_length: int) -> float:
        """Returns the operations per token, without those of its matrices, which are two per parameter."""
        return 0.0

    def activation_bytes(
        self, network: Network, micro_batch: int, sequence_length: int, tensor_ranks: int, number_bytes: int
    ) -> int:
        """Returns the bytes that a tensor-parallel rank keeps of one micro-batch for the backward pass.

        Those of the norm before the sublayer are not included.

        Args:
            network: the whole network.
            micro_batch: sequences.
            sequence_length: tokens of each.
            tensor_ranks: tensor-parallel ranks.
            number_bytes: bytes of a number in the dtype of computation.
        """
        raise NotImplementedError

    def cache_bytes_per_token(self, number_bytes: int) -> int:
        """Returns the bytes that generation caches per token."""
        return 0

    # Megatron-Core

    def megatron_fields(self) -> dict[str, Any]:
        """Returns the fields of Megatron-Core's TransformerConfig that describe it."""
        raise NotImplementedError

    def modules(self, config: TransformerConfig) -> LayerModules:
        """Returns its modules: Transformer Engine's on CUDA where it imports, else local ones."""
        raise NotImplementedError

    @classmethod
    def of_config(cls: type[Own], config: TransformerConfig) -> Own:
        """Returns the sublayer that a TransformerConfig describes."""
        raise NotImplementedError

    def first_projection(self, layer: TransformerLayer) -> torch.nn.Module:
        """Returns the linear layer that the norm before the sublayer may be fused into."""
        raise NotImplementedError

    def taps(self, layer: TransformerLayer, before_activation: bool) -> list[Tap]:
        """Returns where to capture its activations.

        Args:
            layer: Megatron-Core's transformer layer that holds it.
            before_activation: capture neurons before their activation and gate.
        """
        return []

    def caching(self, layer: TransformerLayer, cursor: Cursor) -> AbstractContextManager[None]:
        """Returns a context in which the sublayer caches what generation needs of earlier tokens.

        Args:
            layer: Megatron-Core's transformer layer that holds it.
            cursor: where new tokens stand.
        """
        return nullcontext()

    # Megatron-LM's command line

    def to_args(self) -> dict[str, Any]:
        """Returns the args of Megatron-LM that describe it."""
        return {}

    @classmethod
    def from_args(cls: type[Own], get: Callable[..., Any]) -> Own:
        """Returns the sublayer that args of Megatron-LM describe.

        Args:
            get: `get(name, ..., default=None)`, returns the first of these args that is set.
        """
        raise NotImplementedError


def alike(sublayers: Sequence[Sublayer]) -> Iterator[tuple[Sublayer, list[int]]]:
    """Returns each distinct sublayer once, with its indices."""
    indices: dict[Sublayer, list[int]] = {}
    for index, sublayer in enumerate(sublayers):
        indices.setdefault(sublayer, []).append(index)
    return iter(indices.items())
