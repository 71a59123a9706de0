"""What a file is, what its rows are, and which of them are taught."""

import gzip
import json
import logging

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron.config.common import OnBadRow
from minitron_megatron.config.schema import DataConfig
from minitron_megatron.data.corpus import documents
from minitron_megatron.data.rows import RowReport
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.errors import DataError

ROWS = [{"text": "one"}, {"text": "two", "id": 7}, {"text": "three"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
LIST = json.dumps(ROWS)
PRETTY = json.dumps(ROWS, indent=2)
CSV = 'id,text\n1,one\n2,"two"\n3,three\n'


def contents(*sources, **options):
    return [document.content for document in documents(list(map(str, sources)), **options)]


def skipping():
    return RowReport(OnBadRow.SKIP)


@pytest.mark.parametrize(
    "name, text",
    [
        *((name, LINES) for name in ("a.jsonl", "a.JSONL", "a.ndjson", "a.json", "a.JSON", "a.txt", "a", "a.log")),
        *((name, LIST) for name in ("a.json", "a.Json", "a.jsonl", "a.txt", "a")),
        *((name, PRETTY) for name in ("a.json", "a.jsonl", "a.ndjson", "a")),
        ("a.csv", CSV),
        ("a.CSV", CSV.replace("\n", "\r\n")),
        ("a.tsv", CSV.replace(",", "\t")),
        (
            "a.csv",
            '\ufefftext,id\none,1\n"two",2\nthree,3\n',
        ),
    ],
)
def test_rows_are_told_by_content_and_by_ending_in_any_case(tmp_path, name, text):
    (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    assert contents(tmp_path / name) == contents(tmp_path) == ["one", "two", "three"]


@pytest.mark.parametrize("name", ["a.parquet", "a.PARQUET", "a.pq", "a"])
def test_parquet_is_told_by_its_content(tmp_path, name):
    pq.write_table(pa.table({"text": ["one", "two"]}), tmp_path / name)
    assert contents(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.json", b'{"a": {"b": 1}}', "row 0: not a document|line 1: not a document"),
        ("a.ipynb", json.dumps({"cells": []}, indent=1).encode(), "row 0: not a document"),
        ("a.json", b'[{"text": "x"}, ', "a.json is not JSON as a whole"),
        ("a.json", b'["x", "y"]', "row 0: not a document"),
        ("a.csv", b"id,body\n1,x\n", "line 2: not a document .*its fields are id, body"),
        ("a.csv", b"text,text\nx,y\n", "two columns of one name"),
        ("a.jsonl.gz", gzip.compress(LINES.encode(), mtime=0), "compressed with gzip: unpack it with `gunzip`"),
        ("a.txt", "text".encode("utf-16-le"), "is not UTF-8 text .it has a byte of zero"),
        ("a.BIN", b"a\0b\0", "holds no text: name tokenised corpora by their prefix"),
    ],
)
def test_what_is_not_read_is_refused_and_never_taught_as_prose(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        contents(tmp_path / name)


@pytest.mark.parametrize("text", ["{ braces } are no rows", "[1] A footnote\n", "{\n", "[]", "int main() {}", "{1: 2}"])
def test_prose_with_braces_is_prose(tmp_path, text):
    (tmp_path / "a.txt").write_text(text)
    assert contents(tmp_path / "a.txt") == [text]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["text", "messages", "a"]), inner),
    max_leaves=6,
)
LINE = JSON.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=30).map(lambda b: b.replace(b"\n", b""))


