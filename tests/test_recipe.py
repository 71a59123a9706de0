"""A whole recipe on a tiny model, as a user runs it."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.cli import main
from minitron_megatron.config.schema import EvaluateConfig
from minitron_megatron.launch.jobs import missing_inputs
from minitron_megatron.launching import ACTIONS
from minitron_megatron.tracking.metrics import read_metrics
from tests.offline_wandb import history, rows, sessions
from tests.tiny import tiny_inputs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return tiny_inputs(tmp_path_factory.mktemp("recipe"))


def arguments(inputs) -> list[str]:
    return [
        "compress",
        f"run_dir={inputs / 'run'}",
        f"source={inputs / 'source'}",
        'title="Tiny <model>"',
        "target.hidden=40",
        "target.layers=3",
        "target.heads=4",
        f"data.text=[{inputs / 'text.jsonl'}]",
        "data.sequence_length=16",
        "data.heldout_pct=20",
        "stages.scores.num_samples=10",
        # One stage in ranks of its own, the others in this process.
        "stages.scores.parallel.tensor=2",
        "stages.scores.dtype=fp32",
        "correction=before",
        "stages.corrected.steps=2",
        "stages.corrected.optimizer.warmup_steps=1",
        "stages.corrected.dtype=fp32",
        "stages.distilled.steps=3",
        "stages.distilled.optimizer.warmup_steps=1",
        "stages.distilled.dtype=bf16",  # from a teacher of another number format
        "stages.distilled.tracking={trackers:[wandb],mode:offline}",
        "stages.evaluate_teacher.generate_tokens=4",
        "stages.evaluate_pruned.generate_tokens=0",
        "stages.evaluate_distilled.generate_tokens=4",
    ]


def run(inputs):
    return subprocess.run(
        [sys.executable, "-m", "minitron_megatron.cli", *arguments(inputs)], cwd=ROOT, capture_output=True, text=True
    )


def test_a_recipe_runs_reports_and_skips_what_is_done(inputs):
    first = run(inputs)
    assert first.returncode == 0, first.stderr
    assert "distilled" in first.stdout
    run_dir = inputs / "run"
    page = (run_dir / "report.html").read_text()
    assert "Tiny &lt;model&gt;" in page
    assert (run_dir / "exported" / "model.safetensors").is_file()
    # The tracked run is still one run, and has the report's figures and results.
    ids, found = history(run_dir / "distilled")
    assert len(ids) == 1 and found == read_metrics(run_dir / "distilled")
    own, with_report = map(rows, sessions(run_dir / "distilled"))
    assert len(own) == 3 + 1 and len(with_report) == 3 + 2
    *_, figures, results = with_report
    drawn = {key.split("/")[1] for key in figures if key.startswith("figures/")}
    assert drawn == {path.stem for path in (run_dir / "figures").glob("*.png")}
    assert drawn >= {"before_after", "loss", "pruned_ffn"}
    for model in ("teacher", "distilled"):
        evaluation = json.loads((run_dir / f"evaluate/{model}/evaluation.json").read_text())
        assert results[f"evaluate/{model}/heldout/loss"] == evaluation["heldout"]["loss"]

    # The student's teacher is the corrected one.
    [teacher] = [parent.path for parent in Manifest.read(run_dir / "distilled").parents if parent.role == "teacher"]
    assert Path(teacher).is_relative_to(run_dir / "corrected")

    made = {path: path.stat().st_mtime_ns for path in run_dir.rglob("manifest.json")}
    assert len(made) >= 9
    (run_dir / "seconds.json").write_text('{"imported')  # which costs the report its times, and nothing else

    second = run(inputs)
    assert second.returncode == 0, second.stderr
    assert {path: path.stat().st_mtime_ns for path in run_dir.rglob("manifest.json")} == made
    assert second.stderr.count("skipped") == 9
    assert "seconds.json is not the times of the stages" in second.stderr
    assert len(sessions(run_dir / "distilled")) == 2


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if "minitron " in line]


@pytest.mark.parametrize("launched", [[], ["launch"]])
def test_a_stage_without_its_input_is_named_before_the_first_one_starts(launched, inputs, tmp_path, capsys):
    left_out = ["stages.distilled=null", "stages.evaluate_distilled=null"]
    assert main([*launched, *arguments(inputs), f"run_dir={tmp_path}/other", *left_out]) == 2
    said = f"stages.exported.checkpoint = {tmp_path}/other/distilled is not there, and no earlier stage makes it"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_text_is_no_place_in_the_folder_of_a_run():
    stages = {"evaluated": ("evaluate", EvaluateConfig("builtin:x", "./evaluated"))}
    assert missing_inputs(stages, ".") == []


@pytest.mark.parametrize("command", readme_commands())
def test_every_command_of_the_readme_composes(command, capsys):
    words = shlex.split(command, comments=True)
    words = words[words.index("minitron") + 1 :]
    if words[1] in ACTIONS:
        return
    assert main([*words, "--cfg"]) == 0, capsys.readouterr().err


def test_the_readme_names_targets_that_exist():
    targets = re.findall(r"^make (\w+)|`make ([\w.-]+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    targets = [name for pair in targets for name in pair if name and name != "PYTHON"]
    rules = re.findall(r"^([\w.-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert targets and set(targets) <= set(rules)
