"""That the core is open: outside of model/layers/ and the families' table nothing knows a kind of layer by name."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import minitron_megatron
from minitron_megatron.model.axes import HIDDEN, VOCAB
from minitron_megatron.model.layers import KINDS
from minitron_megatron.model.layers import attention as attention_kind
from minitron_megatron.model.layers import mlp as mlp_kind
from minitron_megatron.model.network import Network, transformer

PACKAGE = Path(minitron_megatron.__file__).parent
# The kinds themselves, and the table between Hugging Face's configs and them.
KNOW_KINDS = ("model/layers/", "model/families.py")
# Calls to which "*" and "-" are no symbols.
PATTERNS = {"glob", "rglob", "startswith", "endswith", "split", "rsplit", "partition", "rpartition", "removeprefix"}
PATTERNS |= {"define_metric", "join"}
# What others call so: lm-eval its groups of tasks.
OF_OTHERS = {("evaluation/tasks.py", "groups")}


def modules() -> list[Path]:
    """Every module of the package but those that may know kinds; launch/ is a link, and part of it."""
    files = [path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")]
    files += [Path("launch") / path.name for path in (PACKAGE / "launch").glob("*.py")]
    return sorted({path for path in files if not path.as_posix().startswith(KNOW_KINDS)})


def names_of_kinds() -> set[str]:
    """Symbols, axes, settings and parameters of all kinds."""
    layer = [
        KINDS["*"](num_heads=4, num_query_groups=2, head_dim=8, bias=True, qk_norm=True),
        KINDS["-"](16, bias=True),
    ]
    network = Network(transformer(1, layer), hidden_size=32, vocab_size=8, padded_vocab_size=8)
    names = set()
    for sublayer in layer:
        own = {row.name for row in sublayer.rows(network)}
        names |= {sublayer.symbol, *sublayer.sizes, *own, *(axis.setting for axis in sublayer.prunable)}
        names |= {name.rpartition(".")[0] for name in own}
    return names - {HIDDEN.name, VOCAB.name, ""}


def strings(tree: ast.Module) -> Iterator[ast.Constant]:
    """String constants that are neither docstrings nor patterns of text."""
    passed = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            passed.add(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in PATTERNS:
            passed.update(node.args)
            if isinstance(node.func.value, ast.Constant):
                passed.add(node.func.value)
        if isinstance(node, ast.JoinedStr):
            passed.update(node.values)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in passed:
            yield node


@pytest.mark.parametrize("path", modules(), ids=str)
def test_no_module_knows_a_kind_by_name(path):
    tree = ast.parse((PACKAGE / path).read_text())
    kinds = {kind.__name__ for kind in KINDS.values()}
    own_modules = {attention_kind.__name__, mlp_kind.__name__}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            imported = {alias.name for alias in node.names}
            assert node.module not in own_modules, f"line {node.lineno} imports a kind"
            if node.module == "minitron_megatron.model.layers":
                assert not imported & {*kinds, "attention", "mlp"}, f"line {node.lineno} imports a kind"
    names = names_of_kinds()
    found = [
        f"line {node.lineno}: {node.value!r}"
        for node in strings(tree)
        if node.value in names and (path.as_posix(), node.value) not in OF_OTHERS
    ]
    assert not found


def test_there_is_no_word_for_networks_whose_layers_are_all_whole():
    for path in PACKAGE.rglob("*.py"):
        assert "is_uniform" not in path.read_text(), path
