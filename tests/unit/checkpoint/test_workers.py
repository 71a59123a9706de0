"""Several processes write one checkpoint together: the same tensors, all or nothing, one error."""

import os
import signal
import subprocess
import sys
import time

import pytest

from minitron_megatron.checkpoint.convert import export, import_checkpoint
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.schema import ExportConfig, ImportConfig, PruneConfig, TargetConfig
from minitron_megatron.pruning.prune import prune
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf, random_scores
from tests.unit.checkpoint.test_dist_writer import assert_equal

MINITRON = [sys.executable, "-m", "minitron_megatron.cli"]
TARGET = ["target.layers=3", "target.hidden=40", "target.ffn=30", "target.heads=4", "parallel.tensor=2"]

# In rank 1 alone: what each way of failing makes of the last step of writing a file.
_STAND_IN = """
import os, signal, time

fsync = os.fsync

def stop(file):
    way = os.environ["WAY"]
    number = file if isinstance(file, int) else file.fileno()
    if not os.readlink(f"/proc/self/fd/{number}").startswith(os.environ["FOLDER"]):
        return fsync(file)  # such as the fingerprints that are remembered for all
    if way == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if way == "full":
        raise OSError(28, "No space left on device")
    folder = os.environ["FOLDER"]
    open(f"{folder}/asleep", "w").close()
    while not os.path.exists(f"{folder}/awake"):
        time.sleep(0.1)

if os.environ.get("RANK") == "1" and os.environ["WAY"] != "well":
    os.fsync = stop
"""


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Hugging Face folder, a checkpoint, and scores of it."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoint = Checkpoint(import_hf(folder, hf_model(**LLAMA)))
    random_scores(folder / "scores", checkpoint.network)
    return folder


@pytest.fixture(scope="module")
def processes(llama, tmp_path_factory):
    """`minitron prune` in several processes that end in different ways, and their folders; all at once, for speed."""
    found = {}
    for way in ("well", "killed", "full", "asleep"):
        folder = tmp_path_factory.mktemp(way)
        (folder / "stand-in").mkdir()
        (folder / "stand-in/sitecustomize.py").write_text(_STAND_IN)
        paths = os.pathsep.join([str(folder / "stand-in"), *sys.path])
        inputs = [f"checkpoint={llama / 'checkpoint'}", f"scores={llama / 'scores'}"]
        process = subprocess.Popen(
            [*MINITRON, "prune", *inputs, f"output={folder / 'pruned'}", *TARGET, "workers=2"],
            env={**os.environ, "PYTHONPATH": paths, "WAY": way, "FOLDER": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        found[way] = process, folder
    yield found
    for process, folder in found.values():
        (folder / "awake").touch()
        process.terminate()
        process.communicate(timeout=60)


def import_there(source, output):
    import_checkpoint(ImportConfig(str(source), str(output)))


def export_there(folder, output):
    export(ExportConfig(str(folder / "checkpoint"), str(output), max_shard_gb=3e-5))


def prune_there(folder, output):
    target = TargetConfig(layers=3, hidden=40, ffn=30, heads=4)
    prune(PruneConfig(str(folder / "checkpoint"), str(output), str(folder / "scores"), target=target))


def test_workers_write_the_same_tensors_as_one_process(llama, processes, tmp_path):
    prune_there(llama, tmp_path / "one")
    process, folder = processes["well"]
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    run_on_ranks(3, import_there, llama / "hf", tmp_path / "imported")
    for made, number, expected in (
        (folder / "pruned", 2, tmp_path / "one"),
        (tmp_path / "imported", 3, llama / "checkpoint"),
    ):
        found = Checkpoint(made)
        assert_equal(found, Checkpoint(expected))
        assert {path.name[2] for path in found.folder.glob("__[0-9]*.distcp")} == set("012"[:number])
        assert found.manifest.network == Checkpoint(expected).manifest.network
        assert found.manifest.details == Checkpoint(expected).manifest.details


def test_workers_export_the_same_files_as_one_process(llama, tmp_path):
    export_there(llama, tmp_path / "one")
    run_on_ranks(3, export_there, llama, tmp_path / "three")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert len([name for name in names if name.endswith(".safetensors")]) > 3
    assert {path.name for path in (tmp_path / "three").iterdir()} == names
    for name in names - {"manifest.json"}:
        assert (tmp_path / "three" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name


@pytest.mark.parametrize(
    "way, error, status",
    [
        ("killed", "minitron: rank 1 was killed by SIGKILL: it may have run out of memory", 1),
        ("full", "minitron prune: the disk of {} is full: free some space and run it again", 2),
    ],
)
def test_a_worker_that_fails_takes_all_down_with_one_error_and_leaves_nothing(way, error, status, processes):
    process, folder = processes[way]
    output, _ = process.communicate(timeout=600)
    # torch for CUDA says at times that there is none.
    *shown, last = [line for line in output.splitlines() if "No CUDA runtime" not in line]
    assert last.startswith(error.format(folder / "pruned")) and all("write chunks" in line for line in shown)
    assert process.returncode == status
    assert [path.name for path in folder.iterdir()] == ["stand-in"]


def test_workers_that_are_told_to_end_leave_nothing(processes):
    process, folder = processes["asleep"]
    while not (folder / "asleep").exists():
        time.sleep(0.1)
        assert process.poll() is None, process.communicate()
    assert (folder / ".pruned.partial").exists()
    process.send_signal(signal.SIGTERM)
    while (folder / ".pruned.partial").exists():  # removed by the other one, which does not wait any longer
        time.sleep(0.1)
    assert process.poll() is None
    (folder / "awake").touch()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert sorted(path.name for path in folder.iterdir()) == ["asleep", "awake", "stand-in"]
