"""Where documents come from: text files, JSON lines, Parquet, saved datasets, folders of these, or Python's prose."""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from minitron_megatron.artifacts.manifest import Parent
from minitron_megatron.data.builtin import builtin_documents
from minitron_megatron.data.indexed import is_indexed
from minitron_megatron.data.tables import is_dataset, read_dataset, read_parquet
from minitron_megatron.errors import DataError

BUILTIN = "builtin"
_MESSAGES = "messages"


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        content: text, or the messages of a conversation, each with a `role`.
        where: file and line, for errors.
    """

    content: str | list[dict]
    where: str

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.content, str)

    @property
    def text(self) -> str:
        """The content as text."""
        return self.content if isinstance(self.content, str) else json.dumps(self.content, sort_keys=True)


def documents(text: list[str], text_field: str = "text") -> Iterator[Document]:
    """Yields the documents of all sources, in the order of the list. Empty documents are skipped.

    Args:
        text, text_field: as in `DataConfig`.

    Raises:
        DataError: a source does not exist or cannot be read, or a row is malformed.
    """
    text_paths(text)
    all_documents = chain.from_iterable(_source(name, text_field) for name in text)
    return (document for document in all_documents if document.is_chat or document.text.strip())


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


def _source(name: str, text_field: str) -> Iterator[Document]:
    if name == BUILTIN:
        return (Document(text, BUILTIN) for text in builtin_documents())
    return _path_documents(Path(name), text_field)


def _path_documents(path: Path, text_field: str) -> Iterator[Document]:
    if is_dataset(path):
        return _rows(read_dataset(path, [text_field, _MESSAGES]), text_field)
    if path.is_dir():
        return chain.from_iterable(_path_documents(below, text_field) for below in _visible(path))
    if path.suffix == ".jsonl":
        return _rows(_json_lines(path), text_field)
    if path.suffix == ".parquet":
        return _rows(read_parquet(path, [text_field, _MESSAGES]), text_field)
    if path.suffix in (".bin", ".idx"):
        raise DataError(f"{path} holds no text: name tokenised corpora by their prefix, {path.with_suffix('')}")
    return _text_file(path)


def _visible(folder: Path) -> list[Path]:
    """Returns files and folders in a folder, in the order of whole paths.

    Skips names with a leading dot, and links to folders, which could form cycles.
    """
    below = [path for path in folder.iterdir() if not path.name.startswith(".")]
    below = [path for path in below if path.is_file() or (path.is_dir() and not path.is_symlink())]
    return sorted(below, key=lambda path: path.as_posix() + "/" * path.is_dir())


def _text_file(file: Path) -> Iterator[Document]:
    try:
        yield Document(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text ({error}): data.text reads text files, .jsonl and .parquet files, folders of "
            f"these, and .bin/.idx by their prefix, so convert it or leave it out"
        ) from error


def _json_lines(file: Path) -> Iterator[tuple[str, object]]:
    """Yields place and value of every line."""
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                try:
                    yield where, json.loads(line)
                except ValueError as error:
                    raise _no_document(where, repr(error)) from error


def _rows(rows: Iterable[tuple[str, object]], text_field: str) -> Iterator[Document]:
    """Yields the documents of rows, each with its text or its messages."""
    for where, row in rows:
        if not isinstance(row, dict):
            raise _no_document(where, f"{type(row).__name__} instead of fields", text_field)
        if _MESSAGES in row and text_field not in row:
            yield Document(_messages(row[_MESSAGES], where), where)
            continue
        if not isinstance(row.get(text_field), str):
            raise _no_document(where, f"{text_field} = {row.get(text_field)!r}", text_field)
        try:
            row[text_field].encode()
        except UnicodeEncodeError as error:  # lone surrogates are valid JSON, but no text
            raise _no_document(where, repr(error), text_field) from error
        yield Document(row[text_field], where)


def _messages(value: object, where: str) -> list[dict]:
    rows = value if isinstance(value, list) else []
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("role"), str) for row in rows):
        raise DataError(f'{where}: messages must be a list of {{"role": "...", "content": "..."}}, none of them empty')
    # Parquet has every field in every row.
    return [{name: part for name, part in row.items() if part is not None} for row in rows]


def _no_document(where: str, problem: str, text_field: str = "text") -> DataError:
    return DataError(
        f'{where}: not a document ({problem}): every line must be {{{json.dumps(text_field)}: "..."}} or '
        f'{{"messages": [...]}}; data.text_field says what the text is called'
    )
