"""Reads one chunk of a `torch_dist` checkpoint: a tensor written by `torch.save`, one of many in a file.

A chunk is a zip archive with uncompressed records. So the elements of a plain tensor are in row-major order at some
offset of the file, with a CRC32, which `torch.load` does not check.
"""

import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from dataclasses import dataclass
from io import SEEK_CUR, SEEK_END, SEEK_SET, FileIO, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from minitron_megatron.checkpoint.row_io import bits, copy_rows, take_bits
from minitron_megatron.checkpoint.safe_load import PlainUnpickler, load_plain, open_archive
from minitron_megatron.errors import CheckpointError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


@dataclass(frozen=True)
class StoredObject:
    """The location of a pickled object that is not a tensor."""

    path: Path
    position: int
    length: int

    def read(self) -> bytes:
        """Reads the bytes of the pickle, without unpickling."""
        with open(self.path, "rb") as file:
            file.seek(self.position)
            return file.read(self.length)


@dataclass(eq=False)
class Chunk:
    """One chunk of a global tensor on disk.

    Attributes:
        key: of the tensor.
        offsets, sizes: of the chunk within the tensor.
        dtype: of the tensor.
        path, position, length: of the chunk's bytes.
    """

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    position: int
    length: int
    # File offset of its elements, known once its checksum has been verified.
    _start: int | None = None

    def read(self, index: list[np.ndarray], out: np.ndarray) -> None:
        """Copies some positions of the chunk into `out`.

        The first call reads the whole chunk and verifies its checksum; later calls read only the rows needed.

        Args:
            index: for each dimension, ascending positions within the chunk.
            out: integers as of `row_io.bits`, with the lengths of `index`.

        Raises:
            CheckpointError: the chunk is damaged, or does not match the checkpoint's index.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                if self._start is None:
                    self._read_first(file, index, out)
                else:
                    copy_rows(file, self._start, self.sizes, index, out)
        except Exception as e:  # damaged files raise exceptions of many types
            raise CheckpointError(
                f"{self.path} is damaged at byte {self.position}, where {self.key} {list(self.sizes)} is kept: {e}"
            ) from e

    def _read_first(self, file: FileIO, index: list[np.ndarray], out: np.ndarray) -> None:
        window = _Window(file, self.position, self.length)
        with open_archive(window) as archive:
            records = {info.filename.split("/", 1)[1]: info for info in archive.infolist()}
            if _is_plain(archive, records, self):
                start = self.position + _content_offset(window, records["data/0"])
                crc = copy_rows(file, start, self.sizes, index, out, whole=True)
                if records["data/0"].CRC not in (None, crc):
                    raise ValueError(f"its checksum is {crc:08x} and should be {records['data/0'].CRC:08x}")
                self._start = start
                return
        window.seek(0)
        tensor = load_plain(window)
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"it holds a {type(tensor).__name__} and should hold a tensor")
        if (tensor.dtype, tuple(tensor.shape)) != (self.dtype, self.sizes):
            raise ValueError(f"it holds {tensor.dtype} {list(tensor.shape)}, and the index says {self.dtype}")
        out[...] = take_bits(bits(tensor.detach()), index)


class _Window(RawIOBase):
    """A byte range of a file, as a file."""

    def __init__(self, file: FileIO, start: int, length: int):
        self._file, self._start, self._length = file, start, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self._position = offset + {SEEK_SET: 0, SEEK_CUR: self._position, SEEK_END: self._length}[whence]
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        left = max(0, self._length - self._position)
        self._file.seek(self._start + self._position)
        count = self._file.readinto(memoryview(buffer)[:left])
        self._position += count
        return count


class _Storage(NamedTuple):
    kind: str
    dtype: torch.dtype
    record: str
    device: str
    num_elements: int


class _Tensor(NamedTuple):
    """The arguments with which `torch.load` would rebuild a tensor."""

    storage: _Storage
    storage_offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    backward_hooks: dict
    metadata: dict | None = None


class _TensorUnpickler(PlainUnpickler):
    """Reads the metadata of a chunk's tensor, without making the tensor. Allows no other objects, so no code runs."""

    _CLASSES: dict[tuple[str, str], Any] = {
        ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
        ("collections", "OrderedDict"): OrderedDict,
        ("torch", "BFloat16Storage"): torch.bfloat16,
        ("torch", "HalfStorage"): torch.float16,
        ("torch", "FloatStorage"): torch.float32,
        ("torch", "DoubleStorage"): torch.float64,
    }

    def find_class(self, module: str, name: str) -> Any:
        return self._CLASSES[module, name]

    def persistent_load(self, pid: tuple[Any, ...]) -> _Storage:
        return _Storage(*pid)


def _is_plain(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], chunk: Chunk) -> bool:
    """Returns whether the archive holds exactly the chunk's elements, in row-major order and native byte order.

    If not, torch may still be able to load it.
    """
    if "byteorder" not in records or archive.read(records["byteorder"]) != sys.byteorder.encode():
        return False
    try:
        tensor: _Tensor = _TensorUnpickler(archive.read(records["data.pkl"])).load()
        content = records[f"data/{tensor.storage.record}"]
        is_contiguous = torch.empty_strided(tensor.size, tensor.stride, device="meta").is_contiguous()
    except (KeyError, TypeError, AttributeError, RuntimeError, pickle.UnpicklingError):
        return False
    return (
        (tensor.storage.dtype, tuple(tensor.size), tensor.storage_offset) == (chunk.dtype, chunk.sizes, 0)
        and is_contiguous
        and content.filename.endswith("data/0")
        and content.file_size == math.prod(chunk.sizes) * chunk.dtype.itemsize
    )


def _content_offset(window: _Window, record: zipfile.ZipInfo) -> int:
    """Returns the offset of a record's content, after its header, its name, and torch's padding for alignment."""
    window.seek(record.header_offset + 26)
    lengths = window.read(4)
    return record.header_offset + 30 + int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
