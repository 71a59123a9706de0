"""Writes the model card of an exported network: its sizes, its lineage and settings, and evaluations."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from minitron_megatron.artifacts.lineage import in_creation_order, origin_of
from minitron_megatron.artifacts.manifest import EVALUATION, Manifest, Parent
from minitron_megatron.checkpoint.sparsity_facts import MatrixFacts
from minitron_megatron.errors import CheckpointError
from minitron_megatron.files import read_json
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.facts import network_facts
from minitron_megatron.model.network import Network

CARD = "README.md"
_LICENSE = ("license", "license_name", "license_link")
_STEP_NAMES = {
    "distill": "distilled",
    "prune": "pruned",
    "sparsify": "sparsified",
    "quantize": "quantised",
    "score": "scored",
    "import": "imported",
}
# Those of them that a title names.
_IN_TITLE = ("pruned", "sparsified", "distilled", "quantised")
# Settings by which the verb of an earlier version's result is recognised; the first that is present counts.
_VERB_BY_SETTING = {"student": "distill", "target": "prune", "num_samples": "score", "source": "import"}


@dataclass
class Step:
    """One step in the making of a network.

    Attributes:
        name: of what it did, such as "pruned".
        result: what it made.
        manifest: of its result.
    """

    name: str
    result: Parent
    manifest: Manifest


def steps_to(result: Parent) -> list[Step]:
    """Returns the steps that led to a result, first to last, as far back as their outputs are still in place."""
    return [
        Step(_step_name(origin.manifest), origin.parent, origin.manifest)
        for origin in in_creation_order([origin_of(result)])
        if origin.manifest
    ]


def _step_name(manifest: Manifest) -> str:
    if manifest.verb == "score" and manifest.kind == "checkpoint":  # between two rounds of scoring
        return _STEP_NAMES["prune"]
    guesses = (verb for setting, verb in _VERB_BY_SETTING.items() if setting in manifest.config)
    return _STEP_NAMES.get(manifest.verb or next(guesses, ""), manifest.kind)


def model_card(
    checkpoint: Parent,
    network: Network,
    hf_assets: Path,
    matrices: Sequence[MatrixFacts] = (),
    num_cache_scales: int = 0,
) -> str:
    """Returns the text of a `README.md`, with the front matter that Hugging Face reads.

    The licence is that of the source's model card, if it has one.

    Args:
        checkpoint: that is exported.
        network: of the checkpoint.
        hf_assets: folder with the source's model card, if there is one.
        matrices: its sparse and quantised matrices.
        num_cache_scales: scales of its KV cache that are exported.

    Raises:
        CheckpointError: the front matter of the source's card cannot be read.
    """
    steps = steps_to(checkpoint)
    first = next((step for step in steps if step.name == "imported"), None)
    source = Path(first.manifest.parents[0].path) if first else None
    front = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=base_model(source) if source else None,
        tags=["minitron", *(name for name in _IN_TITLE if any(step.name == name for step in steps))],
        **license_of(hf_assets / CARD),
    )
    before = Network.from_dict(first.manifest.network) if first and first.manifest.network else network
    title = " and ".join(dict.fromkeys(step.name for step in steps if step.name in _IN_TITLE))
    name = base_model(source) if source else Path(checkpoint.path).name
    paragraphs = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name}{f', {title}' if title else ''}",
        f"A network of {num_parameters(network):,} parameters, written by minitron_megatron.",
        "## Size",
        _size_table(before, network),
    ]
    if matrices:
        paragraphs += ["## Sparsity and rounding", _matrix_table(matrices)]
    if num_cache_scales:
        paragraphs += [
            "## KV cache",
            f"Calibrated for keys and values in 8-bit floats (e4m3): {num_cache_scales} scales, one for the keys and "
            f"one for the values of each layer.",
        ]
    if measured := _evaluations(Path(checkpoint.path), steps):
        paragraphs += ["## Evaluation", "The loss is of held-out text of the sources named below.", *measured]
    paragraphs += ["## How it was made"]
    paragraphs += [paragraph for number, step in enumerate(steps, start=1) for paragraph in _step(number, step)]
    if not steps:
        paragraphs.append(f"From the checkpoint `{Path(checkpoint.path).name}`, which does not say how it was made.")
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def _step(number: int, step: Step) -> list[str]:
    """Returns the paragraphs that tell of a step."""
    inputs = [f"- {p.role}: `{Path(p.path).name}` ({p.fingerprint[:12]})" for p in step.manifest.parents]
    settings = yaml.safe_dump(step.manifest.config, sort_keys=False, width=120).rstrip()
    parameters = step.manifest.details.get("parameters")
    count = f"{parameters:,} parameters. " if parameters else ""
    return [
        f"### {number}. {step.name.capitalize()}",
        f"{count}Fingerprint {step.result.fingerprint[:12]}, minitron_megatron {step.manifest.version}.",
        "\n".join(inputs),
        f"```yaml\n{settings}\n```",
    ]


def base_model(source: Path) -> str:
    """Returns the name of an imported model: its id, if it is in Hugging Face's cache, or else its folder's name."""
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{source}/")
    return "/".join(cached.groups()) if cached else source.stem if source.suffix == ".gguf" else source.name


def license_of(card: Path) -> dict[str, Any]:
    """Returns the front matter's licence in a source's model card, whatever the encoding of the rest.

    Raises:
        CheckpointError: the front matter cannot be read.
    """
    if not card.is_file():
        return {}
    try:
        text = card.read_bytes().decode("utf-8-sig", errors="replace")
        values = ModelCard(text, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as e:
        raise CheckpointError(f"the front matter of {card} cannot be read: {e}") from e
    return {key: values[key] for key in _LICENSE if values.get(key)}


def _size_table(before: Network, after: Network) -> str:
    columns = [network_facts(network) for network in (before, after)]
    rows = [(name, *(column.get(name, "") for column in columns)) for name in columns[0]]
    return _table(["", "before", "after"], rows)


def _matrix_table(matrices: Sequence[MatrixFacts]) -> str:
    """Returns a row for each layer: share of zeros, groups of four with more than two weights, columns to a scale."""
    rows = []
    for number in sorted({own.param.layer for own in matrices if own.param.layer is not None}):
        own = [facts for facts in matrices if facts.param.layer == number]
        masked = [facts for facts in own if facts.density is not None]
        count = sum(math.prod(facts.param.shape) for facts in masked)
        kept = sum(facts.density * math.prod(facts.param.shape) for facts in masked if facts.density is not None)
        errors = [facts.error for facts in own if facts.error is not None]
        groups = sorted({facts.group for facts in own if facts.group})
        rows.append(
            (
                str(number),
                f"{100 * (1 - kept / count):.2f}%" if count else "",
                str(sum(facts.broken or 0 for facts in masked)) if masked else "",
                ", ".join(map(str, groups)),
                f"{max(errors):.4f}" if errors else "",
            )
        )
    header = ["layer", "zeros", "groups of four with more than two weights", "columns to a scale", "largest error"]
    return _table(header, rows)


def _evaluations(checkpoint: Path, steps: list[Step]) -> list[str]:
    """Returns tables of evaluations of the steps' networks, from the folders beside the checkpoint."""
    run = checkpoint.parent.parent if checkpoint.name in ("checkpoints", "best") else checkpoint.parent
    losses: list[tuple[str, ...]] = []
    tasks: list[tuple[str, ...]] = []
    for file in sorted(run.glob(f"*/{EVALUATION}")):
        model = Manifest.read(file.parent).parent("model")
        if model and (name := _numbered_name(model, steps)):
            evaluation = read_json(file, "an evaluation")
            text = evaluation["heldout"]
            losses.append((name, f"{text['loss']:.4f}", f"{text['perplexity']:,.2f}", f"{text['num_tokens']:,}"))
            for task, values in evaluation["tasks"].items():
                shots = "" if values["num_fewshot"] is None else str(values["num_fewshot"])
                for metric, measured in values["metrics"].items():
                    error = "" if measured["stderr"] is None else f" ± {measured['stderr']:.4f}"
                    tasks.append((task, metric, name, f"{measured['value']:.4f}{error}", shots))
    tables = [
        (["model", "loss (nats per token)", "perplexity", "tokens"], losses),
        (["task of lm-eval", "metric", "model", "value", "few-shot"], tasks),
    ]
    return [_table(header, sorted(rows)) for header, rows in tables if rows]


def _numbered_name(model: Parent, steps: list[Step]) -> str | None:
    """Returns the number and name of the step that made a model, if one of them did."""
    makers = (number for number, step in enumerate(steps) if step.result.matches(model.fingerprint))
    number = next(makers, None)
    return None if number is None else f"{number + 1}. {steps[number].name}"


def _table(header: list[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])
