"""The launcher of ranks, with ranks that are small scripts."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from minitron_megatron.errors import PREEMPTED
from tests.launch.conftest import ROOT, wait_for

AGENT = [sys.executable, "-m", "minitron_megatron.launch.agent", "--standalone", "--nproc-per-node=2"]
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
    return subprocess.Popen([*AGENT, str(folder / "rank.py"), str(folder)], cwd=ROOT, stderr=subprocess.PIPE, text=True)


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


def test_what_the_first_node_says_of_the_end_stands_though_another_loses_it(tmp_path):
    """Ranks leave together, and a launcher may see that the first node's has gone before it sees its own rank go."""
    rank = "import json, os, sys, time; from pathlib import Path\n"
    rank += "if os.environ['SLURM_NODEID'] == '1': time.sleep(60)\n"
    rank += "word = {'message': {'message': 'saved', 'extraInfo': {'timestamp': '0', 'exit_status': 75}}}\n"
    rank += "Path(os.environ['TORCHELASTIC_ERROR_FILE']).write_text(json.dumps(word)); sys.exit(75)"
    (tmp_path / "rank.py").write_text(rank)
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    arguments = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
    agents = [
        subprocess.Popen(
            [*AGENT[:3], *arguments, str(tmp_path / "rank.py")],
            cwd=ROOT,
            env={**os.environ, "SLURM_NODEID": str(node), "TORCHELASTIC_ERROR_FILE": str(tmp_path / "word")},
            stderr=subprocess.PIPE,
            text=True,
        )
        for node in range(2)
    ]
    said = [agent.communicate(timeout=120)[1] for agent in agents]
    assert agents[0].returncode == PREEMPTED and agents[1].returncode == 1
    assert "the first node's launcher has ended" in said[1] and "Traceback" not in said[1]
    assert json.loads((tmp_path / "word").read_text())["message"]["extraInfo"]["exit_status"] == 75


IN_THE_LOOP = """
with parallel_context(ParallelConfig()) as ctx, watchdog(0.05) as heartbeat:
    for step in range(5):
        if step == 3 and ctx.data_rank == 1:
            elsewhere()
        dist.all_reduce(torch.ones(1))
        heartbeat()
"""
AT_DIFFERENT_TIMES = """
with parallel_context(ParallelConfig()) as ctx, watchdog(0.05) as heartbeat:
    dist.all_reduce(torch.ones(1))
    if ctx.data_rank == 1:
        time.sleep(1.5)
        heartbeat()
        elsewhere()
    dist.all_reduce(torch.ones(1))
"""
WHILE_LOADING = """
with parallel_context(ParallelConfig(timeout_min=0.1)) as ctx:
    if ctx.data_rank == 1:
        rank0_first(None)
        elsewhere()
    rank0_first(lambda: time.sleep(15))
    dist.all_reduce(torch.ones(1))
"""
# Both clocks start when both ranks are up: the launcher ends the slower one as soon as the faster one is out of time.
JOINING = """
folder = Path(__file__).parent
(folder / f"{os.environ['RANK']} is up").touch()
while len([*folder.glob("* is up")]) < 2:
    time.sleep(0.01)
if os.environ["RANK"] == "1":
    with watchdog(0.1):
        elsewhere()
with parallel_context(ParallelConfig(timeout_min=0.1)):
    pass
"""
HANGS = """
import os, time
from pathlib import Path
import torch, torch.distributed as dist
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.parallel.collectives import rank0_first
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.parallel.watchdog import watchdog

def elsewhere():
    time.sleep(600)
"""


@pytest.mark.parametrize(
    "waits, where",
    [
        (IN_THE_LOOP, "in all_reduce"),
        (AT_DIFFERENT_TIMES, "in all_reduce"),
        (WHILE_LOADING, "in all_reduce"),
        (JOINING, "in init_process_group"),
    ],
    ids=["loop", "different times", "loading", "joining"],
)
def test_a_hung_collective_ends_with_the_stack_of_every_rank_in_its_log(tmp_path, waits, where):
    (tmp_path / "rank.py").write_text(HANGS + waits)
    log = f'exec "{sys.executable}" "$0" > "{tmp_path}/$RANK.log" 2>&1'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [*AGENT, "--no-python", "bash", "-c", log, str(tmp_path / "rank.py")]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert "was killed by SIGALRM: no progress for parallel.timeout_min" in ended.stderr
    first, second = ((tmp_path / f"{rank}.log").read_text() for rank in range(2))
    assert where in first and "in elsewhere" in second
