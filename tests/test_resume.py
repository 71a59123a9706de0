"""A training run that is killed, at a step or while it saves, ends as if it had never been."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_megatron import cli
from minitron_megatron.checkpoint.dist_reader import TRACKER, Checkpoint
from minitron_megatron.model.parameters import layer_key, parameters
from tests.tiny import LLAMA, hf_model, import_hf, literate

STEPS, SAVE_EVERY = 8, 2
NOT_EXACT = ("time/", "throughput/", "memory/")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with a teacher, a student and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    import_hf(folder / "teacher", literate(hf_model(**LLAMA)))
    import_hf(folder / "student", hf_model(seed=1, **{**LLAMA, "num_hidden_layers": 3, "intermediate_size": 30}))
    generator = np.random.default_rng(0)
    documents = ("".join(generator.choice(list("abcdefgh"), 300)) for _ in range(20))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return folder


def arguments(inputs, output, *more):
    return [
        "distill",
        f"teacher={inputs}/teacher/checkpoint",
        f"student={inputs}/student/checkpoint",
        f"output={output}",
        f"steps={STEPS}",
        f"save_every={SAVE_EVERY}",
        "validate_every=4",
        "validate_batches=1",
        "global_batch=8",
        "micro_batch=4",
        "dtype=fp32",
        "loss.lm_weight=0.3",
        "optimizer={lr:1e-2,warmup_steps:2}",
        f"data={{text:[{inputs}/text.jsonl],cache_dir:{output.parent}/corpora,sequence_length:32}}",
        *more,
    ]


class Process:
    """The command line in a process of its own, with whatever processes it starts."""

    def __init__(self, inputs, output, *more):
        self.log = output.with_suffix(".log")
        command = [sys.executable, "-m", "minitron_megatron.cli", *arguments(inputs, output, *more)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, cwd=output.parent, start_new_session=True
            )

    def kill(self):
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def kill_each_when(conditions):
    """Kill every process at the moment when its condition first holds."""
    waiting, deadline = dict(conditions), time.monotonic() + 240
    while waiting:
        for process, condition in list(waiting.items()):
            if condition():
                process.kill()
                del waiting[process]
            else:
                assert process.process.poll() is None and time.monotonic() < deadline, process.log.read_text()
        time.sleep(0.002)


@pytest.fixture
def start():
    started = []

    def start(*run):
        started.append(Process(*run))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.fixture(scope="module")
def unkilled(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("unkilled") / "run"
    assert cli.main(arguments(inputs, output)) == 0
    return output


def lines(run):
    path = run / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def exact(run):
    """The metrics that depend on the arithmetic alone."""
    return [{k: v for k, v in json.loads(line).items() if not k.startswith(NOT_EXACT)} for line in lines(run)]


def saved_step(run):
    return int((run / "checkpoints" / TRACKER).read_text())


def assert_same_run(run, expected, tolerance=0.0):
    for found, line in zip(exact(run), exact(expected), strict=True):
        assert found == pytest.approx(line, rel=tolerance, abs=0)
    assert [line["progress/step"] for line in exact(run)] == list(range(1, STEPS + 1))
    found, whole = Checkpoint(run), Checkpoint(expected)
    assert found.iteration == whole.iteration == STEPS
    for param in parameters(whole.network):
        index = [np.arange(n) for n in param.shape]
        weights = found.read(param, index), whole.read(param, index)
        torch.testing.assert_close(*weights, rtol=tolerance, atol=tolerance, msg=layer_key(param))
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert names == ["huggingface", f"iter_{STEPS:07d}", TRACKER, "manifest.json"]
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in expected.iterdir())


def test_a_run_is_not_trivial(unkilled):
    """Or the comparisons below would say little."""
    losses = [line["loss/total"] for line in exact(unkilled)]
    assert losses[-1] < losses[0] - 0.1 and len(set(losses)) == STEPS
    assert [line["progress/step"] for line in exact(unkilled) if "val/total" in line] == [4, 8]


@pytest.mark.oldest
def test_a_killed_run_goes_on_as_if_nothing_had_been(inputs, unkilled, start, tmp_path, capsys):
    training, saving = tmp_path / "training/run", tmp_path / "saving/run"
    for run in (training, saving):
        run.parent.mkdir()
    partial = saving / f"checkpoints/.iter_{2 * SAVE_EVERY:07d}.partial"
    kill_each_when(
        {
            start(inputs, training): lambda: len(lines(training)) > SAVE_EVERY,
            start(inputs, saving): lambda: partial.exists() and any(partial.iterdir()),
        }
    )

    # While it saved, what it had saved before was still there and whole.
    assert partial.exists() and saved_step(saving) == Checkpoint(saving).iteration == SAVE_EVERY
    assert len(lines(saving)) == 2 * SAVE_EVERY
    assert SAVE_EVERY <= saved_step(training) < STEPS
    assert cli.main(arguments(inputs, saving, "optimizer.lr=2e-2")) == 2  # that would be another run
    assert "other settings or inputs (optimizer.lr was 0.01 and is 0.02): go back" in capsys.readouterr().err
    # A run may also go on in another layout, here one with two layers on the first stage and one on the last. Then
    # sums are taken in another order.
    wider = Path(shutil.copytree(saving, tmp_path / "wider/run"))
    on_four_ranks = start(inputs, wider, "parallel.tensor=2", "parallel.pipeline=2")

    # A kill may also come between two files. This is what it leaves: a checkpoint that is whole and not yet
    # announced, lines of steps that will be made again, and half a line.
    latest, unannounced = (training / f"checkpoints/iter_{saved_step(training) + n:07d}" for n in (0, SAVE_EVERY))
    shutil.rmtree(unannounced, ignore_errors=True)
    shutil.copytree(latest, unannounced)
    with open(training / "metrics.jsonl", "a") as metrics:
        later = {**json.loads(lines(training)[-1]), "loss/total": 99.0}
        metrics.writelines(json.dumps({**later, "progress/step": step}) + "\n" for step in (STEPS - 1, STEPS))
        metrics.write('{"progress/step": 1, "progress/tok')
    assert cli.main(arguments(inputs, training)) == 0
    assert_same_run(training, unkilled)

    assert cli.main(arguments(inputs, saving)) == 0
    assert_same_run(saving, unkilled)
    assert on_four_ranks.process.wait(timeout=240) == 0, on_four_ranks.log.read_text()
    assert exact(wider)[:SAVE_EVERY] == exact(unkilled)[:SAVE_EVERY]
    assert_same_run(wider, unkilled, tolerance=1e-3)


def test_a_finished_run_is_left_alone(inputs, unkilled, capsys):
    before = {path: path.stat().st_mtime_ns for path in unkilled.rglob("*")}
    assert cli.main(arguments(inputs, unkilled)) == 0
    assert cli.main(arguments(inputs, unkilled, "optimizer.lr=2e-2")) == 2
    assert "other settings or inputs (optimizer.lr was 0.01 and is 0.02): go back" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in unkilled.rglob("*")} == before


def test_a_folder_of_somebody_elses_is_never_taken_for_a_run(inputs, unkilled, tmp_path, capsys):
    """Least of all one with checkpoints, of which a run keeps the latest alone."""
    theirs = tmp_path / "theirs"
    shutil.copytree(unkilled / "checkpoints", theirs / "checkpoints")
    (theirs / "checkpoints/manifest.json").unlink()
    before = sorted(theirs.rglob("*"))
    assert cli.main(arguments(inputs, theirs)) == 2
    assert f"output = {theirs} exists and is not a run" in capsys.readouterr().err
    assert sorted(theirs.rglob("*")) == before
