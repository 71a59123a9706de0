"""Where documents come from: files of text or rows, saved datasets, folders of these, or Python's prose."""

import os
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from minitron_megatron.artifacts.manifest import Parent
from minitron_megatron.data.builtin import builtin_documents
from minitron_megatron.data.files import FileKind, kind_of, read_rows, read_text
from minitron_megatron.data.indexed import is_indexed
from minitron_megatron.data.rows import MESSAGES, REFERENCES, TOOLS, Document, RowReport, row_documents
from minitron_megatron.data.tables import is_dataset, read_dataset, read_parquet
from minitron_megatron.errors import DataError

BUILTIN = "builtin"


def documents(
    text: list[str], text_field: str = "text", columns: list[str] | None = None, report: RowReport | None = None
) -> Iterator[Document]:
    """Yields the documents of all sources, in the order of the list. Empty documents are left out.

    Args:
        text, text_field: as in `DataConfig`.
        columns: what the chat template reads of a row beside the messages.
        report: decides about bad rows, and counts what is left out; None has bad rows raise.

    Raises:
        DataError: a source does not exist or cannot be read, or a row is malformed.
    """
    text_paths(text)
    report = report or RowReport()
    return _not_empty(chain.from_iterable(_source(name, text_field, columns or [], report) for name in text), report)


def _not_empty(all_documents: Iterator[Document], report: RowReport) -> Iterator[Document]:
    for document in all_documents:
        if document.is_chat or document.text.strip():
            yield document
        else:
            report.add_empty(document.where)


def text_parents(text: list[str]) -> list[Parent]:
    """Returns the files and folders of `DataConfig.text` as inputs of a result.

    Raises:
        DataError: one does not exist.
    """
    return [Parent.of(f"text {number}", path) for number, path in enumerate(text_paths(text), start=1)]


def text_paths(text: list[str]) -> list[Path]:
    """Returns the files and folders among the sources.

    Raises:
        DataError: one does not exist.
    """
    paths = []
    for name in text:
        if is_indexed(name):
            paths += [Path(f"{name}.bin"), Path(f"{name}.idx")]
        elif name != BUILTIN:
            paths.append(Path(name))
    for path in paths:
        if not path.exists():
            raise DataError(
                f"data.text names {path}, which does not exist: name a file, a folder, the prefix of a .bin and .idx "
                f"file, or `{BUILTIN}`"
            )
    return paths


def file_stats(text: list[str]) -> list[tuple[str, int, int]]:
    """Returns path, size and mtime in nanoseconds of every file that `documents` reads, and of those beside them."""
    stats = []
    for path in text_paths(text):
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        own = [(str(file.absolute()), file.stat()) for file in files]
        stats += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in own]
    return stats


def _source(name: str, text_field: str, columns: list[str], report: RowReport) -> Iterator[Document]:
    if name == BUILTIN:
        return (Document(text, BUILTIN) for text in builtin_documents())
    return _path_documents(Path(name), text_field, columns, report)


def _path_documents(path: Path, text_field: str, columns: list[str], report: RowReport) -> Iterator[Document]:
    fields = list(dict.fromkeys([text_field, MESSAGES, TOOLS, REFERENCES, *columns]))
    if is_dataset(path):
        return row_documents(read_dataset(path, fields), text_field, columns, report)
    if path.is_dir():
        below = (_path_documents(part, text_field, columns, report) for part in _visible(path))
        return chain.from_iterable(below)
    kind = kind_of(path)
    if kind is FileKind.TEXT:
        return (Document(read_text(file), str(file)) for file in [path])
    rows = read_parquet(path, fields) if kind is FileKind.PARQUET else read_rows(path, kind)
    return row_documents(rows, text_field, columns, report)


def _visible(folder: Path) -> list[Path]:
    """Returns files and folders in a folder, in the order of whole paths, but for those that `left_out` names."""
    below = [path for path in folder.iterdir() if not path.name.startswith(".")]
    below = [path for path in below if path.is_file() or (path.is_dir() and not path.is_symlink())]
    return sorted(below, key=lambda path: path.as_posix() + "/" * path.is_dir())


def left_out(text: list[str]) -> list[str]:
    """Returns the links in folders that are not read, one phrase each: to folders, which could form cycles, and to
    nothing."""
    phrases = []
    for path in text_paths(text):
        for folder, subfolders, names in os.walk(path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for below in (Path(folder, name) for name in [*subfolders, *sorted(names)] if not name.startswith(".")):
                if below.is_symlink() and below.is_dir():
                    phrases.append(f"{below} is a link to a folder: name {below.resolve()} itself in data.text")
                elif not below.exists():
                    phrases.append(f"{below} is a link to {os.readlink(below)}, which is not there: fix it")
    return phrases
