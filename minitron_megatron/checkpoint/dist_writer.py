"""Writes any source of weights as a `torch_dist` checkpoint, with several threads in several processes.

Every process writes its share of the chunks to files of its own, one per thread. A thread reads, slices and writes one
chunk at a time. So reading, slicing and writing overlap, and the memory of a process is bounded by the largest chunk
and not by the model. The first process writes the index when all are done.
"""

import argparse
import io
import itertools
import json
import math
import os
import pickle
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo  # which readers unpickle
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from minitron_megatron.artifacts.manifest import HUGGINGFACE, Manifest
from minitron_megatron.artifacts.output import writing
from minitron_megatron.checkpoint.companions import dtype_of
from minitron_megatron.checkpoint.dist_reader import RELEASE, TRACKER
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.disk import convert_enospc
from minitron_megatron.files import copy_content
from minitron_megatron.model.axes import Param
from minitron_megatron.model.megatron_args import args_of_network
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import layer_key, parameters, stacked_key
from minitron_megatron.parallel.workers import join_workers
from minitron_megatron.progress import progress

CHUNK_BYTES = 64 * 2**20
MAX_THREADS = 4


@dataclass(frozen=True)
class _Item:
    """One chunk to write: the positions `ranges[0] x ranges[1] x ...` of a parameter.

    Attributes:
        layer: its index in the tensor of its key, where that stacks all layers; else None.
        dtype: on disk.
    """

    param: Param
    ranges: tuple[range, ...]
    layer: int | None
    dtype: torch.dtype

    @property
    def key(self) -> str:
        return layer_key(self.param) if self.layer is None else stacked_key(self.param)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Where it begins in the tensor of its key."""
        own = tuple(r.start for r in self.ranges)
        return own if self.layer is None else (self.layer, *own)

    @property
    def sizes(self) -> tuple[int, ...]:
        own = tuple(len(r) for r in self.ranges)
        return own if self.layer is None else (1, *own)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.sizes) * self.dtype.itemsize

    def read(self, source: TensorSource) -> torch.Tensor:
        index = [np.arange(r.start, r.stop) for r in self.ranges]
        tensor = source.read(self.param, index).to(self.dtype).reshape(self.sizes).contiguous()
        # `torch.save` writes the whole storage of a view.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


_Place = tuple[str, tuple[int, ...], str, int, int]
"""Where a chunk was written: its key and offsets, then file, offset in the file, and number of bytes."""


def write_checkpoint(
    output: Path,
    source: TensorSource,
    dtype: torch.dtype,
    manifest: Manifest,
    huggingface: Path | None,
    files: Callable[[Path], None] = lambda folder: None,
    tensor_ranks: int = 1,
    args: argparse.Namespace | None = None,
    companions: Iterable[Param] = (),
) -> None:
    """Writes a network as a `torch_dist` checkpoint that Megatron-Core loads. Collective.

    The folder is written atomically. It has no optimiser state. The ranks that torchrun or srun started share the work;
    each calls this with an equal source.

    Args:
        output: the folder to make. Its `release/` holds the tensors: from weights of that name, Megatron-LM starts at
            iteration 0 without an optimiser, and needs no `--finetune`.
        source: of the weights, read a chunk at a time, by several threads.
        dtype: of the written weights.
        manifest: of the result; its network is set here.
        huggingface: folder with tokenizer and Hugging Face config to copy into the checkpoint.
        files: writes further files into the folder.
        tensor_ranks: chunks are split at the borders of this number of tensor-parallel shards, so that each rank reads
            only its own.
        args: of the Megatron-LM run that the weights come from, if any; they are saved with the new network's sizes.
        companions: what the source has beside its matrices, to be written as well; see `companions`.

    Raises:
        DiskSpaceError: the disk is full, or becomes full.
        LostWorkerError: another rank was killed.
    """
    network = source.network
    manifest.network = network.to_dict()
    manifest.details.setdefault("optimizer_state", "left out")
    jobs = _jobs(network, tensor_ranks, dtype)
    for param in companions:
        own = dtype_of(param)
        jobs.append([_Item(param, ranges, None, own) for ranges in _chunks(param, tensor_ranks, own.itemsize)])
    num_bytes = sum(map(_num_bytes, jobs))
    with join_workers() as workers, writing(output, manifest, num_bytes, workers) as temporary:
        folder = temporary / RELEASE

        def write_share() -> list[_Place]:
            folder.mkdir(exist_ok=True)
            with convert_enospc(output):
                return _write_files(folder, workers.rank, _balance(jobs, workers.size)[workers.rank], source)

        places = [place for share in workers.run(write_share) for place in share]

        def write_rest() -> None:
            _write_index(folder, network, jobs, places)
            _write_common(folder, args_of_network(args, network))
            if huggingface is not None:
                copy_content(huggingface, temporary / HUGGINGFACE)
            files(temporary)
            (temporary / TRACKER).write_text(RELEASE)

        workers.run_on_main(write_rest)


def _write_common(folder: Path, args: argparse.Namespace | None) -> None:
    """Writes what a `torch_dist` checkpoint has beside its tensors and their index."""
    common: dict[str, object] = {"iteration": 0, "checkpoint_version": 3.0}
    if args:
        common["args"] = args
    torch.save(common, folder / "common.pt")
    backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
    (folder / "metadata.json").write_text(
        json.dumps({**backends, "sharded_backend_version": 1, "common_backend_version": 1})
    )


def _jobs(network: Network, tensor_ranks: int, dtype: torch.dtype) -> list[list[_Item]]:
    """Returns the chunks of all parameters, one job per parameter, whose chunks share parts of the source."""
    return [
        [
            _Item(param, ranges, param.layer if network.has_equal_layers else None, dtype)
            for ranges in _chunks(param, tensor_ranks, dtype.itemsize)
        ]
        for param in parameters(network)
    ]


def _chunks(param: Param, tensor_ranks: int, itemsize: int) -> list[tuple[range, ...]]:
    """Splits a parameter into chunks: at the borders of tensor-parallel shards, and then by `CHUNK_BYTES`.

    A rank's rows of a fused projection are several runs, each in chunks of its own.
    """
    shards = [param.shard(rank, tensor_ranks) for rank in range(tensor_ranks if param.split else 1)]
    if sum(math.prod(map(len, shard)) for shard in shards) != math.prod(param.shape):
        shards = [param.shard(0, 1)]  # a group of columns that two ranks share
    boxes = [box for shard in shards for box in itertools.product(*map(_runs, shard))]
    chunks = []
    for rows, *columns in sorted(boxes, key=lambda box: [r.start for r in box]):
        row_bytes = itemsize * math.prod(map(len, columns))
        count = math.ceil(len(rows) / max(1, CHUNK_BYTES // row_bytes))
        borders = [rows.start + len(rows) * i // count for i in range(count + 1)]
        chunks += [(range(*ends), *columns) for ends in itertools.pairwise(borders)]
    return chunks


def _runs(positions: np.ndarray) -> list[range]:
    """Returns ascending positions as runs of consecutive ones."""
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return [range(int(run[0]), int(run[-1]) + 1) for run in runs]


def _num_bytes(job: list[_Item]) -> int:
    return sum(item.num_bytes for item in job)


def _balance(jobs: list[list[_Item]], count: int) -> list[list[list[_Item]]]:
    """Balances jobs over `count` workers: the largest job first, each to the worker with least. Keeps their order."""
    shares: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for number in sorted(range(len(jobs)), key=lambda number: -_num_bytes(jobs[number])):
        least = filled.index(min(filled))
        shares[least].append(number)
        filled[least] += _num_bytes(jobs[number])
    return [[jobs[number] for number in sorted(share)] for share in shares]


def _write_files(folder: Path, rank: int, jobs: list[list[_Item]], source: TensorSource) -> list[_Place]:
    """Writes this process's share of the chunks, one file per thread. A failure in one thread stops the others."""
    stop = Event()
    shares = [list(itertools.chain(*share)) for share in _balance(jobs, num_threads()) if share]

    def write_file(name: str, items: list[_Item]) -> list[_Place]:
        places: list[_Place] = []
        with open(folder / name, "wb") as file:
            for item in items:
                if stop.is_set():
                    return places
                start = file.tell()
                torch.save(item.read(source), file)
                places.append((item.key, item.offsets, name, start, file.tell() - start))
                advance()
            file.flush()
            os.fsync(file.fileno())
        return places

    with progress("write chunks", sum(map(len, shares))) as advance, ThreadPoolExecutor(max(1, len(shares))) as pool:
        try:
            work = [pool.submit(write_file, f"__{rank}_{number}.distcp", share) for number, share in enumerate(shares)]
            for future in as_completed(work):
                future.result()
            return [place for future in work for place in future.result()]
        finally:
            stop.set()


