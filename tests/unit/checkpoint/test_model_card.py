"""The model card of an exported network, read by `huggingface_hub`."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM

from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.checkpoint.convert import export, import_checkpoint
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.model_card import steps_to
from minitron_megatron.config.schema import ExportConfig, ImportConfig, PruneConfig, TargetConfig
from minitron_megatron.errors import CheckpointError
from minitron_megatron.pruning.prune import prune
from tests.tiny import LLAMA, hf_model, random_scores, save_hf

SOURCE_CARD = """---
license: other
license_name: community
language: en
---
# Somebody else's words
"""


def exported(folder, name):
    return export(ExportConfig(str(folder / name), str(folder / f"{name}-out")))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A model in Hugging Face's cache that was imported, pruned, evaluated and exported."""
    folder = tmp_path_factory.mktemp("run")
    source = save_hf(folder / "cache/models--some--Model-1B/snapshots/0123", hf_model(**LLAMA))
    (source / "README.md").write_text(SOURCE_CARD)
    (source / "LICENSE").write_text("as it pleases")
    import_checkpoint(ImportConfig(str(source), str(folder / "teacher")))
    checkpoint = Checkpoint(folder / "teacher")
    random_scores(folder / "scores", checkpoint.network)
    Manifest("scores", parents=[Parent.of("checkpoint", folder / "teacher")], config={"num_samples": 7}).write(
        folder / "scores"
    )
    target = TargetConfig(layers=3, hidden=40, ffn=30, heads=4)
    prune(PruneConfig(str(folder / "teacher"), str(folder / "pruned"), str(folder / "scores"), target=target))
    for name, loss in {"teacher": 1.25, "pruned": 2.5, "source": 9.0}.items():
        of = source if name == "source" else folder / name
        (folder / f"evaluate_{name}").mkdir()
        Manifest("evaluation", parents=[Parent.of("model", of)]).write(folder / f"evaluate_{name}")
        accuracy = {"acc": {"value": loss / 10, "stderr": 0.0125, "higher_is_better": True}}
        tasks = {"arc_easy": {"num_fewshot": 5, "metrics": accuracy}} if name == "pruned" else {}
        measured = {"heldout": {"loss": loss, "perplexity": 2.0, "num_tokens": 1234}, "tasks": tasks}
        (folder / f"evaluate_{name}/evaluation.json").write_text(json.dumps(measured))
    exported(folder, "pruned")
    return folder


def test_front_matter_and_licence_are_the_sources(run):
    card = ModelCard.load(run / "pruned-out/README.md")
    assert (card.data.library_name, card.data.base_model) == ("transformers", "some/Model-1B")
    assert (card.data.license, card.data.license_name) == ("other", "community")
    assert (run / "pruned-out/LICENSE").read_text() == "as it pleases"
    assert "Somebody else" not in card.content


def test_sizes_are_those_that_transformers_counts(run):
    lines = (run / "pruned-out/README.md").read_text().splitlines()
    models = [AutoModelForCausalLM.from_pretrained(run / name) for name in ("pruned-out",)]
    before = hf_model(**LLAMA).num_parameters()
    assert f"| parameters | {before:,} | {models[0].num_parameters():,} |" in lines
    for row in ("| layers | 4 | 3 |", "| hidden | 48 | 40 |", "| mlp.ffn_hidden_size | 44 | 30 |"):
        assert row in lines


def test_the_way_there_and_what_was_measured_on_it(run):
    lines = (run / "pruned-out/README.md").read_text().splitlines()
    titles = [line for line in lines if line.startswith("#")]
    assert titles[0] == "# some/Model-1B, pruned"
    assert titles[-3:] == ["### 1. Imported", "### 2. Scored", "### 3. Pruned"]
    assert "  hidden: 40" in lines and "num_samples: 7" in lines
    assert "| 1. imported | 1.2500 | 2.00 | 1,234 |" in lines and "| 3. pruned | 2.5000 | 2.00 | 1,234 |" in lines
    assert "| arc_easy | acc | 3. pruned | 0.2500 ± 0.0125 | 5 |" in lines
    assert not any("9.0000" in line for line in lines)  # of a folder that is none of these checkpoints


def test_a_source_that_says_nothing_gets_no_licence(run, tmp_path):
    for name in ("teacher", "teacher/manifest.json"):
        assert (run / name).exists()
    shutil.copytree(run / "teacher", tmp_path / "alone")
    (tmp_path / "alone/huggingface/README.md").unlink()
    (tmp_path / "alone/manifest.json").unlink()
    card = ModelCard.load(exported(tmp_path, "alone") / "README.md")
    assert card.data.license is None and card.data.base_model is None and "does not say how it was made" in card.content


@pytest.mark.parametrize(
    "manifest, name",
    [
        (Manifest("scores", config={"num_samples": 8, "target": {"ffn": 8}}, verb="score"), "scored"),
        (Manifest("checkpoint", config={"num_samples": 8, "target": {"ffn": 8}}, verb="score"), "pruned"),
        (Manifest("checkpoint", config={"source": "s"}, verb="prune"), "pruned"),
        (Manifest("checkpoint", config={}, verb="translate"), "checkpoint"),
        # Of versions that did not say the verb:
        (Manifest("scores", config={"num_samples": 8}), "scored"),
        (Manifest("checkpoint", config={"student": "s", "source": "s"}), "distilled"),
        (Manifest("checkpoint", config={"source": "s"}), "imported"),
        (Manifest("checkpoint"), "checkpoint"),
    ],
    ids=str,
)
def test_a_step_is_named_by_its_verb(manifest, name, tmp_path):
    manifest.write(tmp_path)
    assert [step.name for step in steps_to(Parent.of("checkpoint", tmp_path))] == [name]


def test_a_damaged_card_is_named(run, tmp_path):
    shutil.copytree(run / "teacher", tmp_path / "bad")
    (tmp_path / "bad/huggingface/README.md").write_text("---\n[\n---\n")
    with pytest.raises(CheckpointError, match="bad/huggingface/README.md cannot be read"):
        exported(tmp_path, "bad")
