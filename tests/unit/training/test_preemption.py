import os
import signal
import subprocess
import sys

import pytest

from minitron_megatron.training.preemption import stop_requests


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_remembered_and_ends_nothing(number):
    before = signal.getsignal(number)
    with stop_requests() as asked:
        assert not asked()
        os.kill(os.getpid(), number)
        assert asked()
    assert signal.getsignal(number) == before
    assert signal.SIGUSR1 not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_processes_that_are_started_meanwhile_survive_the_warning():
    code = "import os, signal; os.kill(os.getpid(), signal.SIGUSR1); print('alive')"
    with stop_requests():
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.stdout == "alive\n"
    assert subprocess.run([sys.executable, "-c", code]).returncode == -signal.SIGUSR1
