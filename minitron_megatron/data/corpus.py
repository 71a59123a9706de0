"""Where documents come from: text files, JSON-lines files, folders of these, or Python's own prose."""

import ast
import json
import sys
import sysconfig
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from pydoc_data.topics import topics

from minitron_megatron.errors import DataError

BUILTIN = "builtin"
# A shorter docstring is a label rather than prose, and would weigh the corpus towards fragments.
_MIN_DOCSTRING = 80
# Test suites hold hardly any prose. The rest is what Linux distributions strip or package apart (Debian's
# python3-tk, python3-distutils, python3-venv ...), so that it is missing on some machines.
_SKIPPED = {"test", "tests", "idlelib", "turtledemo", "tkinter", "distutils", "lib2to3", "ensurepip", "macholib"}


def documents(text: list[str]) -> Iterator[str]:
    """The documents of all sources, in the order of the list. Documents without a word are left out.

    Args:
        text: as in `DataConfig.text`.

    Raises:
        DataError: a source does not exist, a file is not UTF-8 text, or a JSON line has no `text`.
    """
    text_paths(text)
    sources = [builtin_documents() if name == BUILTIN else _path_documents(Path(name)) for name in text]
    return (document for document in chain.from_iterable(sources) if document.strip())


def text_paths(text: list[str]) -> list[Path]:
    """The files and folders among the sources.

    Raises:
        DataError: one does not exist.
    """
    paths = [Path(name) for name in text if name != BUILTIN]
    for path in paths:
        if not path.exists():
            raise DataError(f"data.text names {path}, which does not exist: name a file, a folder or `{BUILTIN}`")
    return paths


def _path_documents(path: Path) -> Iterator[str]:
    return chain.from_iterable(
        _json_lines(file) if file.suffix == ".jsonl" else _text_file(file)
        for file in (_visible_files(path) if path.is_dir() else [path])
    )


def _visible_files(folder: Path) -> list[Path]:
    """Files below a folder, sorted. Names with a leading dot (`.git`, `.DS_Store`) are not text."""
    below = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    visible = (path for path in below if not any(part.startswith(".") for part in path.parts))
    return [folder / path for path in sorted(visible, key=Path.as_posix)]


def _text_file(file: Path) -> Iterator[str]:
    try:
        yield file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text ({error}): data.text reads text files, .jsonl files and folders of these, so "
            f"convert it or leave it out"
        ) from error


def _json_lines(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                text = json.loads(line)["text"]
                text.encode()  # lone surrogates are valid JSON, but no text
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f'{file}, line {number}: not a document ({error!r}): every line must be {{"text": "..."}}'
                ) from error
            yield text


def builtin_documents() -> Iterator[str]:
    """The Python standard library's prose: the topics of `help()`, then the docstrings of each module.

    The source files are parsed, not imported. A text that occurs twice is given once. The result depends
    on the Python version alone.
    """
    seen = set()
    for _, topic in sorted(topics.items()):
        if topic not in seen:
            seen.add(topic)
            yield topic
    for file in _standard_library():
        fresh = [docstring for docstring in _docstrings(file.read_bytes()) if docstring not in seen]
        seen.update(fresh)
        if fresh:
            yield "\n\n".join(dict.fromkeys(fresh))


def _standard_library() -> Iterator[Path]:
    """Source files of the standard library, sorted by module; never what was installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        files = [root / f"{name}.py", *sorted((root / name).rglob("*.py"), key=Path.as_posix)]
        yield from (file for file in files if file.is_file() and not _SKIPPED & set(file.relative_to(root).parts))


def _docstrings(source: bytes) -> list[str]:
    """Docstrings long enough to be prose, in the order of the source."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # the module itself has no line
    found = (ast.get_docstring(node) for node in nodes)
    return [docstring for docstring in found if docstring and len(docstring) > _MIN_DOCSTRING]
