"""Reading Megatron's `torch_dist` checkpoints tensor by tensor, without building a model.

On disk every parameter is one global tensor in chunks, whatever layout wrote it. Reading takes any positions of it
and touches only the chunks they lie in, block by block. So memory is bounded by what is asked for.
"""

import argparse
import dataclasses
import json
import math
import pickle
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from minitron_megatron.checkpoint.chunks import Chunk
from minitron_megatron.checkpoint.manifest import MANIFEST, Manifest
from minitron_megatron.checkpoint.rows import bits
from minitron_megatron.checkpoint.saved_args import read_args
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.axes import PROJECTIONS, Param, axis_sizes, parameters
from minitron_megatron.model.shape import ModelShape

TRACKER = "latest_checkpointed_iteration.txt"
HUGGINGFACE = "huggingface"
SHAPE = "shape.json"
# Keys of a teacher that is trained beside its student begin with it.
TEACHER = "teacher."
# Tensors of a training run that are not weights of its network.
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", f"{PROJECTIONS}.", TEACHER)


def iteration_folder(iteration: int) -> str:
    """Megatron's name for the folder of one iteration."""
    return f"iter_{iteration:07d}"


def checkpoint_root(path: Path) -> Path:
    """The folder that holds the iterations: `path`, or its `checkpoints/` if `path` is a training run.

    Raises:
        CheckpointError: neither is a checkpoint.
    """
    for root in (path, path / "checkpoints"):
        if (root / TRACKER).is_file():
            return root
    if not path.exists():
        raise CheckpointError(f"{path} does not exist: name the folder of a checkpoint")
    raise CheckpointError(f"{path} is not a checkpoint: it has no {TRACKER}")


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]


