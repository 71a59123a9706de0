"""Files that others may have written or damaged, read as plain values. Nothing in them is run, whatever they hold.

Memory is bounded by the size of a file, not by what it says of itself.
"""

import io
import pickle
import zipfile

import torch


class PlainUnpickler(pickle._Unpickler):
    """An unpickler whose subclasses say in `find_class` what may be found.

    It is Python's own and not that in C, which makes a table as long as the largest number a pickle gives to a value:
    one flipped bit, and that is of 64 GB. It reads from memory, for files are asked for as many bytes as they claim.
    """

    # What makes an array of as many bytes as a pickle claims, out of nothing. No protocol below 5 has it.
    dispatch = {code: read for code, read in pickle._Unpickler.dispatch.items() if code != pickle.BYTEARRAY8[0]}

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content))


def open_archive(file: io.RawIOBase | io.BufferedIOBase) -> zipfile.ZipFile:
    """What `torch.save` wrote, as an archive none of whose records is larger than the file.

    It compresses none of them. One that is may be a thousand times as large as it looks.

    Raises:
        ValueError, zipfile.BadZipFile: it is no such archive.
    """
    size = file.seek(0, io.SEEK_END)
    archive = zipfile.ZipFile(file)
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.file_size > size:
            raise ValueError(f"its record {info.filename} is not stored as torch.save does")
        # 0 where `torch.serialization.set_crc32_options` switched it off; zipfile checks no CRC that is None.
        info.CRC = info.CRC or None  # type: ignore[assignment]
    return archive


def check_archive(file: io.RawIOBase | io.BufferedIOBase) -> None:
    """See that what `torch.save` wrote is undamaged, as far as its checksums tell.

    Raises:
        ValueError, EOFError, zipfile.BadZipFile: it is not.
    """
    with open_archive(file) as archive:
        if (name := archive.testzip()) is not None:
            raise ValueError(f"Bad CRC-32 for file {name!r}")
    file.seek(0)


def load_plain(file: io.RawIOBase | io.BufferedIOBase) -> object:
    """What `torch.save` wrote: tensors and plain values, in memory.

    Raises:
        Exception: of many kinds, if it is damaged or holds anything else.
    """
    check_archive(file)
    # torch takes whatever has read, readinto, seek and tell.
    return torch.load(file, map_location="cpu", weights_only=True)  # type: ignore[arg-type]
