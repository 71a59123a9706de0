"""Turns rows into documents, and says what of a corpus was left out.

A row has a text, or the messages of a conversation with whatever else the chat template reads: `tools`, `documents` or
a column of any name.
"""

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from minitron_megatron.config.common import OnBadRow
from minitron_megatron.errors import DataError
from minitron_megatron.files import write_json

logger = logging.getLogger(__name__)

MESSAGES = "messages"
TOOLS, REFERENCES = "tools", "documents"
"""The columns beside messages that transformers' templates know by these names."""

_NAMED = 3  # of the bad rows


class RowError(DataError):
    """A row that is no document."""


Row = tuple[str, object]
"""Place of the row for messages, and its fields; a RowError if it cannot be read."""


@dataclass(frozen=True)
class Document:
    """One document.

    Attributes:
        content: text, or the messages of a conversation, each with a `role`.
        where: file and line, for errors.
        extra: what the chat template reads beside the messages, by name.
    """

    content: str | list[dict]
    where: str
    extra: dict[str, object] = field(default_factory=dict)

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.content, str)

    @property
    def text(self) -> str:
        """The content as text."""
        if isinstance(self.content, str):
            return self.content
        content = {**self.extra, MESSAGES: self.content} if self.extra else self.content
        return json.dumps(content, sort_keys=True, default=str)


@dataclass
class RowReport:
    """Decides about bad rows, and counts what a reader of the log should know.

    Attributes:
        on_bad_row: see `DataConfig`.
        skipped: bad rows that were left out.
        first: what is wrong with the first of them.
        empty: rows and files without text.
        first_empty: places of the first of them.
        both: rows with text and messages, whose text counts.
        unread: rows by the name of a column for the chat template that the template does not read.
    """

    on_bad_row: OnBadRow = OnBadRow.ERROR
    skipped: int = 0
    first: list[str] = field(default_factory=list)
    empty: int = 0
    first_empty: list[str] = field(default_factory=list)
    both: int = 0
    unread: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, file: Path) -> "RowReport":
        """Reads what `write` has written; a report of nothing if the file is missing or damaged."""
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return cls()

    def write(self, file: Path) -> None:
        """Writes what was counted, for a time when the rows are not read again."""
        write_json(file, asdict(self))

    def add(self, error: RowError) -> None:
        """Counts a bad row.

        Raises:
            RowError: bad rows are errors.
        """
        if self.on_bad_row is OnBadRow.ERROR:
            raise error
        self.skipped += 1
        if len(self.first) < _NAMED:
            self.first.append(str(error))

    def add_empty(self, where: str) -> None:
        """Counts a row or file without text."""
        self.empty += 1
        if len(self.first_empty) < _NAMED:
            self.first_empty.append(where)

    def log(self) -> None:
        """Logs what was counted."""
        if self.skipped:
            logger.warning("data.on_bad_row=skip left out %d rows, the first: %s", self.skipped, "; ".join(self.first))
        if self.empty:
            logger.warning("left out %d empty documents, the first: %s", self.empty, "; ".join(self.first_empty))
        if self.both:
            logger.warning(
                "%d rows have a text and %s: the text counts, and all of it is learned; set data.text_field to a name "
                "that is not there to teach the conversations",
                self.both,
                MESSAGES,
            )
        for name, count in self.unread.items():
            logger.warning("%d rows have %s, which the tokenizer's chat template does not read: left out", count, name)


def row_documents(rows: Iterable[Row], text_field: str, columns: list[str], report: RowReport) -> Iterator[Document]:
    """Yields the documents of rows, each with its text or its messages.

    Args:
        rows: to read.
        text_field: field with the text.
        columns: what the chat template reads beside the messages.
        report: counts the others.

    Raises:
        RowError: a row is bad, and `report` does not skip it.
    """
    for where, row in rows:
        try:
            document = _document(where, row, text_field, columns, report)
        except RecursionError:
            report.add(RowError(f"{where}: not a document (it is nested too deeply): leave it out"))
        except RowError as error:
            report.add(error)
        else:
            yield document


def _document(where: str, row: object, text_field: str, columns: list[str], report: RowReport) -> Document:
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, dict):
        raise no_document(where, f"{type(row).__name__} instead of fields", text_field)
    text, messages = row.get(text_field), row.get(MESSAGES)
    is_blank = text is None or (isinstance(text, str) and not text.strip())
    is_chat = MESSAGES in row and is_blank and (messages is not None or text_field not in row)
    if is_chat and text_field != MESSAGES:
        extra = {name: _decoded(name, row[name], where) for name in columns if row.get(name) is not None}
        for name in (TOOLS, REFERENCES):
            if row.get(name) and name not in columns:
                report.unread[name] = report.unread.get(name, 0) + 1
        document = Document(_messages(messages, where), where, extra)
        document.text.encode()  # raises now if it is nested too deeply
        return document
    if not isinstance(text, str):
        shown = repr(text)[:100]
        raise no_document(where, f"{text_field} = {shown}", text_field, row)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # lone surrogates are valid JSON, but no text
        raise no_document(where, repr(error)[:200], text_field) from error
    report.both += messages is not None and text_field != MESSAGES
    return Document(text, where)


def _decoded(name: str, value: object, where: str) -> object:
    """Returns a column for the chat template; tables often hold tools and documents as JSON."""
    if name not in (TOOLS, REFERENCES) or not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise RowError(f"{where}: {name} is a text that is no JSON: give a list") from error


def _messages(value: object, where: str) -> list[dict]:
    rows = value if isinstance(value, list) else []
    if not rows or not all(isinstance(row, dict) and isinstance(row.get("role"), str) for row in rows):
        raise RowError(f'{where}: messages must be a list of {{"role": "...", "content": "..."}}, none of them empty')
    for number, row in enumerate(rows):
        content = row.get("content")
        if content is not None and not isinstance(content, str | list | dict):
            raise RowError(f"{where}: message {number} has content = {content!r}, which is no text: write it as text")
    # Parquet has every field in every row.
    return [{name: part for name, part in row.items() if part is not None} for row in rows]


def without_nulls(value: object) -> object:
    """Returns a value of a table without the fields that only other rows have, which tables fill up with nulls."""
    if isinstance(value, dict):
        return {name: without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def no_document(where: str, problem: str, text_field: str = "text", row: dict | None = None) -> RowError:
    """Returns the error of a row without text."""
    fields = f"; its fields are {', '.join(map(str, row))[:200]}" if row else ""
    return RowError(
        f'{where}: not a document ({problem}): every line must be {{{json.dumps(text_field)}: "..."}} or '
        f'{{"messages": [...]}}; data.text_field says what the text is called{fields}'
    )