@given(lines=st.lists(LINE, max_size=6), ending=st.sampled_from(["jsonl", "NDJSON"]))
def test_any_line_is_a_document_or_counted(tmp_path_factory, lines, ending):
    file = tmp_path_factory.mktemp("lines") / f"a.{ending}"
    file.write_bytes(b'{"text": "first"}\n' + b"\n".join(lines) + b"\n")
    report = skipping()
    read = contents(file, report=report)
    assert read[0] == "first"
    assert len(read) + report.skipped + report.empty == 1 + sum(bool(line.strip()) for line in lines)
    if report.skipped:
        with pytest.raises(DataError, match="line [0-9]+: "):
            contents(file)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"text": ' + "[" * 100_000,
        '{"messages": ' + "[" * 900 + "]" * 900 + "}",
        '{"text": 1' + "0" * 5000,
    ],
)
def test_deep_or_endless_rows_are_bad_rows(tmp_path, line):
    (tmp_path / "a.jsonl").write_text(LINES + line + "\n")
    with pytest.raises(DataError, match="line 4: "):
        contents(tmp_path / "a.jsonl")
    report = skipping()
    assert contents(tmp_path / "a.jsonl", report=report) == ["one", "two", "three"] and report.skipped == 1
    deep = {"role": "user", "content": "x", "tool_calls": json.loads("[" * 400 + "]" * 400)}
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [deep]}) + "\n")
    assert len(contents(tmp_path / "b.jsonl")) == 1


def test_bad_and_empty_rows_are_counted_and_the_first_are_named(tmp_path, tokenizer_dir, caplog):
    lines = [{"text": f"Story number {n} of the document"} for n in range(20)]
    broken = ['{"text": ', '{"text": null}', '{"body": "x"}', "3", '{"text": 5}', '{"text": ""}']
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "\n".join(broken))
    config = DataConfig([str(tmp_path / "a.jsonl")], str(tmp_path / "cache"), on_bad_row=OnBadRow.SKIP)
    with caplog.at_level(logging.WARNING):
        prepare_corpus(config, tokenizer_dir)
        first = [record.getMessage() for record in caplog.records]
        caplog.clear()
        corpus = prepare_corpus(config, tokenizer_dir)  # which reads no row again
    assert [record.getMessage() for record in caplog.records] == first
    assert sum(files.num_documents for files in [*corpus.train, *corpus.heldout]) == 20
    [bad] = [r.getMessage() for r in caplog.records if "on_bad_row" in r.getMessage()]
    assert bad.startswith("data.on_bad_row=skip left out 5 rows, the first: ")
    assert all(f"line {number}: " in bad for number in (21, 22, 23)) and "line 24" not in bad
    assert any("left out 1 empty documents, the first: " in r.getMessage() for r in caplog.records)


def test_a_row_with_text_and_messages_says_which_counts(tmp_path, tokenizer_dir, caplog):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [{"text": f"Text {n}", "messages": turns} for n in range(3)] + [{"text": None, "messages": turns}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = skipping()
    assert contents(tmp_path / "a.jsonl", report=report) == ["Text 0", "Text 1", "Text 2", turns]
    with caplog.at_level(logging.WARNING):
        report.log()
    assert "3 rows have a text and messages: the text counts" in caplog.text


def test_links_that_are_not_read_are_named(tmp_path, tokenizer_dir, caplog):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/b.txt").write_text("Other text")
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.jsonl").write_text("".join(json.dumps({"text": f"Story {n}"}) + "\n" for n in range(9)))
    (tmp_path / "text/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "text/gone.txt").symlink_to(tmp_path / "nowhere")
    with caplog.at_level(logging.WARNING):
        prepare_corpus(DataConfig([str(tmp_path / "text")], str(tmp_path / "cache")), tokenizer_dir)
    assert f"text/more is a link to a folder: name {tmp_path / 'elsewhere'} itself" in caplog.text
    assert "text/gone.txt is a link to" in caplog.text


def test_nulls_that_a_table_fills_in_are_left_out(tmp_path):
    call = {"function": {"name": "f", "arguments": {"city": "Rome"}}}
    other = {"function": {"name": "g", "arguments": {"day": 3}}}
    rows = [
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [call]}], "tools": [call]},
        {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [other]}], "tools": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = documents([str(tmp_path / "a.parquet")], "text", ["tools"])
    assert [first.content, second.content] == [row["messages"] for row in rows]
    assert first.extra == {"tools": [call]} and second.extra == {}


def test_content_that_is_no_text_is_a_bad_row(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": NaN}]}\n')
    with pytest.raises(DataError, match="line 1: message 0 has content = nan, which is no text"):
        contents(tmp_path / "a.jsonl")
