"""Writes weights as safetensors files, with several threads in several processes, a block of rows at a time.

The sizes determine where each tensor is in its file. So a file is created with its header and its full length, and then
filled by several threads, in any order. Each process writes files of its own, because network file systems are slow
when several processes write one file.
"""

import json
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch

from minitron_megatron.checkpoint.dist_writer import num_threads
from minitron_megatron.checkpoint.row_io import bits
from minitron_megatron.progress import progress

BLOCK_BYTES = 64 * 2**20
# In the order of safetensors, whose files have the last ones first.
_KINDS = {
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ALIGNMENT = 8  # of the first tensor; safetensors pads its headers to it


@dataclass(frozen=True)
class Tensor:
    """A tensor to write.

    Attributes:
        name: its key.
        size: its shape.
        dtype: of its numbers.
        read: returns its rows `low:high`.
    """

    name: str
    size: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.size) * self.dtype.itemsize


def cut_into_shards(tensors: Sequence[Tensor], max_bytes: float) -> list[list[Tensor]]:
    """Groups consecutive tensors into shards of at most `max_bytes`, or of one larger tensor."""
    shards: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if shards[-1] and filled + tensor.num_bytes > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += tensor.num_bytes
    return shards


def write_shards(files: dict[Path, list[Tensor]]) -> None:
    """Writes files byte for byte as safetensors' `save_file` does.

    Args:
        files: the tensors of each file.
    """
    stop = Event()
    blocks = []
    for path, tensors in files.items():
        ranks = {dtype: -rank for rank, dtype in enumerate(_KINDS)}
        tensors = sorted(tensors, key=lambda tensor: (ranks[tensor.dtype], tensor.name))
        starts = _make_file(path, tensors)
        blocks += [(path, start, tensor) for start, tensor in zip(starts, tensors, strict=True)]

    def write(path: Path, start: int, tensor: Tensor) -> None:
        row_bytes = tensor.num_bytes // tensor.size[0]
        step = max(1, BLOCK_BYTES // row_bytes)
        with open(path, "r+b", buffering=0) as file:
            file.seek(start)
            for low in range(0, tensor.size[0], step):
                if stop.is_set():
                    return
                rows = tensor.read(low, min(low + step, tensor.size[0]))
                content = memoryview(bits(rows.contiguous())).cast("B")
                while content:
                    content = content[file.write(content) :]
        advance()

    with progress("write tensors", len(blocks)) as advance, ThreadPoolExecutor(num_threads()) as pool:
        try:
            for future in as_completed([pool.submit(write, *block) for block in blocks]):
                future.result()
        finally:
            stop.set()
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())


def _make_file(path: Path, tensors: list[Tensor]) -> list[int]:
    """Creates a file with its header and its full length.

    Returns:
        the file offset of every tensor.
    """
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    ends = [0]
    for tensor in tensors:
        ends.append(ends[-1] + tensor.num_bytes)
        header[tensor.name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.size), "data_offsets": ends[-2:]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        first = file.tell()
        file.truncate(first + ends[-1])
    return [first + end for end in ends[:-1]]
