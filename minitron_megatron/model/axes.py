"""The algebra of the axis table: the meaning of every dimension of a parameter, and how to slice it.

A tensor dimension is an expression over named axes. `GROUP * (HEAD + KEY + VALUE) * HEAD_DIM` is the row order of
Megatron's fused QKV projection: per query group its query heads, then its key head, then its value head. This one
description gives the size of the dimension and, for any choice of kept indices along the named axes, the rows to keep:

- pruning keeps the indices of a plan,
- a tensor-parallel shard keeps a range of one axis, or of the rows of a query group,
- a Hugging Face tensor inside a fused one keeps the rows left when the other parts are dropped.

So `Dim.index` does all three. The rows of the table are in `parameters.py` and `layers/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from minitron_megatron.config import axes

Sizes = Mapping[str, int]
"""Length of each axis by its name."""

Kept = Mapping[str, np.ndarray]
"""Kept indices by axis name, sorted. An axis without an entry is kept whole. For an axis within another one the indices
may be two-dimensional, `[kept element of the outer axis, kept element]`."""


class Dim:
    """A tensor dimension as an expression over named axes."""

    def __mul__(self, inner: "Dim") -> "Dim":
        return _Product(self, inner)

    def __add__(self, other: "Dim") -> "Dim":
        return _Concat(self, other)

    def size(self, sizes: Sizes) -> int:
        """Returns the length of the dimension."""
        raise NotImplementedError

    def index(self, kept: Kept, sizes: Sizes, rows: Sizes | None = None) -> np.ndarray:
        """Returns the positions in this dimension, in order, that remain when each axis keeps `kept`.

        Args:
            kept: indices per axis; axes without an entry are kept whole.
            sizes: length of each axis before slicing.
            rows: for each enclosing axis, which of its kept elements encloses this dimension.

        Returns:
            int64 array of positions.
        """
        raise NotImplementedError

    def labels(self, axis: str, sizes: Sizes) -> np.ndarray:
        """Returns the element of `axis` that each position belongs to, -1 for none."""
        raise NotImplementedError


@dataclass(frozen=True)
class Axis(Dim):
    """A named axis.

    Attributes:
        name: of the axis.
        within: name of the enclosing axis, if any. Each of its elements may keep different elements of this axis.
    """

    name: str
    within: str | None = None

    def size(self, sizes: Sizes) -> int:
        return sizes[self.name]

    def index(self, kept: Kept, sizes: Sizes, rows: Sizes | None = None) -> np.ndarray:
        if self.name not in kept:
            return np.arange(sizes[self.name])
        indices = np.asarray(kept[self.name], dtype=np.int64)
        if self.within is not None and indices.ndim == 2:
            return indices[(rows or {})[self.within]]
        return indices

    def labels(self, axis: str, sizes: Sizes) -> np.ndarray:
        return np.arange(sizes[axis]) if self.name == axis else np.full(sizes[self.name], -1)


@dataclass(frozen=True)
class _Product(Dim):
    outer: Dim
    inner: Dim

    def __mul__(self, inner: Dim) -> Dim:
        # Right-associative, so that the outermost axis is `outer` of the product.
        return _Product(self.outer, self.inner * inner)

    def size(self, sizes: Sizes) -> int:
        return self.outer.size(sizes) * self.inner.size(sizes)

    def index(self, kept: Kept, sizes: Sizes, rows: Sizes | None = None) -> np.ndarray:
        stride = self.inner.size(sizes)
        parts = []
        for row, position in enumerate(self.outer.index(kept, sizes, rows)):
            within = {**(rows or {}), self.outer.name: row} if isinstance(self.outer, Axis) else rows
            parts.append(position * stride + self.inner.index(kept, sizes, within))
        return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)

    def labels(self, axis: str, sizes: Sizes) -> np.ndarray:
        outer = np.repeat(self.outer.labels(axis, sizes), self.inner.size(sizes))
        inner = np.tile(self.inner.labels(axis, sizes), self.outer.size(sizes))
        return np.maximum(outer, inner)


@dataclass(frozen=True)
class _Concat(Dim):
    first: Dim
    second: Dim

    def size(self, sizes: Sizes) -> int:
        return self.first.size(sizes) + self.second.size(sizes)

    def index(self, kept: Kept, sizes: Sizes, rows: Sizes | None = None) -> np.ndarray:
        first = self.first.index(kept, sizes, rows)
        return np.concatenate([first, self.first.size(sizes) + self.second.index(kept, sizes, rows)])

    def labels(self, axis: str, sizes: Sizes) -> np.ndarray:
        return np.concatenate([self.first.labels(axis, sizes), self.second.labels(axis, sizes)])


@dataclass(frozen=True)
class Grouped(Dim):
    """A dimension with one element for every `group` consecutive elements of another; the last may have fewer.

    It has no elements of axes of its own: what it holds follows the dimension that is grouped.
    """

    inner: Dim
    group: int

    def size(self, sizes: Sizes) -> int:
        return -(-self.inner.size(sizes) // self.group)

    def index(self, kept: Kept, sizes: Sizes, rows: Sizes | None = None) -> np.ndarray:
        return np.unique(self.inner.index(kept, sizes, rows) // self.group)

    def labels(self, axis: str, sizes: Sizes) -> np.ndarray:
        return np.full(self.size(sizes), -1)


HIDDEN, VOCAB = Axis("hidden"), Axis("vocab")

axes.register(axes.Axis(HIDDEN.name, "channels of the residual stream.", __name__, HIDDEN.name, is_scored=True))


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor inside a Megatron parameter.

    Attributes:
        name: its key in the Hugging Face layout; `{layer}` is the number of the transformer layer.
        dropped: part axes (of length one) that it does not contain.
        rotary_dim: rows of each head, if the rotary embedding applies to them; else None.
    """

    name: str
    dropped: tuple[str, ...] = ()
    rotary_dim: int | None = None

    @property
    def kept(self) -> Kept:
        """The kept indices that select this tensor from the Megatron parameter."""
        return {axis: np.empty(0, dtype=np.int64) for axis in self.dropped}


