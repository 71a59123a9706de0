"""The axis table: what every parameter's dimensions mean, where it is stored, and how it is cut.

A tensor dimension is described by a small algebra over named axes. `GROUP * (HEAD + KEY + VALUE) *
HEAD_DIM` is the row order of Megatron's fused QKV projection: per query group its query heads, then
its key head, then its value head. From that one description follow the size of the dimension and,
for any choice of kept indices along the named axes, the rows that stay:

- pruning keeps the indices of a plan,
- a tensor-parallel shard keeps a range of one axis, or of the rows of a query group,
- the Hugging Face tensors inside a fused one are the rows left when the other parts are dropped.

So all of these are one function, `Dim.index`, and no other module spells a parameter's name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape, NormKind

Kept = Mapping[str, np.ndarray]
"""Kept indices by axis name, sorted. An axis without an entry is kept whole. `head` may be
two-dimensional, `[kept group, kept head of that group]`, since every group keeps its own heads."""

PROJECTIONS = "distillation_projections"
"""The beginning of the names of what distillation trains beside the student, and that is no part of any network."""


class Dim:
    """A tensor dimension as an expression over named axes."""

    def __mul__(self, inner: "Dim") -> "Dim":
        return _Product(self, inner)

    def __add__(self, other: "Dim") -> "Dim":
        return _Concat(self, other)

    def size(self, sizes: Mapping[str, int]) -> int:
        """Length of the dimension, given the length of each axis."""
        raise NotImplementedError

    def index(self, kept: Kept, sizes: Mapping[str, int], row: int | None = None) -> np.ndarray:
        """Positions in this dimension that stay when only `kept` stays of each axis, in order.

        Args:
            kept: indices per axis; axes that are not named are kept whole.
            sizes: length of each axis before cutting.
            row: position among the kept elements of the enclosing axis, for two-dimensional entries.

        Returns:
            int64 array of positions.
        """
        raise NotImplementedError

    def labels(self, axis: str, sizes: Mapping[str, int]) -> np.ndarray:
        """Which element of `axis` each position belongs to, -1 where to none."""
        raise NotImplementedError


@dataclass(frozen=True)
class Axis(Dim):
    name: str

    def size(self, sizes):
        return sizes[self.name]

    def index(self, kept, sizes, row=None):
        if self.name not in kept:
            return np.arange(sizes[self.name])
        indices = np.asarray(kept[self.name], dtype=np.int64)
        return indices[row] if indices.ndim == 2 else indices

    def labels(self, axis, sizes):
        return np.arange(sizes[axis]) if self.name == axis else np.full(sizes[self.name], -1)


@dataclass(frozen=True)
class _Product(Dim):
    outer: Dim
    inner: Dim

    def size(self, sizes):
        return self.outer.size(sizes) * self.inner.size(sizes)

    def index(self, kept, sizes, row=None):
        stride = self.inner.size(sizes)
        parts = [
            position * stride + self.inner.index(kept, sizes, i if row is None else row)
            for i, position in enumerate(self.outer.index(kept, sizes, row))
        ]
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def labels(self, axis, sizes):
        outer = np.repeat(self.outer.labels(axis, sizes), self.inner.size(sizes))
        inner = np.tile(self.inner.labels(axis, sizes), self.outer.size(sizes))
        return np.maximum(outer, inner)


@dataclass(frozen=True)
class _Concat(Dim):
    first: Dim
    second: Dim

    def size(self, sizes):
        return self.first.size(sizes) + self.second.size(sizes)

    def index(self, kept, sizes, row=None):
        first = self.first.index(kept, sizes, row)
        return np.concatenate([first, self.first.size(sizes) + self.second.index(kept, sizes, row)])

    def labels(self, axis, sizes):
        return np.concatenate([self.first.labels(axis, sizes), self.second.labels(axis, sizes)])


HIDDEN, FFN, VOCAB = Axis("hidden"), Axis("ffn"), Axis("vocab")
GROUP, HEAD, HEAD_DIM = Axis("group"), Axis("head"), Axis("head_dim")
# Parts of fused projections: axes of length one, so that a part is selected by dropping the others.
KEY, VALUE, GATE, UP = Axis("key"), Axis("value"), Axis("gate"), Axis("up")

_QKV_ROWS = GROUP * (HEAD + KEY + VALUE) * HEAD_DIM
_HEAD_COLUMNS = GROUP * HEAD * HEAD_DIM


def axis_sizes(shape: ModelShape) -> dict[str, int]:
    """Length of every axis. `head` counts the query heads of one group; `vocab` includes the padding."""
    return {
        "hidden": shape.hidden,
        "ffn": shape.ffn,
        "group": shape.num_query_groups,
        "head": shape.heads_per_group,
        "head_dim": shape.head_dim,
        "vocab": shape.padded_vocab,
        **{part: 1 for part in ("key", "value", "gate", "up")},
    }


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor inside a Megatron parameter.

    Attributes:
        name: its key in the Hugging Face layout; `{layer}` stands for the layer's number.
        dropped: part axes that are not in it.
    """

    name: str
    dropped: tuple[str, ...] = ()

    @property
    def kept(self) -> Kept:
        """The cut of the Megatron parameter that leaves this tensor."""
        return {axis: np.empty(0, dtype=np.int64) for axis in self.dropped}


