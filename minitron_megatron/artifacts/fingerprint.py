"""What a file or folder holds, as one hash: every byte counts, and none is read twice.

A file is known by the SHA-256 of its content. Where it says that itself it is not read: a file in Hugging Face's cache
is named by its SHA-256, and what `torch.save` writes carries a CRC-32 of every tensor. Anything else is read once, by
several threads, and remembered by its path, size, time of change and inode in the user's cache folder.
"""

import fcntl
import hashlib
import logging
import os
import re
import struct
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from minitron_megatron.errors import CheckpointError
from minitron_megatron.files import is_lease, read_json, write_json
from minitron_megatron.progress import progress

logger = logging.getLogger(__name__)

_DIGITS = 40
"""Of a fingerprint. Those of earlier versions, hashes of samples, have 64."""

_BLOCK_BYTES = 10**6
_SAMPLE_BYTES = 64 * 1024
# A file that changed a moment ago may change once more within what its file system's clock can tell.
_UNSETTLED_S = 2.0
_SHOWN_BYTES = 2 * 10**9  # some seconds of reading

# Of a zip archive from its end: the end record, before it the one that says where the 64-bit end record is, and that.
_END64, _LOCATOR, _END = struct.Struct("<4sQ2H2I4Q"), struct.Struct("<4sIQI"), struct.Struct("<4s4H2IH")
_TAIL_BYTES = _END64.size + _LOCATOR.size + _END.size
_ENTRY = struct.Struct("<4s6H3I5H2I")  # of the central directory; behind it the name and two more texts
_SHA256 = re.compile("[0-9a-f]{64}")


def fingerprint(path: Path) -> str:
    """The fingerprint of a file, whatever it is called, or of a folder's files with their names below it.

    Links are followed.

    The second time only names, sizes and times are looked at.
    """
    files = _files(path)
    digests = _digests(files)
    total = hashlib.sha256()
    for file in files:
        total.update(f"{file.relative_to(path)}\0{digests[file]}\0".encode())
    return total.hexdigest()[:_DIGITS]


def is_of(recorded: str, path: Path) -> bool:
    """Whether a fingerprint, of today's kind or of an earlier version's, is that of what is at `path`."""
    return recorded == (fingerprint(path) if len(recorded) == _DIGITS else sampled_fingerprint(path))