@dataclass(frozen=True, eq=False)
class Row:
    """A row of the axis table, as a kind of layer defines it.

    Attributes:
        name: the key within the layer for parameters of a sublayer, else the whole key.
        dims: expression of each dimension.
        split: the axis that tensor parallelism splits; None if it is replicated.
        parts: its tensors in the Hugging Face layout.
        matmul: whether tokens are multiplied by it (not so for embedding lookups, norms and biases).
        takes_merged: whether a plan's merged elements change its values (see `pruning/slicing.py`).
    """

    name: str
    dims: tuple[Dim, ...]
    split: str | None
    parts: tuple[Part, ...]
    matmul: bool = False
    takes_merged: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Param(Row):
    """A parameter of a network: a row of the axis table with its position and sizes.

    Attributes:
        position: of its sublayer in the network, None outside of the layers.
        layer: number of the transformer layer that holds the sublayer, None outside of the layers.
        sizes: length of every axis.
    """

    position: int | None
    layer: int | None
    sizes: Sizes

    @property
    def is_embedding(self) -> bool:
        """Whether it is the embedding table."""
        return self.split == VOCAB.name and not self.matmul

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(dim.size(self.sizes) for dim in self.dims)

    def index(self, kept: Kept) -> list[np.ndarray]:
        """Returns for each dimension the positions that remain when each axis keeps `kept`."""
        return [dim.index(kept, self.sizes) for dim in self.dims]

    def shard(self, rank: int, num_ranks: int) -> list[np.ndarray]:
        """Returns for each dimension the positions that one of `num_ranks` tensor-parallel ranks holds.

        All ranks hold equally many, in the order of the split axis: several query groups, or a part of one.
        """
        shards = []
        for dim in self.dims:
            whole = dim.inner if isinstance(dim, Grouped) else dim
            positions = whole.index({}, self.sizes)
            elements = np.full(len(positions), -1) if self.split is None else whole.labels(self.split, self.sizes)
            if (elements >= 0).all():
                positions = np.sort(elements.argsort(kind="stable").reshape(num_ranks, -1)[rank])
            shards.append(np.unique(positions // dim.group) if isinstance(dim, Grouped) else positions)
        return shards

    def hf_name(self, part: Part) -> str:
        """Returns the key of one of its `parts` in the Hugging Face layout."""
        return part.name.format(layer=self.layer)

    def hf_shape(self, part: Part, vocab_size: int) -> list[int]:
        """Returns the shape of one of its `parts`, without the padding of the vocabulary."""
        sizes = {**self.sizes, VOCAB.name: vocab_size, **dict.fromkeys(part.dropped, 0)}
        return [dim.size(sizes) for dim in self.dims]

    def rows_of_parts(self) -> list[np.ndarray]:
        """Returns the rows of each of its `parts`, for a matrix without a vocabulary."""
        return [self.hf_rows(part, vocab_size=0) for part in self.parts]

    def hf_rows(self, part: Part, vocab_size: int) -> np.ndarray:
        """Returns the rows of Megatron's tensor that make up one of its `parts`, without the vocabulary's padding."""
        kept = {**part.kept, **({VOCAB.name: np.arange(vocab_size)} if self.split == VOCAB.name else {})}
        return self.dims[0].index(kept, self.sizes)
