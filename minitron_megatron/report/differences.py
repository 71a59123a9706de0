"""What tells two networks apart: their shapes, or, where these are equal, their weights."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_megatron.checkpoint.huggingface import HuggingFaceFolder
from minitron_megatron.checkpoint.sharded import Checkpoint
from minitron_megatron.checkpoint.source import TensorSource, instances
from minitron_megatron.model.axes import Param, axis_sizes, parameters
from minitron_megatron.progress import progress

# Of one tensor, as many as are in memory at a time.
_ELEMENTS = 2**22


@dataclass
class Difference:
    """How far a parameter of two networks is apart.

    Attributes:
        name: of the parameter.
        largest: absolute difference over all elements and layers; NaN if one of the two has NaN where it differs.
        layer: where it is, counted from 0 among the sublayers that have it; None outside the layers.
        num_layers: that differ at all.
    """

    name: str
    largest: float = 0.0
    layer: int | None = None
    num_layers: int = 0


def open_network(path: Path) -> TensorSource:
    """A checkpoint or a Hugging Face folder.

    Raises:
        CheckpointError: it is neither, or not whole.
    """
    return HuggingFaceFolder(path) if (path / "config.json").is_file() else Checkpoint(path)


def comparable(first: TensorSource, second: TensorSource) -> bool:
    """Whether two networks have the same parameters, up to rows that pad the vocabulary."""
    rows = max(first.shape.padded_vocab, second.shape.padded_vocab)
    return first.shape.replace(padded_vocab=rows) == second.shape.replace(padded_vocab=rows)


def differences(first: TensorSource, second: TensorSource) -> list[Difference]:
    """The largest difference of every parameter of two comparable networks. Rows that pad the vocabulary are left out.

    Memory is bounded by `_ELEMENTS`, not by the largest tensor.
    """
    shape, found = first.shape, []
    table = parameters(shape)
    with progress("compare", len(table)) as advance:
        for param in table:
            difference = Difference(param.stacked_key if param.sublayer else param.name)
            for layer in instances(param, shape):
                largest = 0.0
                for index in _blocks(param, shape):
                    a, b = (source.read(param, layer, index).float() for source in (first, second))
                    if not a.equal(b):
                        largest = _larger(largest, float((a - b).abs().max()))
                if largest:  # which NaN is, too
                    difference.num_layers += 1
                    if _larger(difference.largest, largest) is largest:
                        difference.largest, difference.layer = largest, layer
            found.append(difference)
            advance()
    return found


def _larger(a: float, b: float) -> float:
    """NaN before everything else."""
    return a if math.isnan(a) or a >= b else b


def _blocks(param: Param, shape) -> Iterator[list[np.ndarray]]:
    """The positions of a parameter, a few rows at a time."""
    rows, *columns = param.size(axis_sizes(shape))
    rows = shape.vocab if param.split == "vocab" else rows
    step = max(1, _ELEMENTS // math.prod(columns))
    for start in range(0, rows, step):
        yield [np.arange(start, min(start + step, rows)), *map(np.arange, columns)]