def sampled_fingerprint(path: Path) -> str:
    """The fingerprint of earlier versions: names, sizes, and the first, middle and last 64 KiB of every file."""
    digest = hashlib.sha256()
    root = path if path.is_dir() else path.parent
    for file in _files(path):
        size = file.stat().st_size
        digest.update(f"{file.relative_to(root)}\0{size}\0".encode())
        with open(file, "rb") as f:
            for start in sorted({0, max(0, size // 2), max(0, size - _SAMPLE_BYTES)}):
                f.seek(start)
                digest.update(f.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _files(path: Path) -> list[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file() and not is_lease(p)) if path.is_dir() else [path]


def _digests(files: list[Path]) -> dict[Path, str]:
    """The digest of every file: remembered, carried by the file, or of its content."""
    known = _known(files, _Memory())
    if len(known) == len(files):
        return known
    with _one_at_a_time():  # another rank may have read them meanwhile
        memory = _Memory()
        known = _known(files, memory)
        return known | _read_all([file for file in files if file not in known], memory)


def _known(files: list[Path], memory: "_Memory") -> dict[Path, str]:
    digests = ((file, memory.get(file) or _carried(file)) for file in files)
    return {file: digest for file, digest in digests if digest}


def _read_all(files: list[Path], memory: "_Memory") -> dict[Path, str]:
    """Reads files, and remembers what they hold unless they change meanwhile."""
    # The largest first, so that none of them is left for one thread at the end.
    unread = sorted(files, key=lambda file: -file.stat().st_size)
    num_bytes = sum(file.stat().st_size for file in unread)
    before = {file: _state(file) for file in unread}
    show = progress if num_bytes >= _SHOWN_BYTES else _no_progress
    with show("hash, MB", num_bytes // _BLOCK_BYTES) as advance, ThreadPoolExecutor() as pool:
        read = dict(zip(unread, pool.map(lambda file: _read(file, advance), unread), strict=True))
    memory.add({file: digest for file, digest in read.items() if _state(file) == before[file]})
    return read


def _read(file: Path, advance: Callable[..., None]) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while block := f.read(_BLOCK_BYTES):
            digest.update(block)
            advance(len(block) // _BLOCK_BYTES)
    return digest.hexdigest()


def _carried(file: Path) -> str | None:
    """The digest that a file carries by itself."""
    stored = file.resolve()
    if stored.parent.name == "blobs" and _SHA256.fullmatch(stored.name):
        return stored.name
    try:
        with open(file, "rb") as f:
            directories = list(_zip_directories(f))
    except (struct.error, ValueError):
        return None
    return "crc32:" + hashlib.sha256(b"".join(directories)).hexdigest() if directories else None


def _zip_directories(file: BinaryIO) -> Iterator[bytes]:
    """Yields the central directories of a file that is nothing but zip archives as `torch.save` writes them, one after
    another, from the last one to the first.

    Raises:
        ValueError, struct.error: it is something else, or an archive has records without a checksum.
    """
    end = file.seek(0, os.SEEK_END)
    while end > 0:
        tail = _read_at(file, end - _TAIL_BYTES, _TAIL_BYTES)
        magic64, *_, size, offset = _END64.unpack(tail[: _END64.size])
        magic, *_, comment = _END.unpack(tail[-_END.size :])
        if (magic64, magic, comment) != (b"PK\x06\x06", b"PK\x05\x06", 0):
            raise ValueError("no archive of torch.save ends here")
        directory = _read_at(file, end - _TAIL_BYTES - size, size)
        _require_checksums(directory)
        yield directory
        end -= _TAIL_BYTES + size + offset
    if end < 0:
        raise ValueError("an archive begins before the file")


def _require_checksums(directory: bytes) -> None:
    start = 0
    while start < len(directory):
        magic, *_, checksum, _, size, name, extra, comment, _, _, _, _ = _ENTRY.unpack_from(directory, start)
        if magic != b"PK\x01\x02" or (size and not checksum):
            raise ValueError("a record without a checksum")
        start += _ENTRY.size + name + extra + comment


def _read_at(file: BinaryIO, start: int, size: int) -> bytes:
    if start < 0:
        raise ValueError("no archive is as large")
    file.seek(start)
    return file.read(size)


class _Memory:
    """Digests of files that were read before, in one small file of the user's cache for each folder."""

    def __init__(self) -> None:
        self._entries: dict[Path, dict] = {}

    def get(self, file: Path) -> str | None:
        """What is remembered of a file, if it has not changed."""
        entry = self._of(file.resolve().parent).get(file.resolve().name)
        return entry["digest"] if isinstance(entry, dict) and entry.get("state") == _state(file) else None

    def add(self, digests: dict[Path, str]) -> None:
        """Remember digests, where the cache can be written."""
        added: dict[Path, dict] = {}
        for file, digest in digests.items():
            if time.time() - file.stat().st_mtime > _UNSETTLED_S:
                own = added.setdefault(file.resolve().parent, {})
                own[file.resolve().name] = {"state": _state(file), "digest": digest}
        for folder, own in added.items():
            try:
                _cache().mkdir(parents=True, exist_ok=True)
                write_json(self._file(folder), {**self._of(folder), **own})
            except OSError as error:
                logger.info("what %s holds is read again the next time: %s", folder, error)

    def _of(self, folder: Path) -> dict:
        if folder not in self._entries:
            try:
                self._entries[folder] = read_json(self._file(folder), "a memory of fingerprints")
            except CheckpointError:
                self._entries[folder] = {}
        return self._entries[folder]

    def _file(self, folder: Path) -> Path:
        return _cache() / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()}.json"


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Lets one process of a machine read at a time, where the cache can be written."""
    with ExitStack() as stack:
        with suppress(OSError):  # no cache, or a file system without locks
            _cache().mkdir(parents=True, exist_ok=True)
            fcntl.flock(stack.enter_context(open(_cache() / "lock", "w")), fcntl.LOCK_EX)
        yield


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "minitron_megatron" / "fingerprints"


def _state(file: Path) -> list[int]:
    """What changes whenever a file does."""
    stat = file.stat()
    return [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino, stat.st_dev]


@contextmanager
def _no_progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    yield lambda steps=1, text="": None
