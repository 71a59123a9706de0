"""Describes what lies in a folder: checkpoints, runs, scores, plans, evaluations and Hugging Face folders."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minitron_megatron.artifacts.manifest import EVALUATION, MANIFEST
from minitron_megatron.checkpoint.dist_reader import TRACKER, Checkpoint
from minitron_megatron.checkpoint.huggingface import HuggingFaceFolder
from minitron_megatron.checkpoint.sparsity_facts import MatrixFacts, sparsity_facts
from minitron_megatron.config.schema import DepthSearch, Unit
from minitron_megatron.distillation.prediction_cache import INDEX as PREDICTIONS
from minitron_megatron.distillation.prediction_cache import PredictionCache
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.axes import HIDDEN
from minitron_megatron.model.network import Network
from minitron_megatron.plotting import short
from minitron_megatron.pruning.plan import FILE as PLAN
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.ranges import to_ranges
from minitron_megatron.pruning.scores import DEPTH, Scores, descending
from minitron_megatron.pruning.scores import FILE as SCORES
from minitron_megatron.report.compare import task_measures
from minitron_megatron.report.gallery import Picture, loss_pictures, pruning_pictures, scores_of
from minitron_megatron.report.results import Evaluation, read_evaluation
from minitron_megatron.tracking import metrics

_SHOWN = 8  # least important units


@dataclass
class Description:
    """What a folder holds.

    Attributes:
        kind: in words.
        networks: by role; empty for its only one.
        facts: other facts by name, in order.
        pictures: makes its figures, if it has any.
        matrices: its sparse or quantised matrices.
    """

    kind: str
    networks: dict[str, Network] = field(default_factory=dict)
    facts: dict[str, str] = field(default_factory=dict)
    pictures: Callable[[], list[Picture]] | None = None
    matrices: list[MatrixFacts] = field(default_factory=list)


def describe(path: Path) -> Description:
    """Describes what lies at `path`: a folder, or the file that identifies its folder.

    Raises:
        CheckpointError: it is unknown, or not whole.
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
        f"path = {path} is not a known result: looked for {', '.join(_READERS)}; name a folder that has one"
    )


def _checkpoint(folder: Path) -> Description:
    checkpoint = Checkpoint(folder)
    facts = {
        "iteration": checkpoint.folder.name.removeprefix("iter_"),
        "dtype": str(checkpoint.dtype).removeprefix("torch."),
        "weights": _storage(checkpoint),
    }
    matrices = list(sparsity_facts(checkpoint))
    facts |= _sparsity(matrices)
    if scales := checkpoint.cache_scales:
        facts["KV cache"] = f"{len(scales)} scales for 8-bit floats"
    if not (folder / PLAN).is_file():
        kind = " and ".join(
            [*["sparse"] * any(own.density is not None for own in matrices), *["quantised"] * bool(checkpoint.scales)]
        )
        return Description(f"{kind} checkpoint".strip(), {"": checkpoint.network}, facts, matrices=matrices)
    plan = _plan(folder)
    return Description("pruned checkpoint", plan.networks, facts | plan.facts, plan.pictures, matrices)


def _sparsity(matrices: list[MatrixFacts]) -> dict[str, str]:
    """Describes the masks and scales of all matrices together."""
    facts = {}
    masked = [own for own in matrices if own.density is not None]
    if masked:
        count = sum(math.prod(own.param.shape) for own in masked)
        kept = sum(own.density * math.prod(own.param.shape) for own in masked if own.density is not None)
        broken = sum(own.broken or 0 for own in masked)
        facts["zeros"] = f"{100 * (1 - kept / count):.2f}% of {len(masked)} matrices"
        facts["groups of four with more than two weights"] = f"{broken:,}"
    if groups := {own.group for own in matrices if own.group}:
        facts["columns to a scale"] = ", ".join(map(str, sorted(groups)))
    return facts


def _storage(checkpoint: Checkpoint) -> str:
    """Describes how the weights lie on disk: a chunk is at most one rank's part of a tensor."""
    tensors = checkpoint.weights.values()
    chunks = [chunk for tensor in tensors for chunk in tensor.chunks]
    num_bytes, num_files = sum(chunk.length for chunk in chunks), len({chunk.path for chunk in chunks})
    form = "all layers in one tensor" if checkpoint.stacked else "a tensor for each layer"
    return f"{num_bytes:,} bytes in {len(tensors)} tensors, {len(chunks)} chunks and {num_files} files; {form}"


def _run(folder: Path) -> Description:
    description = _checkpoint(folder)
    description.kind = "training run" if (folder / MANIFEST).is_file() else "training run, not finished"
    lines = metrics.read_metrics(folder) if (folder / metrics.FILE).is_file() else []
    if lines:
        last = lines[-1]
        description.facts["last step"] = f"{last['progress/step']} ({short(last['progress/tokens'])} tokens)"
        description.facts |= {key: f"{value:.4f}" for key, value in last.items() if key.startswith(("loss/", "val/"))}
        description.pictures = lambda: loss_pictures({folder.name: folder})
    return description


