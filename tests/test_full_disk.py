"""Every verb on a disk that is really full: one line names it, nothing half-written stays, and the command goes on."""

import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from minitron_megatron import cli
from minitron_megatron.artifacts import output
from minitron_megatron.checkpoint.dist_reader import TRACKER, Checkpoint
from tests.tiny import tiny_inputs

PAGE = 4096
DATA = "data.text=[@text.jsonl] data.sequence_length=16 data.heldout_pct=20"
CACHED = f"{DATA} data.cache_dir=@corpora"
# `@` stands for the folder of inputs, `%` for the disk.
IMPORT = "import source=@source output=%/out"
SCORE = f"score checkpoint=@checkpoint output=%/out num_samples=4 {CACHED}"
PRUNE = "prune checkpoint=@checkpoint scores=@scores output=%/out target.ffn=30"
EVALUATE = f"evaluate model=@checkpoint output=%/out generate_tokens=0 {CACHED}"
EXPORT = "export checkpoint=@checkpoint output=%/out"
COMPARE = "compare evaluations=[@evaluation,@evaluation] output=%/out"
SHORT = "stages.distilled=null stages.evaluate_distilled=null stages.exported.checkpoint=%/out/pruned"
RECIPE = f"source=@source target.ffn=30 stages.scores.num_samples=4 {SHORT}"
COMPRESS = f"compress run_dir=%/out {RECIPE} {CACHED}"
VERBS = [IMPORT, SCORE, PRUNE, EVALUATE, EXPORT, COMPARE, COMPRESS, f"launch {PRUNE}"]


def settings(command: str, inputs: Path, disk: Path) -> list[str]:
    return command.replace("@", f"{inputs}/").replace("%", str(disk)).split()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tiny_inputs(tmp_path_factory.mktemp("full_disk"))
    for command, made in ((IMPORT, "checkpoint"), (SCORE, "scores"), (EVALUATE, "evaluation")):
        assert cli.main(settings(command.replace("%/out", f"@{made}"), folder, folder)) == 0
    return folder


@pytest.fixture
def disk(tmp_path):
    """A small disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path, room: int) -> Path:
    """A file that leaves `room` bytes of a disk."""
    file = disk / "filler"
    with suppress(OSError), open(file, "wb", buffering=0) as f:
        while f.write(bytes(PAGE)):
            pass
    with open(file, "r+b") as f:
        f.truncate(file.stat().st_size - room)
    return file


@pytest.mark.parametrize("command", VERBS, ids=lambda command: command.split()[0])
def test_a_verb_names_the_disk_that_is_full_and_goes_on_when_it_is_not(command, inputs, disk, capsys):
    verb = command.split()[0]
    filler = fill(disk, room=2 * PAGE)
    assert cli.main(settings(command, inputs, disk)) == 2
    error = capsys.readouterr().err
    [told] = [line for line in error.splitlines() if line.startswith(f"minitron {verb}: ")]
    assert "Traceback" not in error and str(disk) in told and ("is full" in told or " MB free" in told), told
    if verb not in ("compare", "compress", "launch"):  # whose folders are made file by file
        assert list(disk.iterdir()) == [filler]
    filler.unlink()
    assert cli.main(settings(command, inputs, disk)) == 0


@pytest.mark.parametrize("command", [SCORE, EVALUATE], ids=lambda command: command.split()[0])
def test_the_disk_of_the_cache_is_told_from_that_of_the_output(command, inputs, disk, tmp_path, capsys):
    command = command.replace("%/out", str(tmp_path / "out")).replace(CACHED, f"{DATA} data.cache_dir=%/corpora")
    fill(disk, room=2 * PAGE)
    assert cli.main(settings(command, inputs, disk)) == 2
    assert f"the disk of {disk}/corpora" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_goes_on_after_its_disk_was_full(inputs, disk, monkeypatch, capsys):
    """Megatron-Core's own writer is told of the disk by processes of its own, which keep the reason to themselves."""
    command = (
        f"distill teacher=@checkpoint student=@checkpoint output=%/run steps=3 save_every=1 dtype=fp32 "
        f"optimizer.warmup_steps=1 {CACHED}"
    )
    monkeypatch.setattr(output, "require_space", lambda folder, num_bytes: None)
    # Room for one checkpoint of the student with its optimiser, and not for the next beside it.
    size = sum(file.stat().st_size for file in (inputs / "checkpoint/release").iterdir())
    filler = fill(disk, room=5 * size)
    assert cli.main(settings(command, inputs, disk)) == 2
    said = f"the disk of {disk}/run/checkpoints is full: free some space and run it again"
    assert said in capsys.readouterr().err
    names = {path.name for path in (disk / "run/checkpoints").iterdir()}
    assert names == {"huggingface", "iter_0000001", TRACKER, "manifest.json"}
    assert Checkpoint(disk / "run").iteration == 1 and not (disk / "run/DONE").exists()
    filler.unlink()
    assert cli.main(settings(command, inputs, disk)) == 0
    assert Checkpoint(disk / "run").iteration == 3
