"""Atomic writes of files and folders, and small JSON files."""

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_megatron.errors import CheckpointError

_LEASE = ".lease"


def publish(temporary: Path, path: Path) -> None:
    """Gives a file or folder its final name atomically, once all of it is on the disk.

    Args:
        temporary: what was written, on the same file system.
        path: its final name. A file or an empty folder there is replaced.
    """
    for file in temporary.rglob("*") if temporary.is_dir() else [temporary]:
        if file.is_file():
            _sync(file)
    os.replace(temporary, path)
    _sync(path.parent)


def link_or_copy(source: Path | str, target: Path | str) -> None:
    """Gives a file a second name; where the file system has no hard links, makes a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Replaces a file or folder atomically: a reader sees the old one or the new one, never a part.

    Yields a temporary path beside `path`. It is renamed to `path` when the block ends, and removed when the block
    fails.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield temporary
        publish(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def lease_of(output: Path) -> Path:
    """Returns the file beside an output that says who writes it; see `lease`."""
    return output.with_name(f".{output.name}{_LEASE}")


def is_lease(path: Path) -> bool:
    """Returns whether a file is the lease of an output, or a part of one, and belongs to no result."""
    return path.name.startswith(".") and f"{_LEASE}." in f"{path.name}."


def write_atomically(path: Path, text: str) -> None:
    """Writes a small text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, values: dict) -> None:
    """Writes a small JSON file atomically."""
    write_atomically(path, json.dumps(values, indent=2) + "\n")


def read_json(path: Path, what: str) -> dict:
    """Reads a JSON object.

    Args:
        path: of the file.
        what: what the file should be, for the error message.

    Raises:
        CheckpointError: it cannot be read, or holds no object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{path} is not {what}: {e}") from e
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} is not {what}: it holds a {type(values).__name__} and should hold an object")
    return values


def copy_content(source: Path, target: Path) -> None:
    """Copies the content of a folder to a new one that can be written to, whatever the modes of the source."""
    target.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_dir():
            copy_content(path, target / path.name)
        else:
            shutil.copyfile(path, target / path.name)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
