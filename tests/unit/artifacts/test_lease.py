"""One process writes into an output, whoever dies and wherever it ran."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from minitron_megatron.artifacts import lease as module
from minitron_megatron.artifacts.lease import lease
from minitron_megatron.errors import ConfigError

HOLD = """
import sys, time
from pathlib import Path
from minitron_megatron.artifacts.lease import lease
with lease(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def output(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def holder(output):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(output)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def lease_file(output):
    return output.with_name(".out.lease")


def elsewhere(output, **changes):
    """Leave a lease of a process of another machine."""
    values = {"id": "other", "host": "node7", "processes": "other", "pid": 1, "started": 0.0, "since": "then"}
    lease_file(output).write_text(json.dumps({**values, "renewals": 0, **changes}))


def test_a_second_process_is_told_who_writes(output, holder):
    with pytest.raises(ConfigError, match=rf"out is being written by .*pid {holder.pid}, since 20"), lease(output):
        pass
    assert lease_file(output).exists()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_dead_process_of_this_machine_keeps_nothing(number, output, holder):
    holder.send_signal(number)
    holder.wait()
    started = time.monotonic()
    with lease(output):
        assert json.loads(lease_file(output).read_text())["pid"] == os.getpid()
    assert time.monotonic() - started < module.WATCH_S / 2  # nothing is watched
    assert os.listdir(output.parent) == []


def test_a_process_number_that_another_process_has_by_now_is_dead(output, holder):
    values = json.loads(lease_file(output).read_text())
    lease_file(output).write_text(json.dumps({**values, "started": values["started"] - 60}))
    with lease(output):
        pass


def test_a_process_of_another_machine_is_dead_when_it_does_not_renew(output, monkeypatch):
    monkeypatch.setattr(module, "WATCH_S", 1.0)
    elsewhere(output)
    with lease(output):
        assert json.loads(lease_file(output).read_text())["pid"] == os.getpid()
    assert os.listdir(output.parent) == []


def test_a_process_of_another_machine_that_renews_is_alive(output):
    elsewhere(output)
    timer = threading.Timer(1.0, elsewhere, [output], {"renewals": 1})
    timer.start()
    with pytest.raises(ConfigError, match="host node7, pid 1, since then"), lease(output):
        pass
    timer.join()


def test_what_is_no_lease_is_nobodys(output, monkeypatch):
    monkeypatch.setattr(module, "WATCH_S", 1.0)
    lease_file(output).write_text("{")
    with lease(output):
        pass


def test_a_lease_is_renewed_and_a_taken_one_is_left(output, monkeypatch):
    monkeypatch.setattr(module, "RENEW_S", 0.05)
    with lease(output):
        deadline = time.monotonic() + 30
        while json.loads(lease_file(output).read_text())["renewals"] < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    with lease(output):
        pass


def test_one_of_many_gets_it(output):
    held, together, refused = [], [], []

    def hold():
        try:
            with lease(output):
                held.append(1)
                together.append(len(held))
                time.sleep(0.2)
                held.pop()
        except ConfigError as error:
            refused.append(error)

    threads = [threading.Thread(target=hold) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(together) == {1} and len(together) + len(refused) == 8
    assert os.listdir(output.parent) == []
