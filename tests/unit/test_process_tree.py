"""Whoever of a run is killed, none of the others stays."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

PREAMBLE = """
import os, signal, subprocess, sys, time
from minitron_megatron.process_tree import ending_descendants, watched
def sleeper():
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
"""
CHILD_OF_A_PARENT = (
    PREAMBLE
    + """
code = '''
import os, sys, time
from minitron_megatron.process_tree import watched
with watched("rank 3", parent=os.getppid()):
    print(os.getpid(), flush=True)
    time.sleep(300)
'''
subprocess.Popen([sys.executable, "-c", code])
time.sleep(300)
"""
)
HELPER = (
    PREAMBLE
    + """
with watched("rank 3", helpers=True, tell=lambda line: print("told", line, flush=True)):
    print(sleeper().pid, sleeper().pid, flush=True)
    time.sleep(300)
"""
)
ORPHANS = (
    PREAMBLE
    + """
code = '''
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
'''
before = sleeper()
with ending_descendants():
    subprocess.Popen([sys.executable, "-c", code]).wait()
print(before.pid, before.poll(), flush=True)
before.kill()
"""
)
FORKED = (
    """
import os, time
os.register_at_fork(after_in_child=lambda: time.sleep(1))  # until the parent was killed
"""
    + PREAMBLE
    + """
with watched("rank 0"):
    if (child := os.fork()) == 0:
        time.sleep(300)
    print(child, flush=True)
    time.sleep(300)
"""
)
SPAWNED = """
import minitron_megatron, multiprocessing, time
if __name__ == "__main__":
    manager = multiprocessing.get_context("spawn").Manager()
    print(manager._process.pid, flush=True)
    time.sleep(300)
"""
MANAGED = """
import multiprocessing, os, signal, time
from minitron_megatron.process_tree import watched
if __name__ == "__main__":
    with watched("minitron distill", helpers=True):
        queue = (manager := multiprocessing.get_context("spawn").Manager()).Queue()
        os.kill(manager._process.pid, signal.SIGKILL)
        time.sleep(300)
"""


def start(code, tmp_path):
    file = tmp_path / "script.py"
    file.write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, str(file)], env=environment, **pipes)


def is_gone(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def wait_until_gone(*pids):
    deadline = time.monotonic() + 30
    while not all(map(is_gone, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize("code", [CHILD_OF_A_PARENT, FORKED, SPAWNED], ids=["rank", "forked", "spawned"])
def test_a_process_ends_when_the_one_that_started_it_was_killed(code, tmp_path):
    parent = start(code, tmp_path)
    child = int(parent.stdout.readline())
    parent.kill()
    wait_until_gone(child)
    _, err = parent.communicate(timeout=30)
    assert f"pid {child}: the process that started it (pid {parent.pid}) is gone" in err


def test_a_rank_ends_with_its_helpers_when_one_of_them_was_killed(tmp_path):
    rank = start(HELPER, tmp_path)
    first, second = map(int, rank.stdout.readline().split())
    time.sleep(2)  # until it was looked at
    os.kill(first, signal.SIGKILL)
    out, err = rank.communicate(timeout=60)
    assert rank.returncode == 1
    wait_until_gone(second)
    said = f"pid {rank.pid}: its helper, pid {first} ({sys.executable} -c import time; time.sleep(300)), was killed"
    assert err.startswith("minitron: rank 3 on ") and said in err
    assert out == f"told {err}"


def test_a_helper_that_was_killed_a_moment_before_the_end_is_noticed():
    code = (
        PREAMBLE
        + """
with watched("rank 3", helpers=True):
    helper = sleeper()
    os.kill(helper.pid, SIGNAL)
    time.sleep(0.2)
"""
    )
    for number, status in (("signal.SIGKILL", 1), ("signal.SIGTERM", 0)):
        command = [sys.executable, "-c", code.replace("SIGNAL", number)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == status
        assert ("its helper, pid" in ended.stderr and "was killed by SIGKILL" in ended.stderr) == bool(status)


def test_a_killed_manager_of_multiprocessing_is_noticed(tmp_path):
    run = start(MANAGED, tmp_path)
    assert run.wait(timeout=60) == 1
    assert "was killed by SIGKILL" in run.stderr.read()


def test_what_a_killed_process_leaves_is_ended_and_what_was_there_before_is_not(tmp_path):
    run = start(ORPHANS, tmp_path)
    out, _ = run.communicate(timeout=60)
    orphan, (_, status) = int(out.splitlines()[0]), out.splitlines()[1].split()
    assert status == "None"
    wait_until_gone(orphan)


QUIET = (
    PREAMBLE
    + """
from minitron_megatron import process_tree
process_tree._OWNER_S = 0.0
with watched("rank 3", helpers=True):
    subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"])
    killed = sleeper()
    killed.kill()
    killed.wait()
    time.sleep(3)
print("goes on", flush=True)
"""
)


def test_helpers_that_end_by_themselves_or_are_ended_by_their_owner_are_nobodys_business(tmp_path):
    out, _ = start(QUIET, tmp_path).communicate(timeout=60)
    assert out == "goes on\n"
