"""The command line in processes of its own: what they import, write and end with, alone and as ranks."""

import os
import signal
import subprocess
import sys
import time

import pytest


def command(*arguments, **options):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-m", "minitron_megatron.cli", *arguments], **pipes, **options)


def environment(*paths, **variables):
    """This process's environment, the package importable from any folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *sys.path]), **variables}


@pytest.mark.parametrize("arguments", [["score", "num_sample=3"], ["compress", "experiment=nope"]])
def test_bad_settings_write_nothing_and_show_no_traceback(arguments, tmp_path):
    process = command(*arguments, cwd=tmp_path, env=environment())
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert all(line.startswith("minitron ") for line in err.splitlines())
    assert not list(tmp_path.iterdir())


def test_settings_are_checked_without_torch():
    code = "import sys, minitron_megatron.cli, minitron_megatron as m; dir(m); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


_STAND_IN = """
import logging, os, sys, time, types

def score(settings):
    from minitron_megatron.errors import CheckpointError
    rank = int(os.environ["RANK"])
    logging.getLogger("minitron_megatron.pruning").info("scoring")
    if settings.checkpoint == "all" or settings.checkpoint == "one" and rank == 1:
        raise CheckpointError(f"{settings.checkpoint} is no checkpoint")
    if settings.checkpoint == "defect" and rank == 1:
        raise ZeroDivisionError
    print("rank", rank, "of", os.environ["WORLD_SIZE"], "threads", os.environ["OMP_NUM_THREADS"], flush=True)
    if settings.checkpoint == "plugin":
        print("criterion of states", settings.axes["states"].criterion.value)
    elif settings.checkpoint != "good":
        time.sleep(120)

module = types.ModuleType("minitron_megatron.pruning.score")
module.score = score
sys.modules[module.__name__] = module
"""


_PLUGIN = """
from minitron_megatron.config.axes import Axis, register

register(Axis("states", "channels of the state.", __name__, "state", is_scored=True))
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Runs of two real ranks whose `score` ends in different ways, by the name of the way; all at once, for speed."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "sitecustomize.py").write_text(_STAND_IN)
    (folder / "their_plugin.py").write_text(_PLUGIN)
    of_plugin = "checkpoint: plugin\noutput: o\nstates: {criterion: random}\nparallel: {tensor: 2}\n"
    (folder / "score.yaml").write_text(f"{of_plugin}plugins: [their_plugin]\n")
    env = environment(folder, OMP_NUM_THREADS="3")
    ways = {way: [f"checkpoint={way}"] for way in ("good", "all", "one", "defect", "asleep")}
    ways["plugin"] = ["checkpoint=plugin", "plugins=[their_plugin]", "states.criterion=random"]
    runs = {
        way: command("score", *own, f"output=o_{way}", "parallel.tensor=2", cwd=folder, env=env)
        for way, own in ways.items()
    }
    runs["file"] = command("score", "--config", "score.yaml", cwd=folder, env=env)
    yield runs
    for run in runs.values():
        run.terminate()
        run.wait(timeout=60)


def test_ranks_run_and_the_first_one_logs(two_ranks):
    out, err = two_ranks["good"].communicate(timeout=120)
    assert two_ranks["good"].returncode == 0
    assert sorted(out.splitlines()) == ["rank 0 of 2 threads 3", "rank 1 of 2 threads 3"]
    assert err.count("scoring") == 1


@pytest.mark.parametrize("way", ["plugin", "file"])
def test_ranks_import_plugins_before_they_read_settings(two_ranks, way):
    out, err = two_ranks[way].communicate(timeout=120)
    assert two_ranks[way].returncode == 0, err
    assert out.splitlines().count("criterion of states random") == 2


@pytest.mark.parametrize("way", ["all", "one"])
def test_an_error_of_the_user_in_ranks_is_told_once(two_ranks, way):
    _, err = two_ranks[way].communicate(timeout=120)
    assert two_ranks[way].returncode == 2, err
    assert [line for line in err.splitlines() if "scoring" not in line] == [f"minitron score: {way} is no checkpoint"]


def test_a_defect_in_a_rank_keeps_its_traceback(two_ranks):
    _, err = two_ranks["defect"].communicate(timeout=120)
    assert two_ranks["defect"].returncode == 1
    assert "Traceback" in err and "ZeroDivisionError" in err


def test_a_signal_reaches_the_ranks(two_ranks):
    run = two_ranks["asleep"]
    for _ in range(2):
        assert run.stdout.readline().startswith("rank")
    run.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert run.wait(timeout=60) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 30  # the ranks would sleep for two minutes


MINITRON = [sys.executable, "-m", "minitron_megatron.cli"]


@pytest.mark.parametrize(
    "arguments", [["distill", "--help"], ["--help"], ["score", "checkpoint=c", "output=o", "--cfg"], ["--version"]]
)
def test_a_reader_that_has_left_ends_it_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*MINITRON, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 128 + signal.SIGPIPE)


UNGUARDED = """
import minitron_megatron
from minitron_megatron.config.schema import DistillConfig
{}minitron_megatron.distill(DistillConfig(student="s", teacher="t", output="o"))
"""
SPAWNING = """
import multiprocessing
import minitron_megatron
from minitron_megatron.config.schema import ScoreConfig
if multiprocessing.current_process().name == "MainProcess":
    multiprocessing.get_context("spawn").Process(target=print).start()
else:
    minitron_megatron.score(ScoreConfig("c", "o"))
"""


@pytest.mark.parametrize(
    "code, is_refused",
    [
        (UNGUARDED.format(""), True),
        (UNGUARDED.format("if True:\n    "), True),
        (UNGUARDED.format("if __name__ == '__main__':\n    "), False),
        (SPAWNING, True),
    ],
)
def test_a_script_without_the_main_guard_is_told_at_once(code, is_refused, tmp_path):
    (tmp_path / "script.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    said = 'call it below `if __name__ == "__main__":`'
    assert (said in done.stderr) == is_refused, done.stderr
    assert is_refused or "s does not exist" in done.stderr
