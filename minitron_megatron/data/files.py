"""Tells what a file is, by its content and its ending in any case, and reads its rows or its text.

JSON lines      a row per line, whatever the ending
JSON            a list of rows, or one row
CSV, TSV        by their ending; the first line names the columns
Parquet         by its content or its ending
text            everything else in UTF-8: one document
"""

import codecs
import csv
import json
import sys
from collections.abc import Iterator
from enum import Enum
from itertools import islice
from pathlib import Path

from minitron_megatron.data.rows import Row, RowError, no_document
from minitron_megatron.errors import DataError

_HEAD_BYTES = 2**12
_JSON_LINES = {".jsonl", ".ndjson", ".jsonlines", ".ldjson"}
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_TOKENISED = {".bin", ".idx"}
_UNREAD = {
    b"\x1f\x8b": "compressed with gzip: unpack it with `gunzip`",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it with `unzstd`",
    b"BZh": "compressed with bzip2: unpack it with `bunzip2`",
    b"\xfd7zXZ": "compressed with xz: unpack it with `unxz`",
    b"PK\x03\x04": "a zip archive: unpack it with `unzip`",
    b"ARROW1": "an Arrow file: write it as Parquet, or name a folder of `save_to_disk`",
    b"SQLite format 3": "a database: write it as JSON lines",
    b"%PDF-": "a PDF: write its text to a file",
}


class FileKind(Enum):
    """What a file is."""

    JSON_LINES = "JSON lines"
    JSON = "JSON"
    TABLE = "CSV"
    PARQUET = "Parquet"
    TEXT = "text"


def kind_of(file: Path) -> FileKind:
    """Tells what a file is.

    Raises:
        DataError: it is something that is not read.
    """
    ending = file.suffix.lower()
    if ending in _TOKENISED:
        raise DataError(f"{file} holds no text: name tokenised corpora by their prefix, {file.with_suffix('')}")
    with file.open("rb") as stream:
        head = stream.read(_HEAD_BYTES)
        for magic, advice in _UNREAD.items():
            if head.startswith(magic):
                raise DataError(f"{file} is {advice}, and name that")
        if ending == ".parquet" or (head.startswith(b"PAR1") and b"\0" in head):
            return FileKind.PARQUET
        stream.seek(0)
        lines = list(islice((line for line in stream if line.strip()), 2))
    if ending in _DELIMITERS:
        return FileKind.TABLE
    if ending in _JSON_LINES:
        is_list = lines and _begins_list(lines[0]) and _holds_rows(file.read_bytes())
        return FileKind.JSON if is_list else FileKind.JSON_LINES
    if lines and (ending == ".json" or _unmarked(lines[0])[:1] in (b"{", b"[")):
        if all(_unmarked(line)[:1] == b"{" and _holds_rows(line) for line in lines):
            return FileKind.JSON_LINES
        if ending == ".json" or _holds_rows(file.read_bytes()):
            return FileKind.JSON
    return FileKind.TEXT


def _unmarked(line: bytes) -> bytes:
    return line.removeprefix(codecs.BOM_UTF8).lstrip()


def _begins_list(line: bytes) -> bool:
    """Whether a line is the beginning of a list that does not end in it, or a list of rows."""
    if _unmarked(line)[:1] != b"[":
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return _holds_rows(line)


def _holds_rows(data: bytes) -> bool:
    """Whether the bytes are JSON of one row or of a list of rows."""
    try:
        value = json.loads(data)
    except RecursionError:
        return True
    except ValueError:
        return False
    rows = value if isinstance(value, list) else [value]
    return bool(rows) and all(isinstance(row, dict) for row in rows)


def read_rows(file: Path, kind: FileKind) -> Iterator[Row]:
    """Yields the rows of a file of JSON lines, JSON or CSV.

    Raises:
        DataError: it is not what it should be as a whole.
    """
    if kind is FileKind.JSON_LINES:
        return _json_lines(file)
    return _json(file) if kind is FileKind.JSON else _table(file)


def read_text(file: Path) -> str:
    """Reads a text file.

    Raises:
        DataError: it is not text.
    """
    try:
        text = file.read_text(encoding="utf-8")
        problem = "it has a byte of zero" if "\0" in text else ""
    except UnicodeDecodeError as error:
        problem = str(error)
    if problem:
        raise DataError(
            f"{file} is not UTF-8 text ({problem}): data.text reads text files, .jsonl and .parquet files, .json and "
            f".csv, folders of these, and .bin/.idx by their prefix, so convert it or leave it out"
        )
    return text


def _json_lines(file: Path) -> Iterator[Row]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{file}, line {number}"
                yield where, _parsed(line, where)


def _parsed(line: bytes, where: str) -> object:
    try:
        return json.loads(line)
    except RecursionError:
        return no_document(where, "it is nested too deeply")
    except ValueError as error:
        return no_document(where, repr(error)[:200])


def _json(file: Path) -> Iterator[Row]:
    value = _parsed(file.read_bytes(), str(file))
    if isinstance(value, RowError):
        raise DataError(f"{file} is not JSON as a whole: fix it, or write a row per line to a .jsonl file ({value})")
    for number, row in enumerate(value if isinstance(value, list) else [value]):
        yield f"{file}, row {number}", row


def _table(file: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)  # a document may be of any length
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter=_DELIMITERS[file.suffix.lower()], strict=True)
            names = reader.fieldnames or []
            if len(set(names)) < len(names):
                raise DataError(f"{file} has two columns of one name in its first line, {', '.join(names)}: rename one")
            while True:
                where = f"{file}, line {reader.line_num + 1}"
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:
                    yield where, no_document(where, str(error))
                    continue
                is_whole = None not in row and None not in row.values()
                yield where, row if is_whole else no_document(where, f"it has not the {len(names)} fields of line 1")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error}): convert it or leave it out") from error
