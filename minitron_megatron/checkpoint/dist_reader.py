"""Reading Megatron's `torch_dist` checkpoints tensor by tensor, without building a model.

On disk every parameter is one global tensor in chunks, whatever layout wrote it. Reading takes any positions of it
and touches only the chunks they lie in, block by block. So memory is bounded by what is asked for.
"""

import argparse
import dataclasses
import io
import itertools
import math
import pickle
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from minitron_megatron.artifacts.files import read_json
from minitron_megatron.artifacts.manifest import MANIFEST, Manifest
from minitron_megatron.checkpoint.dcp_chunks import Chunk, StoredObject
from minitron_megatron.checkpoint.hf_assets import num_tokens
from minitron_megatron.checkpoint.megatron_bridge import RUN_CONFIG, args_of_bridge
from minitron_megatron.checkpoint.row_io import bits
from minitron_megatron.checkpoint.safe_load import PlainUnpickler, load_plain
from minitron_megatron.checkpoint.saved_args import read_args
from minitron_megatron.errors import CheckpointError, UnsupportedModelError, UserError
from minitron_megatron.model.axes import Param
from minitron_megatron.model.megatron_args import network_of_args
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import PROJECTIONS, layer_key, parameters, stacked_key

TRACKER = "latest_checkpointed_iteration.txt"
HUGGINGFACE = "huggingface"
# In the folder of an iteration, where Megatron-LM (--save-tokenizer-assets) and Megatron-Bridge keep theirs.
_TOKENIZER = "tokenizer"
# Where a user may describe a network, and what the first of them was called in earlier versions.
NETWORK, _FORMER_NETWORK = "network.json", "shape.json"
# How HybridModel calls its final norm, where GPTModel has another name.
_HYBRID_NORM, _GPT_NORM = "decoder.final_norm.", "decoder.final_layernorm."
# Megatron-LM's name, in the place of an iteration, for weights that no run has trained on yet.
RELEASE = "release"
# Keys of a teacher that is trained beside its student begin with it.
TEACHER = "teacher."
# Tensors of a training run that are not weights of its network.
_NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state", f"{PROJECTIONS}.", TEACHER)
# Of an iteration, that int() may take.
_MAX_DIGITS = 18


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
    if (path.parent / TRACKER).is_file():
        raise CheckpointError(f"{path} is one iteration: name {path.parent}, whose {TRACKER} says which is read")
    raise CheckpointError(f"{path} is not a checkpoint: it has no {TRACKER}")


def latest_iteration(root: Path) -> int | None:
    """What the tracker of a checkpoint says; None for weights that no run goes on from.

    Raises:
        CheckpointError: it is neither a number nor `RELEASE`.
    """
    text = (root / TRACKER).read_text(errors="replace").strip()
    if text == RELEASE:
        return None
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise CheckpointError(
            f"{root / TRACKER} says {text[:40]!r}: expected the number of an iteration, or {RELEASE!r}"
        )
    return int(text)


def latest_folder(root: Path) -> Path:
    """The folder that the tracker of a checkpoint names.

    Raises:
        CheckpointError: as `latest_iteration`.
    """
    iteration = latest_iteration(root)
    return root / (RELEASE if iteration is None else iteration_folder(iteration))


def require_plain(folder: Path) -> None:
    """See that Megatron-Core, which trusts what it reads, can read an iteration: it is whole, and none of it would run.

    Args:
        folder: of the iteration.

    Raises:
        CheckpointError: its index, `common.pt`, or one of the objects beside its tensors is damaged, or holds more
            than plain values.
    """
    _, objects = _read_index(folder)
    common = folder / "common.pt"
    if common.is_file():
        objects["its values"] = StoredObject(common, 0, common.stat().st_size)
    for key, stored in objects.items():
        try:
            load_plain(io.BytesIO(stored.read()))
        except Exception as e:  # as many kinds as there are ways to be damaged
            place = f"{stored.path} is damaged at byte {stored.position}"
            raise CheckpointError(f"{place}, where {key} is kept: {e}") from e


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: list[Chunk]