class Checkpoint:
    """A whole `torch_dist` checkpoint on disk, as a source of weights.

    Opening reads the index alone and checks that every file it names is there and long enough.

    Args:
        path: the folder with `latest_checkpointed_iteration.txt`, or a training run's folder.

    Raises:
        CheckpointError: it is not a checkpoint, not whole, or not of the shape that it claims.
    """

    def __init__(self, path: Path | str):
        self.root = checkpoint_root(Path(path))
        tracker = (self.root / TRACKER).read_text().strip()
        if not tracker.isdigit():
            raise CheckpointError(f"{self.root / TRACKER} says {tracker!r}: expected the number of an iteration")
        self.iteration = int(tracker)
        self.folder = self.root / iteration_folder(self.iteration)
        if not (self.folder / "metadata.json").is_file():
            raise CheckpointError(f"{self.folder} is not whole: it has no metadata.json, which is written last")
        self.shape = _read_shape(self.root)
        self.tensors = _read_index(self.folder)
        self._table = parameters(self.shape)
        self._stacked = any(p.stacked_key in self.tensors for p in self._table if p.sublayer)
        self._check_tensors()
        self.dtype = self._stored(self._table[0], None).dtype

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.root)

    @property
    def huggingface_folder(self) -> Path:
        """Tokenizer and Hugging Face config that travel with the checkpoint."""
        return self.root / HUGGINGFACE

    def megatron_args(self) -> argparse.Namespace | None:
        """The `args` that Megatron-LM saved beside the weights, see `read_args`."""
        return read_args(self.folder / "common.pt")

    def read(self, param: Param, layer: int | None, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`."""
        stored = self._stored(param, layer)
        if layer is not None and self._stacked:
            return self._gather(stored, [np.array([layer]), *index])[0]
        return self._gather(stored, index)

    def _stored(self, param: Param, layer: int | None) -> StoredTensor:
        key = param.stacked_key if layer is None or self._stacked else param.layer_key(layer, self.shape)
        return self.tensors[key]

    def _gather(self, stored: StoredTensor, index: list[np.ndarray]) -> torch.Tensor:
        """The positions `index[0] x index[1] x ...` of a global tensor, read chunk by chunk."""
        out = torch.empty([len(i) for i in index], dtype=stored.dtype)
        for chunk in stored.chunks:
            # Ascending positions that fall into one chunk are neighbours in `index`.
            inside = [
                slice(*np.searchsorted(positions, [start, start + size]))
                for positions, start, size in zip(index, chunk.offsets, chunk.sizes, strict=True)
            ]
            if all(s.start < s.stop for s in inside):
                wanted = [p[s] - start for p, s, start in zip(index, inside, chunk.offsets, strict=True)]
                chunk.read(wanted, bits(out)[tuple(inside)])
        return out

    def _check_tensors(self) -> None:
        sizes, count = axis_sizes(self.shape), {s: len(self.shape.sublayers(s)) for s in set(self.shape.pattern)}
        expected = {}
        for param in self._table:
            size = param.size(sizes)
            if param.sublayer is None:
                expected[param.name] = size
            elif self._stacked:
                expected[param.stacked_key] = (count[param.sublayer], *size)
            else:
                expected.update({param.layer_key(i, self.shape): size for i in range(count[param.sublayer])})
        problems = []
        for key, size in expected.items():
            if key not in self.tensors:
                problems.append(f"missing: {key} {list(size)}")
            elif self.tensors[key].shape != size:
                problems.append(f"wrong size: {key} is {list(self.tensors[key].shape)}, the shape says {list(size)}")
            elif not _is_whole(self.tensors[key]):
                problems.append(f"not whole: {key} {list(size)}, of which some chunks are missing")
        unknown = [k for k in self.tensors if k not in expected and not k.startswith(_NOT_WEIGHTS)]
        problems += [f"unknown: {key} {list(self.tensors[key].shape)}" for key in unknown]
        if problems:
            raise CheckpointError(f"{self.folder} does not hold the network of its shape:\n  " + "\n  ".join(problems))


def _is_whole(tensor: StoredTensor) -> bool:
    """Whether its chunks, none of them named twice, lie inside of it and fill it."""
    starts = {chunk.offsets for chunk in tensor.chunks}
    ends = ((o + s for o, s in zip(chunk.offsets, chunk.sizes, strict=True)) for chunk in tensor.chunks)
    return (
        len(starts) == len(tensor.chunks)
        and all(end <= size for corner in ends for end, size in zip(corner, tensor.shape, strict=True))
        and sum(math.prod(chunk.sizes) for chunk in tensor.chunks) == math.prod(tensor.shape)
    )


def _read_shape(root: Path) -> ModelShape:
    file = next((root / name for name in (MANIFEST, SHAPE) if (root / name).exists()), None)
    if file is None:
        raise CheckpointError(
            f"{root} does not say what its network is: it has no {MANIFEST}. Describe the network in {root / SHAPE} "
            f"(the fields of ModelShape, as JSON)"
        )
    try:
        values = json.loads(file.read_text())
        return ModelShape.from_dict(values["shape"] if file.name == MANIFEST else values)
    except (TypeError, ValueError, KeyError) as e:
        raise CheckpointError(f"{file} does not describe a network: {e}") from e


class _IndexUnpickler(pickle.Unpickler):
    """Unpickles a checkpoint's index and nothing else: plain records, so that nothing can run."""

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

    def find_class(self, module, name):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._OTHERS:
            return super().find_class(module, name)
        if module in self._RECORDS:
            found = super().find_class(module, name)
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum)):
                return found
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's index")


def _read_index(folder: Path) -> dict[str, StoredTensor]:
    path = folder / ".metadata"
    try:
        with open(path, "rb") as f:
            tensors, needed = _tensors_and_files(_IndexUnpickler(f).load(), folder)
    except Exception as e:  # as many kinds as there are ways to be damaged
        raise CheckpointError(f"{path} cannot be read as a checkpoint's index: {e!r}") from e
    for path, size in needed.items():
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is not whole")
        if path.stat().st_size < size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes and needs {size}: it was cut short")
    return tensors


def _tensors_and_files(metadata: Metadata, folder: Path) -> tuple[dict[str, StoredTensor], dict[Path, int]]:
    """What an index says: every tensor, and every file with the bytes that it must have at least."""
    needed: dict[Path, int] = {}
    places = {}
    for index, info in metadata.storage_data.items():
        path = folder / info.relative_path
        needed[path] = max(needed.get(path, 0), info.offset + info.length)
        places[index.fqn, tuple(index.offset) if index.offset is not None else None] = info
    tensors = {}
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, BytesStorageMetadata):
            continue
        chunks = []
        for chunk in stored.chunks:
            info = places[key, tuple(chunk.offsets)]
            path = folder / info.relative_path
            offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
            chunks.append(Chunk(key, offsets, sizes, stored.properties.dtype, path, info.offset, info.length))
        tensors[key] = StoredTensor(tuple(stored.size), stored.properties.dtype, chunks)
    return tensors, needed