def _scores(folder: Path) -> Description:
    scores = Scores.read(folder)
    facts = {name: str(value) for name, value in scores.settings.items()}
    facts |= _depth_facts(scores) if scores.depth else {"depth criteria": "none"}
    if HIDDEN.name in scores.rounds:  # `depth` by itself is the order of a greedy search
        elements = {name: torch.cat([own.flatten() for own in rows]) for name, rows in scores.element_rounds.items()}
        for name, rounds in {**scores.rounds, **elements}.items():
            counts = zip(*rounds.unique(return_counts=True), strict=True)
            facts[f"{name}: scored last"] = ", ".join(f"{count:,} in round {number}" for number, count in counts)
    return Description("scores", {"": scores.network}, facts, lambda: pruning_pictures(scores))


def _depth_facts(scores: Scores) -> dict[str, str]:
    """Describes what was skipped, how, and which units are the least important."""
    depth = scores.depth_settings
    search = {
        DepthSearch.SINGLE: f"each {depth.unit.value} by itself",
        DepthSearch.BLOCK: f"each block of {depth.drop} layers",
        DepthSearch.GREEDY: f"one {depth.unit.value} after another, {depth.drop} in all",
    }
    facts = {
        "depth criteria": ", ".join(scores.depth),
        "depth search": f"{depth.search.value}: {search[depth.search]}",
        "protected": f"the first {depth.protect_first} and the last {depth.protect_last} layers",
    }
    if depth.search is DepthSearch.GREEDY:
        gone = scores.rounds[DEPTH].argsort()[: depth.drop]
        return facts | {"left out, in this order": _unit_names(scores, gone.tolist())}
    least = "least important blocks begin at" if depth.search is DepthSearch.BLOCK else "least important"
    rounds = scores.rounds.get(DEPTH)
    for name, values in scores.depth.items():
        # Earlier rounds come first, whatever the score; NaN comes last.
        order = descending(-values, None if rounds is None else -rounds)
        shown = order[: min(_SHOWN, int(values.isfinite().sum()))]
        facts[f"{least} ({name})"] = _unit_names(scores, shown.tolist())
    return facts


def _unit_names(scores: Scores, units: list[int]) -> str:
    """Names layers by number, and sublayers by their layer."""
    if scores.depth_settings.unit is Unit.LAYER:
        return ", ".join(map(str, units))
    return ", ".join(map(scores.network.describe, units))


def _evaluation(folder: Path) -> Description:
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
    return Description("evaluation", facts=facts)


def _plan(path: Path) -> Description:
    plan = Plan.read(path)
    facts = _dropped(plan)
    for kind in plan.source.kinds:
        if kind.merged:
            positions = plan.source.positions(kind)
            facts[f"merges {kind.merged}"] = "yes" if any(position in plan.merge for position in positions) else "no"
    facts["for checkpoint"] = plan.checkpoint[:12] if plan.checkpoint else "any of that network"
    networks = {"before": plan.source, "after": plan.target}
    folder = path if path.is_dir() else path.parent
    return Description("plan", networks, facts, lambda: pruning_pictures(scores_of(folder), plan))


def _dropped(plan: Plan) -> dict[str, str]:
    """Lists the layers that are dropped as a whole, or else the dropped sublayers of every kind by layer."""
    source, kept = plan.source, set(plan.sublayers)
    layers = [number for number, positions in enumerate(source.layers) if kept.isdisjoint(positions)]
    if sum(len(source.layers[number]) for number in layers) == len(source.sublayers) - len(kept):
        return {"dropped layers": to_ranges(layers) or "none"}
    dropped = {}
    for kind in source.kinds:
        numbers = [source.layer_of(position) for position in source.positions(kind) if position not in kept]
        dropped[f"dropped {kind.title} sublayers"] = to_ranges(numbers) or "none"
    return dropped


def _huggingface(folder: Path) -> Description:
    source = HuggingFaceFolder(folder)
    dtype = str(source.dtype).removeprefix("torch.")
    return Description("Hugging Face folder", {"": source.network}, {"dtype": dtype})


def _predictions(folder: Path) -> Description:
    cache = PredictionCache(folder)
    index = cache.index
    facts = {
        "form": f"{index.form.value}{f', {index.most} for a position' * bool(index.most)}",
        "samples": ", ".join(f"{split.num_samples:,} {name}" for name, split in index.splits.items()),
        "tokens of a sample": f"{index.sequence_length:,}",
        "temperature": f"{index.temperature:g}",
        "bytes a token": f"{index.bytes_per_token(folder):,.1f}",
    }
    return Description("cache of a teacher's predictions", {"": cache.network}, facts)


# The file that identifies a kind of folder, and its reader. A pruned checkpoint also holds a plan, so order matters.
_READERS: dict[str, Callable[[Path], Description]] = {
    TRACKER: _checkpoint,
    f"checkpoints/{TRACKER}": _run,
    SCORES: _scores,
    EVALUATION: _evaluation,
    PREDICTIONS: _predictions,
    "config.json": _huggingface,
    PLAN: _plan,
}
