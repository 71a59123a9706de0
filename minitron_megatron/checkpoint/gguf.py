"""Whether a GGUF file is as long as it says, before what reads it believes it.

    magic GGUF, uint32 version, uint64 tensors, uint64 values
    values:  text key, uint32 type, value
    tensors: text name, uint32 dimensions D, uint64 size [D], uint32 type, uint64 offset
    text:    uint64 length, bytes;  array: uint32 type, uint64 length, values

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import os
import struct
from io import BufferedReader
from pathlib import Path

from minitron_megatron.errors import CheckpointError

_TEXT, _ARRAY = 8, 9
# Bytes of every other type: integers of 1, 2 and 4 bytes, float32, bool, integers of 8 bytes and float64.
_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_MAX_DIMENSIONS = 4


def check_gguf(path: Path) -> int:
    """See that what a GGUF file says of its lengths fits into it.

    Returns:
        how many tensors it has.

    Raises:
        CheckpointError: it does not.
    """
    try:
        with open(path, "rb") as file:
            return _check(file, os.fstat(file.fileno()).st_size)
    except (OSError, ValueError, struct.error) as e:
        raise CheckpointError(f"{path} is not a whole GGUF file: {e}") from e


def _check(file: BufferedReader, size: int) -> int:
    def number(code: str) -> int:
        return struct.unpack(f"<{code}", file.read(struct.calcsize(code)))[0]

    def skip(num_bytes: int) -> None:
        if num_bytes > size - file.tell():
            raise ValueError(f"{num_bytes} bytes should follow at byte {file.tell()}, and it has {size}")
        file.seek(num_bytes, os.SEEK_CUR)

    def skip_value(kind: int, is_element: bool = False) -> None:
        if kind == _TEXT:
            skip(number("Q"))
        elif kind == _ARRAY and not is_element:
            kind, length = number("I"), number("Q")
            if kind in _BYTES:
                skip(_BYTES[kind] * length)
            else:
                for _ in range(length):  # each of which takes some bytes, so that it ends with the file
                    skip_value(kind, is_element=True)
        elif kind in _BYTES:
            skip(_BYTES[kind])
        else:
            raise ValueError(f"type {kind} at byte {file.tell() - 4} is none")

    magic, version = file.read(4), number("I")
    if magic != b"GGUF" or version not in (2, 3):
        raise ValueError(f"it begins with {magic!r}, version {version}, and should with b'GGUF', version 2 or 3")
    num_tensors, num_values = number("Q"), number("Q")
    for _ in range(num_values):
        skip(number("Q"))
        skip_value(number("I"))
    for _ in range(num_tensors):
        skip(number("Q"))
        if (dimensions := number("I")) > _MAX_DIMENSIONS:
            raise ValueError(f"a tensor has {dimensions} dimensions, at byte {file.tell() - 4}")
        skip(8 * dimensions + 4)
        if (offset := number("Q")) > size:
            raise ValueError(f"a tensor begins at byte {offset}, and it has {size}")
    return num_tensors
