"""Compares the weights of two networks."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.huggingface import HuggingFaceFolder
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.model.axes import VOCAB, Dim, Param
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import layer_key, parameters, stacked_key
from minitron_megatron.progress import progress

# Number of a tensor's elements that are compared at a time.
_ELEMENTS = 2**22


@dataclass
class Difference:
    """The difference of a parameter between two networks.

    Attributes:
        name: of the parameter, the same in every layer.
        largest: largest absolute difference over all elements and layers; NaN if either has NaN where they differ.
        layer: transformer layer of that element; None outside the layers, or if nothing differs.
        num_layers: number of layers that differ; 1 outside the layers.
    """

    name: str
    largest: float = 0.0
    layer: int | None = None
    num_layers: int = 0


def open_network(path: Path) -> TensorSource:
    """Opens a checkpoint or a Hugging Face folder.

    Raises:
        CheckpointError: it is neither, or not whole.
    """
    is_folder = (path / "config.json").is_file()
    # Either knows its dtype once it is open.
    return HuggingFaceFolder(path) if is_folder else Checkpoint(path)


def comparable(first: TensorSource, second: TensorSource) -> bool:
    """Returns whether two networks have the same parameters, up to rows that pad the vocabulary."""
    return _table(first.network) == _table(second.network)


def _table(network: Network) -> list[tuple[str, tuple[Dim, ...], dict[str, int]]]:
    """Returns what must be equal in two networks for their parameters to be comparable."""
    return [
        (layer_key(param), param.dims, {**param.sizes, VOCAB.name: network.vocab_size}) for param in parameters(network)
    ]


def differences(first: TensorSource, second: TensorSource) -> list[Difference]:
    """The largest difference of every parameter of two comparable networks. Rows that pad the vocabulary are left out.

    Memory is bounded by `_ELEMENTS`, not by the largest tensor.
    """
    by_name: dict[str, Difference] = {}
    pairs = list(zip(parameters(first.network), parameters(second.network), strict=True))
    with progress("compare", len(pairs)) as advance:
        for own, other in pairs:
            difference = by_name.setdefault(stacked_key(own), Difference(stacked_key(own)))
            largest = 0.0
            for index in _blocks(own, first.network.vocab_size):
                a, b = first.read(own, index).float(), second.read(other, index).float()
                if not a.equal(b):
                    largest = _larger(largest, float((a - b).abs().max()))
            if largest:  # which NaN is, too
                difference.num_layers += 1
                if _larger(difference.largest, largest) is largest:
                    difference.largest, difference.layer = largest, own.layer
            advance()
    return list(by_name.values())


def _larger(a: float, b: float) -> float:
    """Returns the larger number; NaN counts as the largest."""
    return a if math.isnan(a) or a >= b else b


def _blocks(param: Param, vocab_size: int) -> Iterator[list[np.ndarray]]:
    """Yields the positions of a parameter, a few rows at a time."""
    rows, *columns = param.shape
    rows = vocab_size if param.split == VOCAB.name else rows
    step = max(1, _ELEMENTS // math.prod(columns))
    for start in range(0, rows, step):
        yield [np.arange(start, min(start + step, rows)), *map(np.arange, columns)]
