import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.cluster import missing_programs, slurm
from tests.tiny import tiny_inputs

ROOT = Path(__file__).parents[2]


def wait_for(condition, seconds: float = 1200, what: str = ""):
    """What `condition` returns as soon as it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what or condition} did not come"
        time.sleep(0.2)
    return found


@pytest.fixture(scope="session")
def cluster(tmp_path_factory) -> dict[str, str]:
    """The variables that the commands of a real Slurm on this machine need."""
    if missing := missing_programs():
        pytest.skip(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    with slurm(tmp_path_factory.mktemp("slurm")) as environment:
        yield {**os.environ, **environment, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def inputs(tmp_path_factory) -> Path:
    """A folder with a tiny model in `source` and a text for it, `text.jsonl`."""
    return tiny_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture
def minitron(cluster):
    """Runs `minitron ARGUMENTS` in the cluster, in a folder."""

    def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "minitron_megatron.cli", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, env={**cluster, **environment}, capture_output=True, text=True)

    return run
