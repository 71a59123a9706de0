"""The algebra of the axis table: what every dimension of a parameter means, and how it is cut.

A tensor dimension is an expression over named axes. `GROUP * (HEAD + KEY + VALUE) * HEAD_DIM` is the row order of
Megatron's fused QKV projection: per query group its query heads, then its key head, then its value head. From that one
description follow the size of the dimension and, for any choice of kept indices along the named axes, the rows that
stay:

- pruning keeps the indices of a plan,
- a tensor-parallel shard keeps a range of one axis, or of the rows of a query group,
- the Hugging Face tensors inside a fused one are the rows left when the other parts are dropped.

So all of these are one function, `Dim.index`. The rows of the table are in `parameters.py` and `layers/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from minitron_megatron.config import axes

Sizes = Mapping[str, int]
"""Length of each axis by its name."""

Kept = Mapping[str, np.ndarray]
"""Kept indices by axis name, sorted. An axis without an entry is kept whole. Of an axis that lies within another one
they may be two-dimensional, `[kept element of the outer axis, kept element]`."""


class Dim:
    """A tensor dimension as an expression over named axes."""

    def __mul__(self, inner: "Dim") -> "Dim":
        return _Product(self, inner)

    def __add__(self, other: "Dim") -> "Dim":
        return _Concat(self, other)

    def size(self, sizes: Sizes) -> int:
        """Length of the dimension."""
        raise NotImplementedError

    def index(self, kept: Kept, sizes: Sizes, rows: Sizes | None = None) -> np.ndarray:
        """Positions in this dimension that stay when only `kept` stays of each axis, in order.

        Args:
            kept: indices per axis; axes that are not named are kept whole.
            sizes: length of each axis before cutting.
            rows: for each enclosing axis, which of its kept elements this is within.

        Returns:
            int64 array of positions.
        """
        raise NotImplementedError

    def labels(self, axis: str, sizes: Sizes) -> np.ndarray:
        """Which element of `axis` each position belongs to, -1 where to none."""
        raise NotImplementedError


@dataclass(frozen=True)
class Axis(Dim):
    """A named axis.

    Attributes:
        name: of the axis.
        within: name of the axis that it lies within, whose every element may keep other elements of this one.
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
        # An axis then stands outside of everything that lies within it.
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


HIDDEN, VOCAB = Axis("hidden"), Axis("vocab")

axes.register(axes.Axis(HIDDEN.name, "channels of the residual stream.", __name__, HIDDEN.name, is_scored=True))


@dataclass(frozen=True)
class Part:
    """One Hugging Face tensor inside a Megatron parameter.

    Attributes:
        name: its key in the Hugging Face layout; `{layer}` stands for the number of the transformer layer.
        dropped: part axes (of length one) that are not in it.
        rotary_dim: rows of each head, where they pass through the rotary embedding; None where they do not.
    """

    name: str
    dropped: tuple[str, ...] = ()
    rotary_dim: int | None = None

    @property
    def kept(self) -> Kept:
        """The cut of the Megatron parameter that leaves this tensor."""
        return {axis: np.empty(0, dtype=np.int64) for axis in self.dropped}


@dataclass(frozen=True)
class Row:
    """A row of the axis table, as a kind of layer writes it.

    Attributes:
        name: the key below the layer's for parameters of a sublayer, else the whole key.
        dims: what each dimension means.
        split: the axis that tensor parallelism splits, or None when every rank holds all of it.
        parts: its tensors in the Hugging Face layout.
        matmul: whether a token is multiplied by it (embedding lookups, norms and biases are not).
        takes_merged: whether what a plan merges into kept elements goes into it (see `pruning/slicing.py`).
    """

    name: str
    dims: tuple[Dim, ...]
    split: str | None
    parts: tuple[Part, ...]
    matmul: bool = False
    takes_merged: bool = False


@dataclass(frozen=True, eq=False, kw_only=True)
class Param(Row):
    """A parameter of a network: a row of the axis table with its place and sizes.

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
        """Whether it is the table that tokens are looked up in."""
        return self.split == VOCAB.name and not self.matmul

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(dim.size(self.sizes) for dim in self.dims)

    def index(self, kept: Kept) -> list[np.ndarray]:
        """For each dimension, the positions that stay when only `kept` stays."""
        return [dim.index(kept, self.sizes) for dim in self.dims]

    def shard(self, rank: int, num_ranks: int) -> list[np.ndarray]:
        """For each dimension, the positions that one of `num_ranks` tensor-parallel ranks holds.

        All ranks hold equally many, element by element of the split axis: several query groups, or a part of one.
        """
        shards = []
        for positions, dim in zip(self.index({}), self.dims, strict=True):
            elements = np.full(len(positions), -1) if self.split is None else dim.labels(self.split, self.sizes)
            if (elements >= 0).all():
                positions = np.sort(elements.argsort(kind="stable").reshape(num_ranks, -1)[rank])
            shards.append(positions)
        return shards

    def hf_name(self, part: Part) -> str:
        """Key of one of its `parts` in the Hugging Face layout."""
        return part.name.format(layer=self.layer)

    def hf_shape(self, part: Part, vocab_size: int) -> list[int]:
        """Shape of one of its `parts`, whose vocabulary is not padded."""
        sizes = {**self.sizes, VOCAB.name: vocab_size, **dict.fromkeys(part.dropped, 0)}
        return [dim.size(sizes) for dim in self.dims]

    def hf_rows(self, part: Part, vocab_size: int) -> np.ndarray:
        """Rows of Megatron's tensor that make up one of its `parts`, without those that pad the vocabulary."""
        kept = {**part.kept, **({VOCAB.name: np.arange(vocab_size)} if self.split == VOCAB.name else {})}
        return self.dims[0].index(kept, self.sizes)
