"""Writing any source of weights as a `torch_dist` checkpoint, by several threads of several processes.

Every process writes its share of the chunks to files of its own, several at a time, each of them read from the source,
cut, and written before the next one. So the disk is read and written while others cut, and the memory of a process is
bounded by the largest chunk and not by the model. The first process writes the index when all are done.
"""

import argparse
import io
import itertools
import json
import math
import os
import pickle
import shutil
from collections.abc import Callable
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

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.artifacts.output import writing
from minitron_megatron.checkpoint.dist_reader import HUGGINGFACE, RELEASE, TRACKER
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.disk import convert_enospc
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
    """

    param: Param
    ranges: tuple[range, ...]
    layer: int | None

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

    def read(self, source: TensorSource, dtype: torch.dtype) -> torch.Tensor:
        index = [np.arange(r.start, r.stop) for r in self.ranges]
        tensor = source.read(self.param, index).to(dtype).reshape(self.sizes).contiguous()
        # Of a view, `torch.save` would write all of the tensor that it is a part of.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


_Place = tuple[str, tuple[int, ...], str, int, int]
"""Where a chunk was written: its key and offsets, then file, first byte, and number of bytes."""


def write_checkpoint(
    output: Path,
    source: TensorSource,
    dtype: torch.dtype,
    manifest: Manifest,
    huggingface: Path | None,
    files: Callable[[Path], None] = lambda folder: None,
    tensor_ranks: int = 1,
    args: argparse.Namespace | None = None,
) -> None:
    """Write the network of `source` as a `torch_dist` checkpoint that Megatron-Core loads. Collective.

    The folder appears whole or not at all. Optimiser state is not part of it. The ranks that torchrun or srun started
    share the work; each of them calls this with an equal source.

    Args:
        output: the folder to make; `release/` below it holds the tensors. So Megatron-LM calls weights that no run has
            trained on yet: it begins at iteration 0 and looks for no optimiser, without `--finetune`.
        source: where the weights come from, read a chunk at a time, by several threads.
        dtype: of the written weights.
        manifest: of the result; its network is set here.
        huggingface: tokenizer and Hugging Face config that shall travel with the checkpoint.
        files: writes what else belongs into the folder.
        tensor_ranks: chunks end where the shares of so many tensor-parallel ranks do, so that each reads its own.
        args: of the Megatron-LM run that the weights come from, if any; those of the new network are written.

    Raises:
        DiskSpaceError: the disk is or gets full.
        LostWorkerError: another rank was ended from outside.
    """
    network = source.network
    manifest.network = network.to_dict()
    manifest.details.setdefault("optimizer_state", "left out")
    jobs = _jobs(network, tensor_ranks, dtype)
    num_bytes = dtype.itemsize * sum(map(_num_elements, jobs))
    with join_workers() as workers, writing(output, manifest, num_bytes, workers) as temporary:
        folder = temporary / RELEASE

        def write_share() -> list[_Place]:
            folder.mkdir(exist_ok=True)
            with convert_enospc(output):
                return _write_files(folder, workers.rank, _deal(jobs, workers.size)[workers.rank], source, dtype)

        places = [place for share in workers.run(write_share) for place in share]

        def write_rest() -> None:
            _write_index(folder, network, dtype, jobs, places)
            common = {"iteration": 0, "checkpoint_version": 3.0, "args": args_of_network(args, network)}
            torch.save(common, folder / "common.pt")
            backends = {"sharded_backend": "torch_dist", "common_backend": "torch"}
            (folder / "metadata.json").write_text(
                json.dumps({**backends, "sharded_backend_version": 1, "common_backend_version": 1})
            )
            if huggingface is not None:
                shutil.copytree(huggingface, temporary / HUGGINGFACE)
            files(temporary)
            (temporary / TRACKER).write_text(RELEASE)

        workers.run_on_main(write_rest)


def _jobs(network: Network, tensor_ranks: int, dtype: torch.dtype) -> list[list[_Item]]:
    """The chunks of all parameters. Those of one parameter are one job: a chunk read is soon read again."""
    return [
        [
            _Item(param, ranges, param.layer if network.has_equal_layers else None)
            for ranges in _chunks(param, tensor_ranks, dtype.itemsize)
        ]
        for param in parameters(network)
    ]


def _chunks(param: Param, tensor_ranks: int, itemsize: int) -> list[tuple[range, ...]]:
    """How a parameter is cut: at the ends of what each tensor-parallel rank holds, and then by `CHUNK_BYTES`.

    A rank's rows of a fused projection lie in several runs, each of which is a chunk of its own.
    """
    shards = [param.shard(rank, tensor_ranks) for rank in range(tensor_ranks if param.split else 1)]
    boxes = [box for shard in shards for box in itertools.product(*map(_runs, shard))]
    chunks = []
    for rows, *columns in sorted(boxes, key=lambda box: [r.start for r in box]):
        row_bytes = itemsize * math.prod(map(len, columns))
        count = math.ceil(len(rows) / max(1, CHUNK_BYTES // row_bytes))
        borders = [rows.start + len(rows) * i // count for i in range(count + 1)]
        chunks += [(range(*ends), *columns) for ends in itertools.pairwise(borders)]
    return chunks


def _runs(positions: np.ndarray) -> list[range]:
    """Ascending positions as runs of neighbours."""
    runs = np.split(positions, np.flatnonzero(np.diff(positions) != 1) + 1)
    return [range(int(run[0]), int(run[-1]) + 1) for run in runs]


def _num_elements(job: list[_Item]) -> int:
    return sum(math.prod(item.sizes) for item in job)


def _deal(jobs: list[list[_Item]], count: int) -> list[list[list[_Item]]]:
    """Spread jobs so that all `count` get about as much: the largest first, each to whom has least. Order is kept."""
    hands: list[list[int]] = [[] for _ in range(count)]
    filled = [0] * count
    for number in sorted(range(len(jobs)), key=lambda number: -_num_elements(jobs[number])):
        least = filled.index(min(filled))
        hands[least].append(number)
        filled[least] += _num_elements(jobs[number])
    return [[jobs[number] for number in sorted(hand)] for hand in hands]


def _write_files(
    folder: Path, rank: int, jobs: list[list[_Item]], source: TensorSource, dtype: torch.dtype
) -> list[_Place]:
    """Write this process's share of the chunks, a file per thread. What fails in one thread stops the others."""
    stop = Event()
    hands = [list(itertools.chain(*hand)) for hand in _deal(jobs, num_threads()) if hand]

    def write_file(name: str, items: list[_Item]) -> list[_Place]:
        places: list[_Place] = []
        with open(folder / name, "wb") as file:
            for item in items:
                if stop.is_set():
                    return places
                start = file.tell()
                torch.save(item.read(source, dtype), file)
                places.append((item.key, item.offsets, name, start, file.tell() - start))
                advance()
            file.flush()
            os.fsync(file.fileno())
        return places

    with progress("write chunks", sum(map(len, hands))) as advance, ThreadPoolExecutor(max(1, len(hands))) as pool:
        try:
            work = [pool.submit(write_file, f"__{rank}_{number}.distcp", hand) for number, hand in enumerate(hands)]
            for future in as_completed(work):
                future.result()
            return [place for future in work for place in future.result()]
        finally:
            stop.set()


def num_threads() -> int:
    """One more than the cores of this process, so that none waits for the disk."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(MAX_THREADS, 1 + cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def _write_index(
    folder: Path, network: Network, dtype: torch.dtype, jobs: list[list[_Item]], places: list[_Place]
) -> None:
    """Write `.metadata`: what the tensors are, and where their chunks lie."""
    tensors: dict[str, TensorStorageMetadata] = {}
    for item in itertools.chain(*jobs):
        layers = () if item.layer is None else (len(network.layers),)
        size = torch.Size((*layers, *item.param.shape))
        whole = TensorStorageMetadata(TensorProperties(dtype=dtype), size, [])
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
    """Keys of the states of Transformer Engine's that Megatron's layers expect beside their weights."""
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
