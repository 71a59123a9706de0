"""Reading and writing Megatron's `torch_dist` checkpoints tensor by tensor, without building a model.

On disk every parameter is one global tensor in chunks, whatever layout wrote it. Reading takes any
positions of it and touches only the chunks they lie in, one at a time; writing asks a source for one
chunk after another. So memory is bounded by a chunk and not by the model.
"""

import dataclasses
import io
import json
import logging
import math
import pickle
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from minitron_megatron.checkpoint.manifest import MANIFEST, Manifest, writing
from minitron_megatron.checkpoint.source import TensorSource, instances, take
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.axes import Param, axis_sizes, parameters
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape

logger = logging.getLogger(__name__)

TRACKER = "latest_checkpointed_iteration.txt"
HUGGINGFACE = "huggingface"
SHAPE = "shape.json"
CHUNK_BYTES = 256 * 2**20
# Tensors of a training run that are not weights.
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state")
_FUSED_LINEARS = {
    ATTENTION: ("self_attention.linear_qkv", "self_attention.linear_proj"),
    MLP: ("mlp.linear_fc1", "mlp.linear_fc2"),
}


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
class _Chunk:
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    position: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[_Chunk]


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
                out[tuple(inside)] = take(self._load(chunk), wanted)
        return out

    def _load(self, chunk: _Chunk) -> torch.Tensor:
        path = self.folder / chunk.file
        with open(path, "rb") as f:
            f.seek(chunk.position)
            content = io.BytesIO(f.read(chunk.length))
        try:
            return torch.load(content, map_location="cpu", weights_only=True)
        except Exception as e:  # as many kinds as there are ways to be damaged
            raise CheckpointError(f"{path} is damaged at byte {chunk.position}: no tensor can be read there") from e

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
            elif sum(math.prod(chunk.sizes) for chunk in self.tensors[key].chunks) != math.prod(size):
                problems.append(f"not whole: {key} {list(size)}, of which some chunks are missing")
        unknown = [k for k in self.tensors if k not in expected and not k.startswith(_NOT_WEIGHTS)]
        problems += [f"unknown: {key} {list(self.tensors[key].shape)}" for key in unknown]
        if problems:
            raise CheckpointError(f"{self.folder} does not hold the network of its shape:\n  " + "\n  ".join(problems))


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
            tensors, needed = _tensors_and_files(_IndexUnpickler(f).load())
    except Exception as e:  # as many kinds as there are ways to be damaged
        raise CheckpointError(f"{path} cannot be read as a checkpoint's index: {e!r}") from e
    for file, size in needed.items():
        path = folder / file
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is not whole")
        if path.stat().st_size < size:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes and needs {size}: it was cut short")
    return tensors


def _tensors_and_files(metadata: Metadata) -> tuple[dict[str, StoredTensor], dict[str, int]]:
    """What an index says: every tensor, and every file with the bytes that it must have at least."""
    needed: dict[str, int] = {}
    places = {}
    for index, info in metadata.storage_data.items():
        needed[info.relative_path] = max(needed.get(info.relative_path, 0), info.offset + info.length)
        places[index.fqn, tuple(index.offset) if index.offset is not None else None] = info
    tensors = {}
    for key, stored in metadata.state_dict_metadata.items():
        if isinstance(stored, BytesStorageMetadata):
            continue
        chunks = []
        for chunk in stored.chunks:
            info = places[key, tuple(chunk.offsets)]
            chunks.append(
                _Chunk(tuple(chunk.offsets), tuple(chunk.sizes), info.relative_path, info.offset, info.length)
            )
        tensors[key] = StoredTensor(tuple(stored.size), stored.properties.dtype, chunks)
    return tensors, needed


