import signal
import subprocess
import sys

import pytest

HANGS = """
import time
from minitron_megatron.parallel.watchdog import watchdog

def stuck():
    time.sleep(60)

with watchdog(1 / 60) as moved:
    for _ in range(3):  # longer than the limit in all, and never at a time
        time.sleep(0.5)
        moved()
    print("moved", flush=True)
    stuck()
"""
ENDS = """
import time
from minitron_megatron.parallel.watchdog import watchdog

with watchdog(1 / 60):
    pass
time.sleep(2.5)
print("left", flush=True)
"""
NESTED = """
import time
from minitron_megatron.parallel.watchdog import watchdog

with watchdog(1 / 60):
    with watchdog({inner}) as moved:
        time.sleep(2.5)
        moved()
        time.sleep(2.5)
    print("left", flush=True)
    time.sleep(60)
"""


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)


def test_a_process_that_hangs_is_ended_with_its_stack():
    ended = run(HANGS)
    assert ended.returncode == -signal.SIGALRM
    assert ended.stdout == "moved\n"
    assert "in stuck" in ended.stderr


def test_nothing_is_ended_after_the_block():
    left = run(ENDS)
    assert left.returncode == 0 and left.stdout == "left\n"


@pytest.mark.parametrize("inner", [None, 1 / 10])
def test_the_limit_of_the_inner_block_holds_and_then_that_of_the_outer(inner):
    ended = run(NESTED.format(inner=inner))
    assert ended.returncode == -signal.SIGALRM
    assert ended.stdout == "left\n"
    assert "line 11 in <module>" in ended.stderr
