"""Attention (`*`): multi-head, grouped-query or multi-query, with rotary positions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from minitron_megatron.errors import raise_if_any
from minitron_megatron.model.axes import HIDDEN, Axis, Part, Row
from minitron_megatron.model.checks import size_problems, type_problems
from minitron_megatron.model.layers.sublayer import (
    CACHE_SCALE,
    CachedTensor,
    LayerModules,
    PrunableAxis,
    Slot,
    Sublayer,
    Tap,
)
from minitron_megatron.model.norms import norm_rows

if TYPE_CHECKING:
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import TransformerLayer
    from torch import Tensor

    from minitron_megatron.model.kv_cache import Cursor
    from minitron_megatron.model.network import Network

GROUP = Axis("group")
HEAD = Axis("head", within=GROUP.name)  # of one query group
HEAD_DIM = Axis("head_dim")
# Parts of the fused projection: axes of length one; dropping the others selects a part.
KEY, VALUE = Axis("key_head"), Axis("value_head")

_QKV_ROWS = GROUP * (HEAD + KEY + VALUE) * HEAD_DIM
_HEAD_COLUMNS = GROUP * HEAD * HEAD_DIM
_HF = "model.layers.{layer}.self_attn."
_FLOAT32 = 4


def _cached(name: str, axis: Axis, argument: int) -> CachedTensor:
    """Returns a tensor that the core attention gets normalised and rotated, in the local spec and Transformer Engine's
    alike."""
    scale = Row(f"self_attention.{name}{CACHE_SCALE}", (axis,), None, (Part(f"{_HF}{name[0]}_scale"),))
    return CachedTensor(scale, "self_attention.core_attention", argument)


@dataclass(frozen=True)
class Attention(Sublayer):
    """An attention sublayer.

    Attributes:
        num_heads: query heads.
        num_query_groups: groups of query heads that share one key and one value head.
        head_dim: channels per head; `num_heads * head_dim` may differ from the network's hidden size.
        bias: both projections have a bias.
        qkv_bias: the QKV projection has a bias.
        qk_norm: queries and keys are normalised per head, before the rotary embedding (Qwen3).
    """

    num_heads: int
    num_query_groups: int
    head_dim: int
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False

    symbol: ClassVar = "*"
    name: ClassVar = "attention"
    title: ClassVar = "attention"
    slot: ClassVar = Slot.MIXER
    prunable: ClassVar = (
        PrunableAxis(
            "groups",
            GROUP,
            "query group",
            "query groups of every attention, each with its key and value head and its query heads.",
        ),
        PrunableAxis(
            "heads",
            HEAD,
            "query head",
            "query heads of every attention over all of its groups, the same number in each group.",
        ),
    )
    merged: ClassVar = "heads"
    former_fields: ClassVar = {
        "num_heads": "num_heads",
        "num_query_groups": "num_query_groups",
        "head_dim": "head_dim",
        "linear_bias": "bias",
        "qkv_bias": "qkv_bias",
        "qk_norm": "qk_norm",
    }
    te_states: ClassVar = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention")
    cached: ClassVar = (_cached("key", KEY, argument=1), _cached("value", VALUE, argument=2))

    def __post_init__(self) -> None:
        where = self.name
        raise_if_any(type_problems(self, where))
        raise_if_any(size_problems(self, ("num_heads", "num_query_groups", "head_dim"), where))
        if self.num_heads % self.num_query_groups:
            raise_if_any(
                [
                    f"{where}.num_heads = {self.num_heads} is not a multiple of {where}.num_query_groups = "
                    f"{self.num_query_groups}: every group needs the same number of query heads"
                ]
            )

    # Sizes

    @property
    def heads_per_group(self) -> int:
        return self.num_heads // self.num_query_groups

    @property
    def sizes(self) -> dict[str, int]:
        return {
            GROUP.name: self.num_query_groups,
            HEAD.name: self.heads_per_group,
            HEAD_DIM.name: self.head_dim,
            KEY.name: 1,
            VALUE.name: 1,
        }

    def resized(self, lengths: Mapping[str, int]) -> Attention:
        groups = lengths.get(GROUP.name, self.num_query_groups)
        return replace(self, num_query_groups=groups, num_heads=groups * lengths.get(HEAD.name, self.heads_per_group))

    def split_problems(self, ranks: int, where: str) -> list[str]:
        """Allows several query groups per rank, or several ranks per group, whose rows Megatron-Core splits evenly."""
        groups = self.num_query_groups
        group_rows, sharing = (self.heads_per_group + 2) * self.head_dim, ranks // groups
        if groups % ranks and ranks % groups:
            return [
                f"{where}.num_query_groups = {groups} does not divide by parallel.tensor = {ranks}: choose a tensor "
                f"size that divides it, or that it divides"
            ]
        if self.num_heads % ranks:
            return [
                f"{where}.num_heads = {self.num_heads} does not divide by parallel.tensor = {ranks}: choose a tensor "
                f"size that divides it"
            ]
        if sharing and group_rows % sharing:
            return [
                f"{where}.num_query_groups = {groups}, each with {group_rows} rows of queries, key and value, cannot "
                f"be shared evenly by parallel.tensor = {ranks}: choose a smaller tensor size"
            ]
        return []

    def multiple(self, axis: PrunableAxis, ranks: int) -> int:
        return math.lcm(self.num_query_groups, ranks) if axis.axis is HEAD else 1

    # The axis table

    def rows(self, network: Network) -> list[Row]:
        def qkv(tensor: str) -> tuple[Part, ...]:
            return (
                Part(f"{_HF}q_proj.{tensor}", (KEY.name, VALUE.name), self.head_dim),
                Part(f"{_HF}k_proj.{tensor}", (HEAD.name, VALUE.name), self.head_dim),
                Part(f"{_HF}v_proj.{tensor}", (HEAD.name, KEY.name)),
            )

        def row(name: str, dims: tuple, split: str | None, parts: tuple, **flags: bool) -> Row:
            return Row(f"self_attention.{name}", dims, split, parts, **flags)

        output = (Part(f"{_HF}o_proj.weight"),), (Part(f"{_HF}o_proj.bias"),)
        rows = [
            *norm_rows(
                network.norm, HIDDEN, "self_attention.linear_qkv.layer_norm_", "model.layers.{layer}.input_layernorm."
            ),
            row("linear_qkv.weight", (_QKV_ROWS, HIDDEN), GROUP.name, qkv("weight"), matmul=True, takes_merged=True),
        ]
        if self.qkv_bias or self.bias:
            rows.append(row("linear_qkv.bias", (_QKV_ROWS,), GROUP.name, qkv("bias"), takes_merged=True))
        if self.qk_norm:
            for one in "qk":
                rows += norm_rows(network.norm, HEAD_DIM, f"self_attention.{one}_layernorm.", f"{_HF}{one}_norm.")
        rows.append(row("linear_proj.weight", (HIDDEN, _HEAD_COLUMNS), GROUP.name, output[0], matmul=True))
        if self.bias:
            rows.append(row("linear_proj.bias", (HIDDEN,), None, output[1]))
        return rows

    # Costs

    def flops_per_token(self, sequence_length: int) -> float:
        """Counts the products with keys and values, over the used half of the score matrix: with causal attention a
        token attends to `(sequence_length + 1) / 2` positions on average."""
        return 2 * 2 * self.num_heads * self.head_dim * (sequence_length + 1) / 2

    def activation_bytes(
        self, network: Network, micro_batch: int, sequence_length: int, tensor_ranks: int, number_bytes: int
    ) -> int:
        """Counts queries, keys, values and the context in the dtype of computation, and the attention's log-sum-exps in
        float32. With `qk_norm` also the projection, and a copy of the queries. No dropout, so no masks."""
        tokens, statistics = micro_batch * sequence_length, _FLOAT32 * len(network.norm.tensors)
        heads, groups = self.num_heads // tensor_ranks, max(1, self.num_query_groups // tensor_ranks)
        kept = tokens * ((2 * heads + 2 * groups) * self.head_dim * number_bytes + heads * _FLOAT32)
        if tensor_ranks > self.num_query_groups:  # Megatron-Core gathers all ranks' projections and takes views
            kept += tokens * (self.num_heads + 2 * self.num_query_groups) * self.head_dim * number_bytes
        if self.qk_norm:  # Megatron-Core's reshape copies the queries where a group has several
            copied = heads if self.heads_per_group > 1 else 0
            kept += tokens * (
                (heads + 2 * groups + copied) * self.head_dim * number_bytes + (heads + groups) * statistics
            )
        # Cosines and sines, which Megatron-Core computes separately for queries and keys; all sequences share them.
        return kept + 4 * sequence_length * int(network.rotary_fraction * self.head_dim) * number_bytes

    def cache_bytes_per_token(self, number_bytes: int) -> int:
        return 2 * self.num_query_groups * self.head_dim * number_bytes

    # Megatron-Core

    def megatron_fields(self) -> dict[str, Any]:
        return {
            "num_attention_heads": self.num_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.head_dim,
            "add_bias_linear": self.bias,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
        }

    @classmethod
    def of_config(cls, config: TransformerConfig) -> Attention:
        return cls(
            num_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            head_dim=config.kv_channels,
            bias=config.add_bias_linear,
            qkv_bias=config.add_qkv_bias,
            qk_norm=config.qk_layernorm,
        )

    def modules(self, config: TransformerConfig) -> LayerModules:
        from minitron_megatron.model import specs

        own = specs.transformer_layer(config)
        if specs.uses_te():
            own.self_attention.submodules.core_attention = specs.te_attention()
        else:
            from minitron_megatron.model.torch_modules import CausalAttention, ColumnLinear, RowLinear

            parts = own.self_attention.submodules
            parts.core_attention = CausalAttention
            parts.linear_qkv, parts.linear_proj = ColumnLinear, RowLinear
            if config.qk_layernorm:
                parts.q_layernorm = parts.k_layernorm = specs.norm_module(config)
        return specs.layer_modules(own, self.slot, config)

    def first_projection(self, layer: TransformerLayer) -> torch.nn.Module:
        return layer.self_attention.linear_qkv

    def taps(self, layer: TransformerLayer, before_activation: bool) -> list[Tap]:
        """Scores heads by the L2 norm of their part of the context (2407.14679, section 2.2)."""

        def norms(context: Tensor) -> Tensor:
            return context.unflatten(-1, (-1, self.head_dim)).float().norm(dim=-1)

        return [Tap("heads", layer.self_attention.linear_proj, True, norms)]

    def caching(self, layer: TransformerLayer, cursor: Cursor) -> AbstractContextManager[None]:
        from minitron_megatron.model.kv_cache import cached_attention

        return cached_attention(layer.self_attention, cursor)

    # Megatron-LM's command line

    def to_args(self) -> dict[str, Any]:
        return {
            "num_attention_heads": self.num_heads,
            "group_query_attention": self.num_query_groups != self.num_heads,
            "num_query_groups": self.num_query_groups,
            "kv_channels": self.head_dim,
            "add_bias_linear": self.bias,
            "add_qkv_bias": self.qkv_bias,
            "qk_layernorm": self.qk_norm,
        }

    @classmethod
    def from_args(cls, get: Callable[..., Any]) -> Attention:
        heads, has_groups = get("num_attention_heads"), get("group_query_attention", default=False)
        bias = get("add_bias_linear", default=True)
        return cls(
            num_heads=heads,
            num_query_groups=get("num_query_groups", default=1) if has_groups else heads,
            head_dim=get("kv_channels", default=get("hidden_size") // heads),
            bias=bias,
            qkv_bias=get("add_qkv_bias", default=False) and not bias,
            qk_norm=get("qk_layernorm", default=False),
        )
