"""Loads untrusted or damaged files as plain values, without running any code in them.

Memory is bounded by the size of the file, whatever sizes it claims.
"""

import io
import pickle
import zipfile

import torch


class PlainUnpickler(pickle._Unpickler):
    """An unpickler whose subclasses allow classes in `find_class`.

    It is the one in Python, because the one in C allocates a memo table as long as the largest index in the pickle: one
    flipped bit makes that 64 GB. It reads from memory, because files would be read for as many bytes as they claim.
    """

    # Without the opcode that allocates as many bytes as a pickle claims. Only protocol 5 has it.
    dispatch = {code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))


def open_archive(file: io.RawIOBase | io.BufferedIOBase) -> zipfile.ZipFile:
    """Opens a file of `torch.save` as an archive, and checks that no record is larger than the file.

    `torch.save` compresses no record. A compressed one may be a thousand times as large as the file.

    Raises:
        ValueError, zipfile.BadZipFile: it is not such an archive.
    """
    size = file.seek(0, io.SEEK_END)
    archive = zipfile.ZipFile(file)
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.file_size > size:
            raise ValueError(f"its record {info.filename} is not stored as torch.save does")
        # 0 if `torch.serialization.set_crc32_options` switched it off; zipfile skips the check for None.
        info.CRC = info.CRC or None  # type: ignore[assignment]
    return archive


def check_archive(file: io.RawIOBase | io.BufferedIOBase) -> None:
    """Verifies the checksums of a file of `torch.save`.

    Raises:
        ValueError, EOFError, zipfile.BadZipFile: the file is damaged.
    """
    with open_archive(file) as archive:
        if (name := archive.testzip()) is not None:
            raise ValueError(f"Bad CRC-32 for file {name!r}")
    file.seek(0)


def load_plain(file: io.RawIOBase | io.BufferedIOBase) -> object:
    """Loads a file of `torch.save` with tensors and plain values into memory.

    Raises:
        Exception: of many types, if it is damaged or holds other objects.
    """
    check_archive(file)
    # torch accepts any object with read, readinto, seek and tell.
    return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
