"""The verb `inspect`: what a folder is, how large, and where it comes from, on the screen."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from rich.tree import Tree
from torch import Tensor

from minitron_megatron.checkpoint.huggingface import HuggingFaceFolder
from minitron_megatron.checkpoint.manifest import EVALUATION, MANIFEST, Manifest, Parent, fingerprint
from minitron_megatron.checkpoint.sharded import TRACKER, Checkpoint
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.config.schema import DepthSearch, InspectConfig, Unit
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.model.count import forward_flops_per_token, num_parameters
from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape
from minitron_megatron.plotting import short
from minitron_megatron.pruning.kept import kept_sublayers
from minitron_megatron.pruning.plan import FILE as PLAN
from minitron_megatron.pruning.plan import Plan, to_ranges
from minitron_megatron.pruning.scores import FILE as SCORES
from minitron_megatron.pruning.scores import Scores, descending
from minitron_megatron.report.compare import task_measures
from minitron_megatron.report.differences import comparable, differences, open_network
from minitron_megatron.report.gallery import Picture, loss_pictures, pruning_pictures, scores_of, write_pictures
from minitron_megatron.report.results import Evaluation, read_evaluation
from minitron_megatron.tracking import metrics

_KINDS = {ATTENTION: "attention", MLP: "MLP"}
_SHOWN = 8  # units that are missed least


@dataclass
class Found:
    """What is known of a folder.

    Attributes:
        kind: what it is, in words.
        shapes: the networks it speaks of, by what they are to it.
        facts: what else there is to say, in order.
        pictures: makes its figures, if it has any.
    """

    kind: str
    shapes: dict[str, ModelShape] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    pictures: Callable[[], list[Picture]] | None = None


def inspect(config: InspectConfig) -> None:
    """Print what lies at a path: kind, shape, counts, origin and settings; if asked for, write its figures.

    Raises:
        CheckpointError: it is nothing that this project writes, or not whole, or it and `other` are no networks.
        ConfigError: figures are asked for, and it has none.
    """
    path = Path(config.path)
    found = look_at(path)
    pair = [open_network(Path(name)) for name in (config.path, config.other)] if config.other else None
    pictures = found.pictures() if config.figures and found.pictures else []
    if config.figures and not pictures:
        raise ConfigError(
            [
                f"figures = {config.figures}: {found.kind} has none; scores, plans, pruned checkpoints and training "
                f"runs have"
            ]
        )
    manifest = _manifest(path if path.is_dir() else path.parent)
    # Output that goes into a file has no width, and broken lines cannot be searched.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(Text(f"{path}: {found.kind}", style="bold"))
    facts = {**found.facts, "on disk": f"{_size(path):,} bytes"}
    if manifest:
        facts |= {"rounded": "\n".join(rounded)} if (rounded := manifest.details.get("rounded")) else {}
        facts["version"] = manifest.version
    _print_section(console, "", _fact_table(facts))
    if found.shapes:
        _print_section(console, "network", _shape_table(found.shapes, _sequence_length(manifest)))
    if manifest:
        _print_section(console, "made from", _lineage(Text(str(path)), manifest, set()))
        settings = yaml.safe_dump(manifest.config, sort_keys=False, width=120)
        _print_section(console, "settings", Text(settings.rstrip()))
    if pair:
        _print_section(console, f"compared with {config.other}", _comparison(*pair))
    if config.figures:
        files = write_pictures(pictures, Path(config.figures))
        _print_section(console, "figures", Text("\n".join(map(str, files))))


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
    if path.suffix == ".json":
        return _plan(path)
    raise CheckpointError(
        f"path = {path} is nothing that is known here: looked for {', '.join(_READERS)}; name a folder that has one"
    )


def _checkpoint(folder: Path) -> Found:
    checkpoint = Checkpoint(folder)
    facts = {
        "iteration": checkpoint.folder.name.removeprefix("iter_"),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "weights": _storage(checkpoint),
    }
    found = Found("checkpoint", {"": checkpoint.shape}, facts)
    if (folder / PLAN).is_file():
        plan = _plan(folder)
        found = Found("pruned checkpoint", plan.shapes, facts | plan.facts, plan.pictures)
    return found


def _storage(checkpoint: Checkpoint) -> str:
    """How the weights lie on disk: a chunk is what one rank of the layout that wrote them had of a tensor, or less."""
    tensors = checkpoint.weights.values()
    chunks = [chunk for tensor in tensors for chunk in tensor.chunks]
    num_bytes, num_files = sum(chunk.length for chunk in chunks), len({chunk.path for chunk in chunks})
    form = "all layers in one tensor" if checkpoint.stacked else "a tensor for each layer"
    return f"{num_bytes:,} bytes in {len(tensors)} tensors, {len(chunks)} chunks and {num_files} files; {form}"


def _run(folder: Path) -> Found:
    found = _checkpoint(folder)
    found.kind = "training run" if (folder / MANIFEST).is_file() else "training run, not finished"
    lines = metrics.read_metrics(folder) if (folder / metrics.FILE).is_file() else []
    if lines:
        found.facts["last step"] = f"{lines[-1]['progress/step']} ({short(lines[-1]['progress/tokens'])} tokens)"
        found.facts |= {key: f"{value:.4f}" for key, value in lines[-1].items() if key.startswith(("loss/", "val/"))}
        found.pictures = lambda: loss_pictures({folder.name: folder})
    return found


def _scores(folder: Path) -> Found:
    found = Scores.read(folder)
    facts = {name: str(value) for name, value in found.settings.items()}
    facts |= _depth_facts(found) if found.depth else {"depth criteria": "none"}
    if "ffn" in found.rounds:  # that of depth alone is the order of a greedy search
        for name, rounds in found.rounds.items():
            counts = zip(*rounds.unique(return_counts=True), strict=True)
            facts[f"{name}: scored last"] = ", ".join(f"{count:,} in round {number}" for number, count in counts)
    return Found("scores", {"": found.shape}, facts, lambda: pruning_pictures(found))


def _depth_facts(found: Scores) -> dict[str, str]:
    """What was left out, how, and the units that are missed least."""
    depth = found.depth_settings
    search = {
        DepthSearch.SINGLE: f"each {depth.unit.value} by itself",
        DepthSearch.BLOCK: f"each block of {depth.drop} layers",
        DepthSearch.GREEDY: f"one {depth.unit.value} after another, {depth.drop} in all",
    }
    facts = {
        "depth criteria": ", ".join(found.depth),
        "depth search": f"{depth.search.value}: {search[depth.search]}",
        "protected": f"the first {depth.protect_first} and the last {depth.protect_last} layers",
    }
    if depth.search is DepthSearch.GREEDY:
        order = found.rounds["depth"].argsort()[: depth.drop]
        return facts | {"left out, in this order": _unit_names(found, order)}
    least = "blocks missed least begin at" if depth.search is DepthSearch.BLOCK else "missed least"
    rounds = found.rounds.get("depth")
    for name, values in found.depth.items():
        # What earlier rounds left out was missed less, whatever its score. NaN comes last.
        order = descending(-values, None if rounds is None else -rounds)
        order = order[: min(_SHOWN, values.isfinite().sum())]
        facts[f"{least} ({name})"] = _unit_names(found, order)
    return facts


def _unit_names(found: Scores, units: Tensor) -> str:
    """Layers by their numbers, sublayers with their kinds."""
    if found.depth_settings.unit is Unit.LAYER:
        return ", ".join(map(str, units.tolist()))
    pattern = found.shape.pattern
    return ", ".join(
        f"{_KINDS[pattern[position]]} {pattern[:position].count(pattern[position])}" for position in units.tolist()
    )


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
    evaluation = Evaluation.read(folder, folder.name)
    facts |= {measure.name: measure.cells[1] for measure in task_measures([evaluation], teacher=None)}
    return Found("evaluation", facts=facts)


def _plan(path: Path) -> Found:
    plan = Plan.read(path)
    gone = {
        kind: to_ranges(np.flatnonzero(~kept_sublayers(plan, kind)).tolist()) or "none" for kind in (ATTENTION, MLP)
    }
    if gone[ATTENTION] == gone[MLP]:
        facts = {"dropped layers": gone[MLP]}
    else:
        facts = {f"dropped {_KINDS[kind]} sublayers": numbers for kind, numbers in gone.items()}
    facts["merges heads"] = "yes" if plan.merge else "no"
    facts["for checkpoint"] = plan.checkpoint[:12] if plan.checkpoint else "any of that shape"
    shapes = {"before": plan.source, "after": plan.target}
    folder = path if path.is_dir() else path.parent
    return Found("plan", shapes, facts, lambda: pruning_pictures(scores_of(folder), plan))


def _huggingface(folder: Path) -> Found:
    source = HuggingFaceFolder(folder)
    return Found("Hugging Face folder", {"": source.shape}, {"dtype": str(source.dtype).removeprefix("torch.")})


# The file that tells what a folder is, and who reads it. A pruned checkpoint also holds a plan, so order matters.
_READERS: dict[str, Callable[[Path], Found]] = {
    TRACKER: _checkpoint,
    f"checkpoints/{TRACKER}": _run,
    SCORES: _scores,
    EVALUATION: _evaluation,
    "config.json": _huggingface,
    PLAN: _plan,
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
    whole = all(shape.is_uniform for shape in shapes.values())
    columns = [_describe(shape, sequence_length or shape.max_positions, whole) for shape in shapes.values()]
    for name in columns[0]:
        table.add_row(Text(name, style="dim"), *(Text(column[name]) for column in columns))
    return table


def _describe(shape: ModelShape, sequence_length: int, whole_layers: bool) -> dict[str, str]:
    values = {name: value for name, value in shape.to_dict().items() if name != "pattern"}
    if whole_layers:
        layers = {"layers": str(shape.num_layers)}
    else:
        layers = {f"{name} sublayers": str(len(shape.sublayers(kind))) for kind, name in _KINDS.items()}
        layers["pattern"] = shape.pattern
    return {
        "parameters": f"{num_parameters(shape):,}",
        "without embeddings": f"{num_parameters(shape, embeddings=False):,}",
        f"forward FLOPs per token of {sequence_length}": short(forward_flops_per_token(shape, sequence_length)),
        **layers,
        **{name: f"{value:g}" if isinstance(value, float) else str(value) for name, value in values.items()},
    }


def _comparison(first: TensorSource, second: TensorSource) -> Table | Text:
    """What of two shapes is not the same, or else the largest difference of each tensor."""
    table = Table(box=None, pad_edge=False)
    if not comparable(first, second):
        whole = first.shape.is_uniform and second.shape.is_uniform
        length = first.shape.max_positions
        columns = [_describe(source.shape, length, whole) for source in (first, second)]
        for header in ("", "this", "other", "other / this"):
            table.add_column(header, justify="right" if header else "left")
        for name in columns[0]:
            cells = [column[name] for column in columns]
            if cells[0] != cells[1]:
                table.add_row(Text(name, style="dim"), *map(Text, cells), _share(*cells))
        return table
    found = differences(first, second)
    if not any(difference.num_layers for difference in found):
        return Text("all tensors are equal")
    for header in ("tensor", "largest difference", "in layer", "layers that differ"):
        table.add_column(header, justify="left" if header == "tensor" else "right")
    for difference in found:
        layer = "" if difference.layer is None else str(difference.layer)
        count = "" if difference.layer is None else str(difference.num_layers)
        table.add_row(difference.name, f"{difference.largest:.3g}" if difference.num_layers else "none", layer, count)
    return table


def _share(before: str, after: str) -> str:
    """What is left of a count, in percent; nothing of what is no count."""
    before, after = before.replace(",", ""), after.replace(",", "")
    return f"{100 * int(after) / int(before):.1f}%" if before.isdigit() and after.isdigit() and int(before) else ""


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
