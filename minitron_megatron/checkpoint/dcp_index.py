"""Reads the index of a `torch_dist` checkpoint: which tensors it holds, and where their chunks are."""

import dataclasses
import itertools
import math
import pickle
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from minitron_megatron.checkpoint.dcp_chunks import Chunk, StoredObject
from minitron_megatron.checkpoint.safe_load import PlainUnpickler
from minitron_megatron.errors import CheckpointError


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]


def is_whole(tensor: StoredTensor) -> bool:
    """Returns whether the chunks of a tensor cover every position exactly once.

    They do if their corners, with alternating signs, sum to those of the whole tensor: inner corners cancel in pairs.
    """
    left = Counter(_corners((0,) * len(tensor.shape), tensor.shape))
    for chunk in tensor.chunks:
        if min(chunk.sizes) < 1 or math.prod(chunk.sizes) * chunk.dtype.itemsize > chunk.length:
            return False
        left.subtract(_corners(chunk.offsets, chunk.sizes))
    return not any(left.values())


def _corners(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    """Returns the corners of a box of any dimension, and the sign of each."""
    ends = [((offset, 1), (offset + size, -1)) for offset, size in zip(offsets, sizes, strict=True)]
    return {tuple(at for at, _ in corner): math.prod(sign for _, sign in corner) for corner in itertools.product(*ends)}


class _IndexUnpickler(PlainUnpickler):
    """Unpickles a checkpoint's index: only plain records, so no code runs."""

    _RECORDS = (
        "torch.distributed.checkpoint.metadata",
        "torch.distributed.checkpoint.planner",
        "torch.distributed.checkpoint.filesystem",
        "megatron.core.dist_checkpointing.strategies.torch",
    )
    _OTHERS = {
        ("collections", "OrderedDict"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("pathlib", "PosixPath"),
    }

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._OTHERS:
            return super().find_class(module, name)
        if module in self._RECORDS:
            kind = super().find_class(module, name)
            if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, Enum)):
                return kind
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's index")


def read_index(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, StoredObject]]:
    """Reads the index of an iteration. Returns its tensors and its other objects, by key."""
    path = folder / ".metadata"
    try:
        tensors, objects, needed = _parse_index(_IndexUnpickler(path.read_bytes()).load(), folder)
    except Exception as e:  # damaged files raise exceptions of many types
        raise CheckpointError(f"{path} cannot be read as a checkpoint's index: {e!r}") from e
    for path, size in needed.items():
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is not whole")
        if path.stat().st_size < size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes and needs {size}: it was cut short")
    return tensors, objects


def _whole_numbers(values: Iterable[int]) -> tuple[int, ...]:
    numbers = tuple(values)
    if any(type(number) is not int for number in numbers):
        raise TypeError(f"{numbers!r} are not integers")
    return numbers


def _parse_index(
    metadata: Metadata, folder: Path
) -> tuple[dict[str, StoredTensor], dict[str, StoredObject], dict[Path, int]]:
    """Converts an index to tensors by key, other objects by key, and the minimum size of every file."""
    needed: dict[Path, int] = {}
    places = {}
    for index, info in metadata.storage_data.items():
        if Path(info.relative_path).name != info.relative_path or info.offset < 0 or info.length < 1:
            raise ValueError(f"{index.fqn} is kept in {info.length} bytes from {info.offset} of {info.relative_path!r}")
        path = folder / info.relative_path
        needed[path] = max(needed.get(path, 0), info.offset + info.length)
        places[index.fqn, tuple(index.offset) if index.offset is not None else None] = info
    tensors, objects = {}, {}
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, BytesStorageMetadata):
            if info := places.get((key, None)):
                objects[key] = StoredObject(folder / info.relative_path, info.offset, info.length)
            continue
        if not isinstance(stored.properties.dtype, torch.dtype):
            raise TypeError(f"{key} is of {stored.properties.dtype!r}")
        chunks = []
        for chunk in stored.chunks:
            info = places[key, tuple(chunk.offsets)]
            path = folder / info.relative_path
            offsets, sizes = _whole_numbers(chunk.offsets), _whole_numbers(chunk.sizes)
            chunks.append(Chunk(key, offsets, sizes, stored.properties.dtype, path, info.offset, info.length))
        tensors[key] = StoredTensor(_whole_numbers(stored.size), stored.properties.dtype, chunks)
    return tensors, objects, needed
