"""Reads arbitrary index slices of a row-major tensor from a file, block by block.

Elements are moved as integers of their size: numpy does that several times as fast as torch, and releases the GIL.
"""

import zlib
from io import FileIO

import numpy as np
import torch

BLOCK_BYTES = 8 * 2**20
"""Bytes read at a time, at most (or one row, if that is longer): small enough to stay in a core's cache for slicing."""

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor: torch.Tensor) -> np.ndarray:
    """Returns a view of a tensor's elements as integers of their size."""
    return tensor.view(_BITS[tensor.itemsize]).numpy()


def take_bits(array: np.ndarray, index: list[np.ndarray]) -> np.ndarray:
    """Returns `array` at the ascending positions `index[0] x index[1] x ...`. Contiguous slices are not copied."""
    for dim, positions in enumerate(index):
        if not len(positions) or positions[-1] - positions[0] >= len(positions):
            array = array.take(positions, axis=dim)
        elif len(positions) < array.shape[dim]:
            array = array[(slice(None),) * dim + (slice(positions[0], positions[-1] + 1),)]
    return array


def copy_rows(
    file: FileIO, start: int, size: tuple[int, ...], index: list[np.ndarray], out: np.ndarray, whole: bool = False
) -> int:
    """Copies `index[0] x index[1] x ...` of a tensor in a file into `out`, with one block of the file in memory.

    Args:
        file: unbuffered.
        start: file offset of the tensor.
        size: of the tensor, of one or more dimensions.
        index: for each dimension, ascending positions.
        out: integers as of `bits`, with the lengths of `index`.
        whole: read the whole tensor, whatever the positions.

    Returns:
        CRC32 of the bytes read.

    Raises:
        EOFError: the file ends before the tensor does.
    """
    while len(size) > 1 and size[0] == 1:  # a layer of a stacked tensor: its rows are those of the next dimension
        size, index, out = size[1:], index[1:], out[0]
    rows, columns = index[0], index[1:]
    row_bytes = out.itemsize * int(np.prod(size[1:], dtype=np.int64))
    step = max(1, min(size[0], BLOCK_BYTES // row_bytes))
    block = np.empty((step, *size[1:]), out.dtype)
    crc = 0
    for low in range(0, size[0], step):
        high = min(low + step, size[0])
        first, last = np.searchsorted(rows, [low, high])
        if not whole:
            if first == last:
                continue
            low, high = int(rows[first]), int(rows[last - 1]) + 1
        piece = block[: high - low]
        file.seek(start + low * row_bytes)
        _fill(memoryview(piece).cast("B"), file)
        crc = zlib.crc32(piece, crc)
        if first < last:
            out[first:last] = take_bits(piece, [rows[first:last] - low, *columns])
    return crc


def _fill(buffer: memoryview, file: FileIO) -> None:
    while buffer:
        if not (count := file.readinto(buffer)):
            raise EOFError("the file ends too early")
        buffer = buffer[count:]
