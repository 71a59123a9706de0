"""The verb `inspect`: what a folder is, how large, and where it comes from, on the screen."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from minitron_megatron.checkpoint.huggingface import HuggingFaceFolder
from minitron_megatron.checkpoint.manifest import MANIFEST, Manifest, Parent, fingerprint
from minitron_megatron.checkpoint.sharded import TRACKER, Checkpoint
from minitron_megatron.config.schema import InspectConfig
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.count import forward_flops_per_token, num_parameters
from minitron_megatron.model.shape import ModelShape
from minitron_megatron.pruning import plan as plans
from minitron_megatron.pruning import scores
from minitron_megatron.report.results import EVALUATION, read_evaluation
from minitron_megatron.report.style import short
from minitron_megatron.training import metrics


@dataclass
class Found:
    """What is known of a folder.

    Attributes:
        kind: what it is, in words.
        shapes: the networks it speaks of, by what they are to it.
        facts: what else there is to say, in order.
    """

    kind: str
    shapes: dict[str, ModelShape] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)


def inspect(config: InspectConfig) -> None:
    """Print what lies at a path: kind, shape, counts, origin and settings.

    Raises:
        CheckpointError: it is nothing that this project writes, or not whole.
    """
    path = Path(config.path)
    found = look_at(path)
    manifest = _manifest(path if path.is_dir() else path.parent)
    # Output that goes into a file has no width, and broken lines cannot be searched.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(Text(f"{path}: {found.kind}", style="bold"))
    facts = {**found.facts, "on disk": f"{_size(path):,} bytes"}
    if manifest:
        facts["version"] = manifest.version
    _print_section(console, "", _fact_table(facts))
    if found.shapes:
        _print_section(console, "network", _shape_table(found.shapes, _sequence_length(manifest)))
    if manifest:
        _print_section(console, "made from", _lineage(Text(str(path)), manifest, set()))
        settings = yaml.safe_dump(manifest.config, sort_keys=False, width=120)
        _print_section(console, "settings", Text(settings.rstrip()))


def look_at(path: Path) -> Found:
    """Find out what lies at `path`, which is a folder or the file that tells what its folder is.

    Raises:
        CheckpointError: nothing that is known, or not whole.
    """
    if not path.exists():
        raise CheckpointError(f"path = {path} does not exist: name a folder that this project wrote")
    for marker, reader in _READERS.items():
        if path.is_dir() and (path / marker).is_file():
            return reader(path)
        if path.is_file() and path.name == marker:
            return reader(path.parent)
    raise CheckpointError(
        f"path = {path} is nothing that is known here: looked for {', '.join(_READERS)}; name a folder that has one"
    )


def _checkpoint(folder: Path) -> Found:
    checkpoint = Checkpoint(folder)
    facts = {"iteration": str(checkpoint.iteration), "dtype": str(checkpoint.dtype).removeprefix("torch.")}
    found = Found("checkpoint", {"": checkpoint.shape}, facts)
    if (folder / plans.FILE).is_file():
        found.kind = "pruned checkpoint"
        found.shapes = _plan(folder).shapes
    return found


def _run(folder: Path) -> Found:
    found = _checkpoint(folder)
    found.kind = "training run" if (folder / MANIFEST).is_file() else "training run, not finished"
    lines = metrics.read_metrics(folder) if (folder / metrics.FILE).is_file() else []
    if lines:
        found.facts["last step"] = f"{lines[-1]['progress/step']} ({short(lines[-1]['progress/tokens'])} tokens)"
        found.facts |= {key: f"{value:.4f}" for key, value in lines[-1].items() if key.startswith(("loss/", "val/"))}
    return found


def _scores(folder: Path) -> Found:
    found = scores.Scores.read(folder)
    return Found("scores", {"": found.shape}, {name: str(value) for name, value in found.settings.items()})


def _evaluation(folder: Path) -> Found:
    values = read_evaluation(folder)
    facts = {
        "model": values["model"],
        "parameters": f"{values['parameters']:,}",
        "without embeddings": f"{values['parameters_without_embeddings']:,}",
        "held-out loss": f"{values['heldout']['loss']:.4f} nats per token",
        "perplexity": f"{values['heldout']['perplexity']:,.2f}",
        "held-out tokens": f"{values['heldout']['num_tokens']:,}",
    }
    if values["generation"]:
        facts["generation"] = f"{values['generation']['tokens_per_s']:,.1f} tokens/s"
    return Found("evaluation", facts=facts)


def _plan(folder: Path) -> Found:
    plan = plans.Plan.read(folder)
    return Found("plan", {"before": plan.source, "after": plan.target})


def _huggingface(folder: Path) -> Found:
    source = HuggingFaceFolder(folder)
    return Found("Hugging Face folder", {"": source.shape}, {"dtype": str(source.dtype).removeprefix("torch.")})


# The file that tells what a folder is, and who reads it. A pruned checkpoint also holds a plan, so order matters.
_READERS: dict[str, Callable[[Path], Found]] = {
    TRACKER: _checkpoint,
    f"checkpoints/{TRACKER}": _run,
    scores.FILE: _scores,
    EVALUATION: _evaluation,
    "config.json": _huggingface,
    plans.FILE: _plan,
}


def _size(path: Path) -> int:
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files)


def _manifest(folder: Path) -> Manifest | None:
    """What is written about a folder; a run that is not finished has it beside its checkpoints."""
    places = [place for place in (folder, folder / "checkpoints") if (place / MANIFEST).is_file()]
    return Manifest.read(places[0]) if places else None


def _sequence_length(manifest: Manifest | None) -> int | None:
    """Of the text that a result was made with, if it was made with text."""
    return manifest.config.get("data", {}).get("sequence_length") if manifest else None


def _print_section(console: Console, title: str, content) -> None:
    if title:
        console.print()
        console.print(Text(title, style="bold"))
    console.print(Padding(content, (0, 0, 0, 2), expand=False))


def _fact_table(facts: dict[str, str]) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in facts.items():
        table.add_row(Text(name, style="dim"), Text(value))
    return table


def _shape_table(shapes: dict[str, ModelShape], sequence_length: int | None) -> Table:
    """Sizes, counts and switches, a column for each network."""
    table = Table(box=None, show_header=len(shapes) > 1, pad_edge=False)
    table.add_column()
    for name in shapes:
        table.add_column(name, justify="right")
    columns = [_describe(shape, sequence_length or shape.max_positions) for shape in shapes.values()]
    for name in columns[0]:
        table.add_row(Text(name, style="dim"), *(Text(column[name]) for column in columns))
    return table


def _describe(shape: ModelShape, sequence_length: int) -> dict[str, str]:
    values = {name: value for name, value in shape.to_dict().items() if name != "pattern"}
    layers = {"layers": str(shape.num_layers)} if shape.is_uniform else {"pattern": shape.pattern}
    return {
        "parameters": f"{num_parameters(shape):,}",
        "without embeddings": f"{num_parameters(shape, embeddings=False):,}",
        f"forward FLOPs per token of {sequence_length}": short(forward_flops_per_token(shape, sequence_length)),
        **layers,
        **{name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()},
    }


def _lineage(label: Text, manifest: Manifest, seen: set[str]) -> Tree:
    """The inputs of a result, and theirs, as long as they are where they were."""
    tree = Tree(label)
    for parent in manifest.parents:
        tree.add(_origin(parent, seen))
    return tree


def _origin(parent: Parent, seen: set[str]) -> Tree:
    path = Path(parent.path)
    label = Text(f"{parent.role}: {path} ").append(parent.fingerprint[:12], style="dim")
    if not path.exists():
        return Tree(label.append("  not there any more", style="yellow"))
    if fingerprint(path) != parent.fingerprint:
        return Tree(label.append("  changed since", style="yellow"))
    if parent.fingerprint in seen or not (path / MANIFEST).is_file():
        return Tree(label)
    seen.add(parent.fingerprint)
    return _lineage(label, Manifest.read(path), seen)