def num_threads() -> int:
    """Returns the number of writer threads: one more than this process's cores, so that no core waits for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, 1 + cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _write_index(folder: Path, network: Network, jobs: list[list[_Item]], places: list[_Place]) -> None:
    """Writes `.metadata`: the tensors, and the location of their chunks."""
    tensors: dict[str, TensorStorageMetadata] = {}
    for item in itertools.chain(*jobs):
        layers = () if item.layer is None else (len(network.layers),)
        size = torch.Size((*layers, *item.param.shape))
        whole = TensorStorageMetadata(TensorProperties(dtype=item.dtype), size, [])
        chunk = ChunkStorageMetadata(torch.Size(item.offsets), torch.Size(item.sizes))
        tensors.setdefault(item.key, whole).chunks.append(chunk)
    files = {
        MetadataIndex(key, offsets): _StorageInfo(file, start, num_bytes)
        for key, offsets, file, start, num_bytes in places
    }
    empty = io.BytesIO()
    torch.save([None], empty)  # Megatron-Core keeps a list of objects under each key
    (folder / "__extra_state.distcp").write_bytes(empty.getvalue())
    extra_states = {key: BytesStorageMetadata() for key in _extra_states(network)}
    for key in extra_states:
        files[MetadataIndex(key)] = _StorageInfo("__extra_state.distcp", 0, len(empty.getvalue()))
    metadata = Metadata({**tensors, **extra_states}, storage_data=files, storage_meta=StorageMeta())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def _extra_states(network: Network) -> list[str]:
    """Returns the keys of Transformer Engine's extra states that Megatron's layers expect beside their weights."""
    count = len(network.layers)
    keys = ["decoder.final_layernorm._extra_state/shard_0_1"]
    for position, sublayer in enumerate(network.sublayers):
        layer = network.layer_of(position)
        for module in sublayer.te_states:
            if network.has_equal_layers:
                keys.append(f"decoder.layers.{module}._extra_state/shard_{layer}_{count}")
            else:
                keys.append(f"decoder.layers.{layer}.{module}._extra_state/shard_0_1")
    return keys