@dataclass(frozen=True)
class Param:
    """One row of the axis table.

    Attributes:
        name: the key below `decoder.layers.` for parameters of a sublayer, else the whole key.
        dims: what each dimension means.
        sublayer: `*`, `-`, or None outside the layers.
        split: the axis that tensor parallelism splits, or None when every rank holds all of it.
        parts: its tensors in the Hugging Face layout.
        matmul: whether a token is multiplied by it (embedding lookups, norms and biases are not).
    """

    name: str
    dims: tuple[Dim, ...]
    sublayer: str | None
    split: str | None
    parts: tuple[Part, ...]
    matmul: bool = False

    @property
    def is_embedding(self) -> bool:
        """Whether it is the table that tokens are looked up in."""
        return self.split == "vocab" and not self.matmul

    @property
    def has_queries(self) -> bool:
        """Whether some of its rows make the queries of attention."""
        return self.dims[0] == _QKV_ROWS

    @property
    def stacked_key(self) -> str:
        """Checkpoint key of the form that stacks all layers in a leading dimension."""
        return self.name if self.sublayer is None else f"decoder.layers.{self.name}"

    def layer_key(self, layer: int, shape: ModelShape) -> str:
        """Checkpoint key of the form that stores each of Megatron's layers by itself.

        Args:
            layer: which sublayer of the parameter's kind, counted from 0.
            shape: of the whole network.
        """
        holding = [number for number, held in enumerate(shape.megatron_layers) if self.sublayer in held]
        return f"decoder.layers.{holding[layer]}.{self.name}"

    def size(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Shape of the tensor (of one layer)."""
        return tuple(dim.size(sizes) for dim in self.dims)

    def index(self, kept: Kept, sizes: Mapping[str, int]) -> list[np.ndarray]:
        """For each dimension, the positions that stay when only `kept` stays."""
        return [dim.index(kept, sizes) for dim in self.dims]

    def shard(self, rank: int, num_ranks: int, sizes: Mapping[str, int]) -> list[np.ndarray]:
        """For each dimension, the positions that one of `num_ranks` tensor-parallel ranks holds.

        All ranks hold equally many, element by element of the split axis: several query groups, or a part of one.
        """
        found = []
        for positions, dim in zip(self.index({}, sizes), self.dims, strict=True):
            elements = np.full(len(positions), -1) if self.split is None else dim.labels(self.split, sizes)
            if (elements >= 0).all():
                positions = np.sort(elements.argsort(kind="stable").reshape(num_ranks, -1)[rank])
            found.append(positions)
        return found


def parameters(shape: ModelShape) -> list[Param]:
    """The axis table of one network: all of its parameters, in the order of the forward pass."""
    final_norm = "final_layernorm" if shape.is_uniform else "final_norm"  # GPTModel's name and HybridModel's
    return [
        Param("embedding.word_embeddings.weight", (VOCAB, HIDDEN), None, "vocab", (Part("model.embed_tokens.weight"),)),
        *_attention(shape),
        *_mlp(shape),
        *_norm(shape, HIDDEN, f"decoder.{final_norm}.", "model.norm.", None),
        *([] if shape.tied else [_OUTPUT]),
    ]


_OUTPUT = Param("output_layer.weight", (VOCAB, HIDDEN), None, "vocab", (Part("lm_head.weight"),), matmul=True)


def _norm(shape: ModelShape, dim: Dim, prefix: str, hf_prefix: str, sublayer: str | None) -> list[Param]:
    tensors = ["weight", "bias"] if shape.norm is NormKind.LAYERNORM else ["weight"]
    return [Param(prefix + t, (dim,), sublayer, None, (Part(hf_prefix + t),)) for t in tensors]


def _attention(shape: ModelShape) -> list[Param]:
    hf = "model.layers.{layer}.self_attn."

    def qkv(tensor: str) -> tuple[Part, ...]:
        return (
            Part(f"{hf}q_proj.{tensor}", ("key", "value")),
            Part(f"{hf}k_proj.{tensor}", ("head", "value")),
            Part(f"{hf}v_proj.{tensor}", ("head", "key")),
        )

    def param(name, dims, split, parts, matmul=False):
        return Param(f"self_attention.{name}", dims, ATTENTION, split, parts, matmul)

    rows = [
        *_norm(
            shape, HIDDEN, "self_attention.linear_qkv.layer_norm_", "model.layers.{layer}.input_layernorm.", ATTENTION
        ),
        param("linear_qkv.weight", (_QKV_ROWS, HIDDEN), "group", qkv("weight"), matmul=True),
    ]
    if shape.qkv_bias or shape.linear_bias:
        rows.append(param("linear_qkv.bias", (_QKV_ROWS,), "group", qkv("bias")))
    if shape.qk_norm:
        for one in "qk":
            rows += _norm(shape, HEAD_DIM, f"self_attention.{one}_layernorm.", f"{hf}{one}_norm.", ATTENTION)
    rows.append(
        param("linear_proj.weight", (HIDDEN, _HEAD_COLUMNS), "group", (Part(f"{hf}o_proj.weight"),), matmul=True)
    )
    if shape.linear_bias:
        rows.append(param("linear_proj.bias", (HIDDEN,), None, (Part(f"{hf}o_proj.bias"),)))
    return rows


def _mlp(shape: ModelShape) -> list[Param]:
    hf = "model.layers.{layer}.mlp."
    neurons = (GATE + UP) * FFN if shape.gated else FFN

    def fc1(tensor: str) -> tuple[Part, ...]:
        if not shape.gated:
            return (Part(f"{hf}up_proj.{tensor}"),)
        return (Part(f"{hf}gate_proj.{tensor}", ("up",)), Part(f"{hf}up_proj.{tensor}", ("gate",)))

    def param(name, dims, split, parts, matmul=False):
        return Param(f"mlp.{name}", dims, MLP, split, parts, matmul)

    rows = [
        *_norm(shape, HIDDEN, "mlp.linear_fc1.layer_norm_", "model.layers.{layer}.post_attention_layernorm.", MLP),
        param("linear_fc1.weight", (neurons, HIDDEN), "ffn", fc1("weight"), matmul=True),
    ]
    if shape.linear_bias:
        rows.append(param("linear_fc1.bias", (neurons,), "ffn", fc1("bias")))
    rows.append(param("linear_fc2.weight", (HIDDEN, FFN), "ffn", (Part(f"{hf}down_proj.weight"),), matmul=True))
    if shape.linear_bias:
        rows.append(param("linear_fc2.bias", (HIDDEN,), None, (Part(f"{hf}down_proj.bias"),)))
    return rows
