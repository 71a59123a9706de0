"""The launcher of ranks, with ranks that are small scripts."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_megatron.errors import PREEMPTED
from tests.launch.conftest import ROOT, wait_for

RANK = """
import os, signal, sys, time
from pathlib import Path
folder, number = Path(sys.argv[1]), os.environ["RANK"]
def save(*_):
    time.sleep(2)
    (folder / f"saved{number}").touch()
    sys.exit(75)
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
(folder / f"up{number}").touch()
time.sleep(60)
"""


def start(folder: Path, source: str) -> subprocess.Popen:
    (folder / "rank.py").write_text(source)
    agent = [sys.executable, "-m", "minitron_megatron.launch.agent", "--standalone", "--nproc-per-node=2"]
    return subprocess.Popen([*agent, str(folder / "rank.py"), str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)


def files(folder: Path, name: str) -> int:
    return len(list(folder.glob(f"{name}?")))


@pytest.mark.parametrize("sent", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_the_agent_alone_reaches_the_ranks_which_have_time_to_save(tmp_path, sent):
    agent = start(tmp_path, RANK)
    wait_for(lambda: files(tmp_path, "up") == 2, what="two ranks")
    agent.send_signal(sent)
    assert agent.wait(60) == PREEMPTED
    assert files(tmp_path, "saved") == 2


def test_a_signal_that_ends_ranks_ends_the_agent_alike(tmp_path):
    agent = start(tmp_path, "import sys, time; open(sys.argv[1] + '/up0', 'w'); time.sleep(60)")
    wait_for(lambda: files(tmp_path, "up") == 1, what="a rank")
    agent.send_signal(signal.SIGUSR1)
    assert agent.wait(60) == 128 + signal.SIGUSR1
