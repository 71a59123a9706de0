"""The prose in Python's standard library: a corpus that every machine has."""

import ast
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

# A shorter docstring is a label rather than prose, and would weigh the corpus towards fragments.
_MIN_DOCSTRING = 80
# Test suites hold hardly any prose. Linux distributions strip or split off the rest (Debian's python3-tk,
# python3-distutils, python3-venv ...), so it is missing on some machines.
_SKIPPED = {"test", "tests", "idlelib", "turtledemo", "tkinter", "distutils", "lib2to3", "ensurepip", "macholib"}


def builtin_documents() -> Iterator[str]:
    """Yields the Python standard library's prose: the topics of `help()`, then the docstrings of each module.

    The source files are parsed, not imported. Repeated texts are yielded once. The result depends only on the Python
    version.
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
    """Yields the source files of the standard library, sorted by module; never packages installed beside it."""
    root = Path(sysconfig.get_path("stdlib"))
    for name in sorted(sys.stdlib_module_names):
        files = [root / f"{name}.py", *sorted((root / name).rglob("*.py"), key=Path.as_posix)]
        yield from (file for file in files if file.is_file() and not _SKIPPED & set(file.relative_to(root).parts))


def _docstrings(source: bytes) -> list[str]:
    """Returns docstrings long enough to be prose, in the order of the source."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, documented)]
    nodes.sort(key=lambda node: getattr(node, "lineno", 0))  # the module itself has no line
    docstrings = (ast.get_docstring(node) for node in nodes)
    return [docstring for docstring in docstrings if docstring and len(docstring) > _MIN_DOCSTRING]