def write_checkpoint(
    output: Path,
    source: TensorSource,
    dtype: torch.dtype,
    manifest: Manifest,
    huggingface: Path | None,
    files: Callable[[Path], None] = lambda folder: None,
) -> None:
    """Write the network of `source` as a `torch_dist` checkpoint that Megatron-Core loads.

    The folder appears whole or not at all. Optimiser state is not part of it.

    Args:
        output: the folder to make; `iter_0000000/` below it holds the tensors.
        source: where the weights come from, read a chunk at a time.
        dtype: of the written weights.
        manifest: of the result; its shape is set here.
        huggingface: tokenizer and Hugging Face config that shall travel with the checkpoint.
        files: writes what else belongs into the folder.
    """
    manifest.shape = source.shape.to_dict()
    manifest.details.setdefault("optimizer_state", "left out")
    sizes = axis_sizes(source.shape)
    num_bytes = dtype.itemsize * sum(
        math.prod(p.size(sizes)) * len(instances(p, source.shape)) for p in parameters(source.shape)
    )
    with writing(output, manifest, num_bytes) as temporary:
        folder = temporary / iteration_folder(0)
        folder.mkdir()
        _save(folder, _LazyPlanner(source, dtype))
        torch.save({"iteration": 0, "checkpoint_version": 3.0}, folder / "common.pt")
        backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
        (folder / "metadata.json").write_text(
            json.dumps({**backends, "sharded_backend_version": 1, "common_backend_version": 1})
        )
        if huggingface is not None:
            shutil.copytree(huggingface, temporary / HUGGINGFACE)
        files(temporary)
        (temporary / TRACKER).write_text("0")


def _save(folder: Path, planner: SavePlanner) -> None:
    """Write what `planner` produces. What fails on the way is raised as it is, and not as torch wraps it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as it is asked to be
            dcp.save({}, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
        return
    except dcp.api.CheckpointException as e:
        [(error, _)] = e.failures.values()
    raise error


def _extra_states(shape: ModelShape) -> list[str]:
    """Keys of the states of Transformer Engine's that Megatron's linear layers save beside their weights and expect."""
    layers = list(enumerate(shape.megatron_layers))
    linears = [(number, linear) for number, held in layers for s in held for linear in _FUSED_LINEARS[s]]
    if shape.is_uniform:
        return [f"decoder.layers.{linear}._extra_state/shard_{number}_{len(layers)}" for number, linear in linears]
    names = [f"decoder.layers.{number}.{linear}" for number, linear in linears]
    # HybridModel's output projection has one, and GPTModel's none.
    return [f"{name}._extra_state/shard_0_1" for name in [*names, "output_layer"]]


class _LazyPlanner(SavePlanner):
    """Plans a checkpoint from the axis table and produces each chunk at the moment it is written."""

    def __init__(self, source: TensorSource, dtype: torch.dtype):
        self.source = source
        self.dtype = dtype
        self.work: dict[MetadataIndex, tuple[Param, int | None, slice]] = {}

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False):
        pass

    def create_local_plan(self) -> SavePlan:
        shape = self.source.shape
        sizes = axis_sizes(shape)
        items = []
        for param in parameters(shape):
            size = param.size(sizes)
            row_bytes = self.dtype.itemsize * math.prod(size[1:])
            rows = max(1, min(size[0], CHUNK_BYTES // row_bytes))
            layers = instances(param, shape)
            for layer in layers:
                for start in range(0, size[0], rows):
                    stop = min(start + rows, size[0])
                    offsets, lengths = (start,) + (0,) * (len(size) - 1), (stop - start, *size[1:])
                    total = size
                    key = param.stacked_key
                    if layer is not None and shape.is_uniform:
                        offsets, lengths, total = (layer, *offsets), (1, *lengths), (len(layers), *size)
                    elif layer is not None:
                        key = param.layer_key(layer, shape)
                    item = self._item(key, offsets, lengths, total)
                    self.work[item.index] = (param, layer, slice(start, stop))
                    items.append(item)
        items += [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in _extra_states(shape)]
        return SavePlan(items)

    def _item(self, key, offsets, lengths, total) -> WriteItem:
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(lengths))
        properties = TensorProperties(dtype=self.dtype)
        return WriteItem(
            MetadataIndex(key, torch.Size(offsets)),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(chunk, properties, torch.Size(total)),
        )

    def create_global_plan(self, all_plans):
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            empty = io.BytesIO()
            torch.save([None], empty)  # Megatron-Core keeps a list of objects under each key
            return empty
        key = MetadataIndex(write_item.index.fqn, write_item.index.offset)
        param, layer, rows = self.work[key]
        size = param.size(axis_sizes(self.source.shape))
        index = [np.arange(rows.start, rows.stop), *(np.arange(n) for n in size[1:])]
        tensor = self.source.read(param, layer, index).to(self.dtype)
        stacked = layer is not None and self.source.shape.is_uniform
        return tensor.unsqueeze(0) if stacked else tensor