class Checkpoint:
    """A whole `torch_dist` checkpoint on disk, as a source of weights.

    Opening reads the index alone and checks that every file it names is there and long enough. Layers may lie in one
    tensor, one behind the other, or each in its own; numbered as GPTModel's, or as HybridModel's, whose every sublayer
    is a layer.

    Args:
        path: the folder with `latest_checkpointed_iteration.txt`, or a training run's folder.

    Raises:
        CheckpointError: it is not a checkpoint, not whole, or not of the network that it claims.
    """

    def __init__(self, path: Path | str):
        self.root = checkpoint_root(Path(path))
        self.iteration = latest_iteration(self.root) or 0
        self.folder = latest_folder(self.root)
        if any(self.folder.glob("mp_rank_*")):
            raise CheckpointError(
                f"{self.folder} is in Megatron-LM's old format, a file per rank: save it with --ckpt-format torch_dist"
            )
        if not (self.folder / "metadata.json").is_file():
            raise CheckpointError(f"{self.folder} is not whole: it has no metadata.json, which is written last")
        self.tensors, self._objects = _read_index(self.folder)
        self.network = self._read_network()
        self._table = parameters(self.network)
        self.stacked = any(stacked_key(param) in self.tensors for param in self._table if param.layer is not None)
        self._is_hybrid = any(key.startswith(_HYBRID_NORM) for key in self.tensors)
        self._check_tensors()
        self.dtype = self.tensors[self._key(self._table[0])].dtype

    @property
    def manifest(self) -> Manifest:
        return Manifest.read(self.root)

    @property
    def huggingface_folder(self) -> Path:
        """Tokenizer and Hugging Face config that travel with the checkpoint, or the tokenizer that its run saved."""
        own, of_run = self.root / HUGGINGFACE, self.folder / _TOKENIZER
        return of_run if of_run.is_dir() and not own.is_dir() else own

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """The tensors of the network, without those of the optimiser and the like."""
        return {key: tensor for key, tensor in self.tensors.items() if not key.startswith(_NOT_WEIGHTS)}

    def megatron_args(self) -> argparse.Namespace | None:
        """The `args` that Megatron-LM saved beside the weights, see `read_args`."""
        return read_args(self.folder, self._objects)

    def read(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        """See `TensorSource.read`."""
        stored = self.tensors[self._key(param)]
        if param.layer is not None and self.stacked:
            return self._gather(stored, [np.array([param.layer]), *index])[0]
        return self._gather(stored, index)

    def _key(self, param: Param) -> str:
        """Under which key a parameter is stored."""
        if self.stacked:
            return stacked_key(param)
        if not self._is_hybrid:
            return layer_key(param)
        if param.position is None:
            return param.name.replace(_GPT_NORM, _HYBRID_NORM)
        return f"decoder.layers.{param.position}.{param.name}"

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

    def _read_network(self) -> Network:
        """The network as this package or a user wrote it down, or else as the args of a Megatron-LM run tell."""
        names = (MANIFEST, NETWORK, _FORMER_NETWORK)
        file = next((self.root / name for name in names if (self.root / name).exists()), None)
        if file is None:
            return self._network_of_args()
        values = read_json(file, "the description of a network")
        try:
            described = Manifest.from_dict(values).network if file.name == MANIFEST else values
            if described is None:
                raise ValueError("its network is null")
            return Network.from_dict(described)
        except (TypeError, ValueError, KeyError) as e:
            raise CheckpointError(f"{file} does not describe a network: {e}") from e

    def _network_of_args(self) -> Network:
        describe = f"describe the network in {self.root / NETWORK} (as a manifest's `network` does)"
        args = self.megatron_args() or args_of_bridge(self.folder)
        if args is None:
            raise CheckpointError(
                f"{self.root} does not say what its network is: it has neither {MANIFEST} nor args of Megatron-LM nor "
                f"{RUN_CONFIG} of Megatron-Bridge; {describe}"
            )
        try:
            network = network_of_args(args)
        except UserError as e:
            raise UnsupportedModelError(f"{self.folder}: {e}\nif they do not tell the truth, {describe}") from e
        # A tokenizer may have fewer tokens than its model has rows for, and then the args know better.
        if getattr(args, "vocab_size", None) and not (self.huggingface_folder / "config.json").is_file():
            return network
        known = num_tokens(self.huggingface_folder, network.padded_vocab_size)
        return network.replace(vocab_size=known) if known else network

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[int, ...]] = {}
        for param in self._table:
            layers = (len(self.network.layers),) if self.stacked and param.layer is not None else ()
            expected[self._key(param)] = (*layers, *param.shape)
        problems = []
        for key, size in expected.items():
            if key not in self.tensors:
                problems.append(f"missing: {key} {list(size)}")
            elif self.tensors[key].shape != size:
                problems.append(f"wrong size: {key} is {list(self.tensors[key].shape)}, the network has {list(size)}")
            elif not _is_whole(self.tensors[key]):
                problems.append(f"not whole: {key} {list(size)}, of which some chunks are missing")
        unknown = [key for key in self.weights if key not in expected]
        problems += [f"unknown: {key} {list(self.tensors[key].shape)}" for key in unknown]
        if problems:
            raise CheckpointError(f"{self.folder} does not hold its network:\n  " + "\n  ".join(problems))


def _is_whole(tensor: StoredTensor) -> bool:
    """Whether its chunks are there and fill it, each position once.

    They do if their corners, of alternating sign, add up to those of the whole: all others come in pairs.
    """
    left = Counter(_corners((0,) * len(tensor.shape), tensor.shape))
    for chunk in tensor.chunks:
        if min(chunk.sizes) < 1 or math.prod(chunk.sizes) * chunk.dtype.itemsize > chunk.length:
            return False
        left.subtract(_corners(chunk.offsets, chunk.sizes))
    return not any(left.values())


def _corners(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> dict[tuple[int, ...], int]:
    """The corners of a box of any number of dimensions, and the sign of each."""
    ends = [((offset, 1), (offset + size, -1)) for offset, size in zip(offsets, sizes, strict=True)]
    return {tuple(at for at, _ in corner): math.prod(sign for _, sign in corner) for corner in itertools.product(*ends)}


class _IndexUnpickler(PlainUnpickler):
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

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or (module, name) in self._OTHERS:
            return super().find_class(module, name)
        if module in self._RECORDS:
            kind = super().find_class(module, name)
            if isinstance(kind, type) and (dataclasses.is_dataclass(kind) or issubclass(kind, Enum)):
                return kind
        raise pickle.UnpicklingError(f"{module}.{name} does not belong into a checkpoint's index")


def _read_index(folder: Path) -> tuple[dict[str, StoredTensor], dict[str, StoredObject]]:
    """The tensors of an iteration by key, and the other objects."""
    path = folder / ".metadata"
    try:
        tensors, objects, needed = _stored(_IndexUnpickler(path.read_bytes()).load(), folder)
    except Exception as e:  # as many kinds as there are ways to be damaged
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
        raise TypeError(f"{numbers!r} are no whole numbers")
    return numbers


def _stored(
    metadata: Metadata, folder: Path
) -> tuple[dict[str, StoredTensor], dict[str, StoredObject], dict[Path, int]]:
    """What an index says: all tensors, all other objects, and every file with the bytes that it must have at least."""
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
