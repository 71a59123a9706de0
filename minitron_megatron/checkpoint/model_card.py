"""The model card of an exported network: what it is, what it was made from and how, and what was measured of it."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from minitron_megatron.artifacts.files import read_json
from minitron_megatron.artifacts.lineage import makers_first, origin_of
from minitron_megatron.artifacts.manifest import EVALUATION, Manifest, Parent
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.facts import network_facts
from minitron_megatron.model.network import Network

CARD = "README.md"
_LICENSE = ("license", "license_name", "license_link")
_DONE = {"distill": "distilled", "prune": "pruned", "score": "scored", "import": "imported"}
# Settings that say which verb made a result of a version that did not say it; the first that a result has is it.
_VERB_BY_SETTING = {"student": "distill", "target": "prune", "num_samples": "score", "source": "import"}


@dataclass
class Step:
    """One stage on the way to a network.

    Attributes:
        name: what it did.
        fingerprint: of what it made.
        manifest: of what it made.
    """

    name: str
    fingerprint: str
    manifest: Manifest


def steps_to(result: Parent) -> list[Step]:
    """The stages that led to a result, first to last, as far back as their outputs are where they were."""
    return [
        Step(_what_was_done(origin.manifest), origin.parent.fingerprint, origin.manifest)
        for origin in makers_first([origin_of(result)])
        if origin.manifest
    ]


def _what_was_done(manifest: Manifest) -> str:
    if manifest.verb == "score" and manifest.kind == "checkpoint":  # between two rounds of scoring
        return _DONE["prune"]
    guesses = (verb for setting, verb in _VERB_BY_SETTING.items() if setting in manifest.config)
    return _DONE.get(manifest.verb or next(guesses, ""), manifest.kind)


def model_card(checkpoint: Parent, network: Network, hf_assets: Path) -> str:
    """The text of a `README.md`, with the front matter that Hugging Face reads.

    The licence is the source's, if that has a model card of its own that says it, and none else.

    Args:
        checkpoint: that is exported.
        network: that it holds.
        hf_assets: folder with the source's model card, where there is one.

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
        tags=["minitron", "pruned"] if any(step.name == "pruned" for step in steps) else ["minitron"],
        **_license_of(hf_assets / CARD),
    )
    before = Network.from_dict(first.manifest.network) if first and first.manifest.network else network
    title = " and ".join(dict.fromkeys(step.name for step in steps if step.name in ("pruned", "distilled")))
    name = base_model(source) if source else Path(checkpoint.path).name
    paragraphs = [
        f"---\n{front.to_yaml()}\n---",
        f"# {name}{f', {title}' if title else ''}",
        f"A network of {num_parameters(network):,} parameters, written by minitron_megatron.",
        "## Size",
        _size_table(before, network),
    ]
    if measured := _evaluations(Path(checkpoint.path), steps):
        paragraphs += ["## Evaluation", "The loss is of held-out text of the sources named below.", *measured]
    paragraphs += ["## How it was made"]
    for number, step in enumerate(steps, start=1):
        inputs = [f"- {p.role}: `{Path(p.path).name}` ({p.fingerprint[:12]})" for p in step.manifest.parents]
        settings = yaml.safe_dump(step.manifest.config, sort_keys=False, width=120).rstrip()
        parameters = step.manifest.details.get("parameters")
        count = f"{parameters:,} parameters. " if parameters else ""
        paragraphs += [
            f"### {number}. {step.name.capitalize()}",
            f"{count}Fingerprint {step.fingerprint[:12]}, minitron_megatron {step.manifest.version}.",
            "\n".join(inputs),
            f"```yaml\n{settings}\n```",
        ]
    if not steps:
        paragraphs.append(f"From the checkpoint `{Path(checkpoint.path).name}`, which does not say how it was made.")
    return "\n\n".join(paragraph for paragraph in paragraphs if paragraph) + "\n"


def base_model(source: Path) -> str:
    """A name for the model that was imported: its id, where it lies in Hugging Face's cache, or else its folder's."""
    cached = re.search(r"models--([^/]+)--([^/]+)/snapshots/", f"{source}/")
    return "/".join(cached.groups()) if cached else source.stem if source.suffix == ".gguf" else source.name


def _license_of(card: Path) -> dict[str, Any]:
    if not card.is_file():
        return {}
    try:
        values = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
    except (ValueError, yaml.YAMLError) as e:
        raise CheckpointError(f"the front matter of {card} cannot be read: {e}") from e
    return {key: values[key] for key in _LICENSE if values.get(key)}


def _size_table(before: Network, after: Network) -> str:
    columns = [network_facts(network) for network in (before, after)]
    rows = [(name, *(column.get(name, "") for column in columns)) for name in columns[0]]
    return _table(["", "before", "after"], rows)


def _evaluations(checkpoint: Path, steps: list[Step]) -> list[str]:
    """Tables of what was measured of the networks on the way, from the folders beside the checkpoint's."""
    names = {step.fingerprint: f"{number}. {step.name}" for number, step in enumerate(steps, start=1)}
    run = checkpoint.parent.parent if checkpoint.name in ("checkpoints", "best") else checkpoint.parent
    losses: list[tuple[str, ...]] = []
    tasks: list[tuple[str, ...]] = []
    for file in sorted(run.glob(f"*/{EVALUATION}")):
        model = Manifest.read(file.parent).parent("model")
        if model and (name := names.get(model.fingerprint)):
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


def _table(header: list[str], rows: Iterable[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])
