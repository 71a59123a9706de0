"""The dense MLP (`-`), gated or not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from minitron_megatron.errors import UnsupportedModelError, raise_if_any
from minitron_megatron.model.axes import HIDDEN, Axis, Part, Row
from minitron_megatron.model.checks import size_problems, type_problems
from minitron_megatron.model.layers.sublayer import LayerModules, PrunableAxis, Slot, Sublayer, Tap
from minitron_megatron.model.norms import norm_rows

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from torch import Tensor

    from minitron_megatron.model.network import Network

FFN = Axis("ffn")
# Parts of the fused projection: axes of length one; dropping the other selects a part.
GATE, UP = Axis("gate"), Axis("up")

_HF = "model.layers.{layer}.mlp."


class Activation(str, Enum):
    SILU = "silu"
    GELU = "gelu"
    SQUARED_RELU = "squared_relu"

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        """The function, as Megatron-Core expects it."""
        import torch.nn.functional as F
        from megatron.core.activations import squared_relu

        return {Activation.SILU: F.silu, Activation.GELU: F.gelu, Activation.SQUARED_RELU: squared_relu}[self]


@dataclass(frozen=True)
class MLP(Sublayer):
    """A dense MLP sublayer.

    Attributes:
        ffn_hidden_size: neurons (of one branch, if gated).
        activation: of the neurons, or of their gates.
        gated: a second branch, the gate, is activated and multiplies the neurons.
        bias: both projections have a bias.
    """

    ffn_hidden_size: int
    activation: Activation = Activation.SILU
    gated: bool = True
    bias: bool = False

    symbol: ClassVar = "-"
    name: ClassVar = "mlp"
    title: ClassVar = "MLP"
    slot: ClassVar = Slot.CHANNEL
    prunable: ClassVar = (PrunableAxis("ffn", FFN, "neuron", "neurons of every MLP.", is_aligned=True),)
    former_fields: ClassVar = {
        "ffn": "ffn_hidden_size",
        "activation": "activation",
        "gated": "gated",
        "linear_bias": "bias",
    }
    te_states: ClassVar = ("mlp.linear_fc1", "mlp.linear_fc2")

    def __post_init__(self) -> None:
        raise_if_any(type_problems(self, self.name))
        raise_if_any(size_problems(self, ("ffn_hidden_size",), self.name))

    # Sizes

    @property
    def sizes(self) -> dict[str, int]:
        return {FFN.name: self.ffn_hidden_size, GATE.name: 1, UP.name: 1}

    def resized(self, lengths: Mapping[str, int]) -> MLP:
        return replace(self, ffn_hidden_size=lengths.get(FFN.name, self.ffn_hidden_size))

    def split_problems(self, ranks: int, where: str) -> list[str]:
        if self.ffn_hidden_size % ranks == 0:
            return []
        return [
            f"{where}.ffn_hidden_size = {self.ffn_hidden_size} does not divide by parallel.tensor = {ranks}: choose a "
            f"tensor size that divides it"
        ]

    # The axis table

    def rows(self, network: Network) -> list[Row]:
        neurons = (GATE + UP) * FFN if self.gated else FFN

        def fc1(tensor: str) -> tuple[Part, ...]:
            if not self.gated:
                return (Part(f"{_HF}up_proj.{tensor}"),)
            return (Part(f"{_HF}gate_proj.{tensor}", (UP.name,)), Part(f"{_HF}up_proj.{tensor}", (GATE.name,)))

        def row(name: str, dims: tuple, split: str | None, parts: tuple, matmul: bool = False) -> Row:
            return Row(f"mlp.{name}", dims, split, parts, matmul)

        down = (Part(f"{_HF}down_proj.weight"),), (Part(f"{_HF}down_proj.bias"),)
        rows = [
            *norm_rows(
                network.norm, HIDDEN, "mlp.linear_fc1.layer_norm_", "model.layers.{layer}.post_attention_layernorm."
            ),
            row("linear_fc1.weight", (neurons, HIDDEN), FFN.name, fc1("weight"), matmul=True),
        ]
        if self.bias:
            rows.append(row("linear_fc1.bias", (neurons,), FFN.name, fc1("bias")))
        rows.append(row("linear_fc2.weight", (HIDDEN, FFN), FFN.name, down[0], matmul=True))
        if self.bias:
            rows.append(row("linear_fc2.bias", (HIDDEN,), None, down[1]))
        return rows

    # Costs

    def activation_bytes(
        self, network: Network, micro_batch: int, sequence_length: int, tensor_ranks: int, number_bytes: int
    ) -> int:
        """Counts both halves of the first projection's output, the activated gate, and their product, which is the
        second projection's input. Nothing is fused."""
        tensors = 4 if self.gated else 2
        return micro_batch * sequence_length * tensors * self.ffn_hidden_size // tensor_ranks * number_bytes

    # Megatron-Core

    def megatron_fields(self) -> dict[str, Any]:
        from minitron_megatron.model import specs

        return {
            "ffn_hidden_size": self.ffn_hidden_size,
            "activation_func": self.activation.function,
            "gated_linear_unit": self.gated,
            "add_bias_linear": self.bias,
            "bias_activation_fusion": specs.uses_te() and self.gated and self.activation is Activation.SILU,
            # Despite its name: makes the activation a module of the layer spec.
            "use_te_activation_func": self.gated and not specs.uses_te(),
        }

    @classmethod
    def of_config(cls, config: TransformerConfig) -> MLP:
        activations = {activation.function: activation for activation in Activation}
        if config.activation_func not in activations:
            raise UnsupportedModelError(f"activation_func = {config.activation_func}")
        return cls(
            ffn_hidden_size=config.ffn_hidden_size,
            activation=activations[config.activation_func],
            gated=config.gated_linear_unit,
            bias=config.add_bias_linear,
        )

    def modules(self, config: TransformerConfig) -> LayerModules:
        from minitron_megatron.model import specs

        own = specs.transformer_layer(config)
        if not specs.uses_te():
            import torch

            from minitron_megatron.model.torch_modules import ColumnLinear, GatedActivation, RecomputedLinear, RowLinear

            parts = specs.submodules_of(own.mlp)
            parts.linear_fc1, parts.linear_fc2 = ColumnLinear, RowLinear
            if config.use_te_activation_func:
                parts.activation_func = GatedActivation
            # Saves memory on the CPU. Full recomputation covers it already.
            is_swiglu = self.gated and self.activation is Activation.SILU
            if is_swiglu and not torch.cuda.is_available() and config.recompute_granularity is None:
                parts.linear_fc1 = RecomputedLinear
        return specs.layer_modules(own, self.slot, config)

    def first_projection(self, layer: TransformerLayer) -> torch.nn.Module:
        return layer.mlp.linear_fc1

    def taps(self, layer: TransformerLayer, before_activation: bool) -> list[Tap]:
        """Scores neurons by the input of the second projection; with `before_activation`, by the first one's output, of
        a gated MLP the gate's (Minitron's formula: 2407.14679, section 2.2)."""

        def inputs(output: tuple[Tensor, Tensor | None]) -> Tensor:
            x, bias = output
            x = x if bias is None else x + bias
            return x.chunk(2, dim=-1)[0] if self.gated else x

        if before_activation:
            return [Tap("ffn", layer.mlp.linear_fc1, False, inputs)]
        return [Tap("ffn", layer.mlp.linear_fc2, True, lambda x: x)]

    # Megatron-LM's command line

    def to_args(self) -> dict[str, Any]:
        return {
            "ffn_hidden_size": self.ffn_hidden_size,
            "swiglu": self.gated,
            "squared_relu": self.activation is Activation.SQUARED_RELU,
            "add_bias_linear": self.bias,
        }

    @classmethod
    def from_args(cls, get: Callable[..., Any]) -> MLP:
        hidden, gated = get("hidden_size"), bool(get("swiglu", default=False))
        activation = Activation.SQUARED_RELU if get("squared_relu", default=False) else Activation.GELU
        return cls(
            ffn_hidden_size=get("ffn_hidden_size", default=int(8 * hidden / 3 / 64) * 64 if gated else 4 * hidden),
            activation=Activation.SILU if gated else activation,
            gated=gated,
            bias=get("add_bias_linear", default=True),
        )
