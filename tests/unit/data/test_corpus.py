import hashlib
import json
import subprocess
import sys

import pytest

from minitron_megatron.data import builtin
from minitron_megatron.data.builtin import builtin_documents
from minitron_megatron.data.corpus import documents
from minitron_megatron.errors import DataError

PROSE = "This sentence stands for a docstring that is long enough to be worth reading, number "


def contents(sources, **options):
    return [document.content for document in documents(sources, **options)]


def test_sources_keep_their_order_and_folders_are_sorted(tmp_path):
    (tmp_path / "b" / ".hidden").mkdir(parents=True)
    (tmp_path / "b" / "z.md").write_text("z")
    (tmp_path / "b" / "a.txt").write_text("ä", encoding="utf-8")
    (tmp_path / "b" / "sub").mkdir()
    (tmp_path / "b" / "sub" / "lines.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 7}\r\n')
    (tmp_path / "b" / ".hidden" / "config").write_text("no document")
    (tmp_path / "b" / ".DS_Store").write_bytes(b"\xff\xfe")
    (tmp_path / "a.txt").write_text("first\nand still first")
    (tmp_path / "blank.txt").write_text(" \n")
    sources = [str(tmp_path / name) for name in ("b", "blank.txt", "a.txt")]
    assert contents(sources) == ["ä", "one", "two", "z", "first\nand still first"]


@pytest.mark.parametrize(
    "line", [b"no json", b'{"body": "x"}', b'["text"]', b'{"text": 3}', b'{"text": "\\ud800"}', b'{"text": "\xff"}']
)
def test_a_bad_json_line_is_named(tmp_path, line):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(DataError, match=r"bad\.jsonl, line 2: "):
        list(documents([str(file)]))


def test_a_missing_source_is_named_before_anything_is_read(tmp_path):
    with pytest.raises(DataError, match="nowhere, which does not exist"):
        documents(["builtin", str(tmp_path / "nowhere")])


def test_a_binary_file_is_named(tmp_path):
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    with pytest.raises(
        DataError, match=r"picture.png is not UTF-8 .*: data.text reads text files, \.jsonl and \.parquet files"
    ):
        list(documents([str(tmp_path)]))


def test_token_files_are_named_by_their_prefix(tmp_path):
    """The bytes of small token ids would be text."""
    for name in ("own.bin", "own.idx"):
        (tmp_path / name).write_bytes(b"a\0b\0")
        with pytest.raises(DataError, match=rf"{name} holds no text: name tokenised corpora by their prefix, .*own$"):
            contents([str(tmp_path / name)])


def test_rows_may_call_their_text_otherwise(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "text": "y"}\n{"messages": [{"role": "user"}], "body": "z"}\n')
    assert contents([str(tmp_path)], text_field="body") == ["x", "z"]
    with pytest.raises(DataError, match=r"line 1: not a document \(other = None\): every line must be \{\"other\""):
        contents([str(tmp_path)], text_field="other")


def test_links_to_folders_are_not_followed(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "again").symlink_to(tmp_path)
    assert contents([str(tmp_path)]) == ["a"]


def test_docstrings_come_once_and_in_the_order_of_the_source(tmp_path, monkeypatch):
    methods = f'    def f(self):\n        """{PROSE}3"""\n    def g(self):\n        """short"""\n'
    functions = f'async def h():\n    """{PROSE}4"""\ndef i():\n    """{PROSE}2"""\n'
    first = tmp_path / "first.py"
    first.write_text(f'"""{PROSE}1"""\nclass A:\n    """{PROSE}2"""\n{methods}{functions}')
    second = tmp_path / "second.py"
    second.write_text(f'raise SystemExit("imported")\ndef j():\n    """{PROSE}3"""\ndef k():\n    """{PROSE}5"""\n')
    nothing_new = tmp_path / "third.py"
    nothing_new.write_text(f'"""{PROSE}5"""')
    monkeypatch.setattr(builtin, "_standard_library", lambda: [first, second, nothing_new])
    monkeypatch.setattr(builtin, "topics", {"b": "topic b", "c": "topic a", "a": "topic a"})
    numbered = [PROSE + str(number) for number in range(6)]
    assert list(builtin_documents()) == ["topic a", "topic b", "\n\n".join(numbered[1:5]), numbered[5]]


def test_builtin_is_prose_of_the_standard_library_alone():
    text = contents(["builtin"])
    assert len(text) > 400
    assert sum(map(len, text)) > 1_500_000
    assert any(json.__doc__.strip() in document for document in text)
    files = [file.as_posix() for file in builtin._standard_library()]
    assert not [file for file in files if "/test/" in file or "/idlelib/" in file or "/site-packages/" in file]


def test_builtin_is_the_same_in_a_process_that_hashes_differently_and_imports_nothing():
    script = (
        "import hashlib, sys\n"
        "from minitron_megatron.data.corpus import documents\n"
        "text = '|'.join(document.text for document in documents(['builtin']))\n"
        "print(hashlib.sha256(text.encode()).hexdigest(), 'this' in sys.modules)"
    )
    env = {"PYTHONHASHSEED": "7", "PYTHONPATH": ":".join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
    here = hashlib.sha256("|".join(contents(["builtin"])).encode()).hexdigest()
    assert run.stdout.split() == [here, "False"]
