"""One process writes into an output, whoever dies and wherever it ran."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest

from minitron_megatron.artifacts import lease as module
from minitron_megatron.artifacts.fingerprint import fingerprint
from minitron_megatron.artifacts.lease import lease, sole_writer
from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.artifacts.output import is_done, writing
from minitron_megatron.errors import ConfigError
from minitron_megatron.files import write_json

HOLD = """
import signal, sys, time
from pathlib import Path
from minitron_megatron.artifacts.lease import lease
# Both would be inherited, ignored, from nohup and from a script's background.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
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
    write_json(lease_file(output), {**values, "renewals": 0, **changes})


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


def test_a_verb_holds_the_lease_while_it_runs(output):
    seen = []

    @sole_writer
    def verb(config):
        seen.append(lease_file(output).exists())
        if len(seen) == 1:
            raise ValueError("on every way out")
        return output

    config = SimpleNamespace(output=str(output))
    with pytest.raises(ValueError, match="every way"):
        verb(config)
    assert verb(config) == output and seen == [True, True]
    assert os.listdir(output.parent) == []


def test_a_second_verb_is_refused_before_it_begins(output, holder):
    with pytest.raises(ConfigError, match=f"pid {holder.pid}"):
        sole_writer(lambda config: pytest.fail("it began"))(SimpleNamespace(output=str(output)))


def test_a_finished_output_and_other_ranks_than_the_first_need_no_lease(output, holder, monkeypatch):
    verb = sole_writer(lambda config: "done")
    monkeypatch.setenv("RANK", "1")
    assert verb(SimpleNamespace(output=str(output))) == "done"
    monkeypatch.delenv("RANK")
    output.mkdir()
    (output / "manifest.json").write_text("{}")
    assert verb(SimpleNamespace(output=str(output))) == "done"


def test_nothing_stays_of_a_verb_that_has_written_nothing(tmp_path):
    with lease(tmp_path / "new" / "folders" / "out"):
        pass
    assert os.listdir(tmp_path) == []


def test_the_process_that_a_holder_starts_shares_its_lease(output):
    code = "import sys; from pathlib import Path; from minitron_megatron.artifacts.lease import lease\n"
    code += "with lease(Path(sys.argv[1])): print('shared')"
    with lease(output):
        shared = subprocess.run([sys.executable, "-c", code, str(output)], capture_output=True, text=True)
        assert lease_file(output).exists()
    assert shared.stdout == "shared\n", shared.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_signal_releases_the_lease(number, output, holder):
    holder.send_signal(number)
    assert holder.wait(timeout=30) == 128 + number
    assert not lease_file(output).exists()


def test_a_launcher_that_ends_a_failing_rank_does_not_keep_it_from_releasing_its_lease(output):
    # The block fails, as when another rank was killed, and the signal comes as the lease is about to be released.
    ending = """    read = m._read
    m._read = lambda file: os.kill(os.getpid(), signal.SIGTERM) or read(file)
    raise RuntimeError("a peer is gone")"""
    code = "import os\nfrom minitron_megatron.artifacts import lease as m\n"
    code += HOLD.replace("    time.sleep(60)", ending)
    environment = {**os.environ, "RANK": "0", "WORLD_SIZE": "2"}
    holder = subprocess.run([sys.executable, "-c", code, str(output)], env=environment, capture_output=True)
    assert holder.returncode == -signal.SIGTERM, holder.stderr
    assert not lease_file(output).exists()


def test_a_lease_belongs_to_no_result(output):
    output.mkdir()
    (output / "weights").write_text("weights")
    before = fingerprint(output)
    with lease(output / "within"):
        assert (output / ".within.lease").exists()
        assert fingerprint(output) == before


def test_a_folder_with_nothing_but_a_left_lease_is_empty(output):
    output.mkdir()
    (output / ".within.lease").write_text("{}")
    manifest = Manifest("scores", verb="score")
    assert not is_done(output, manifest)
    with writing(output, manifest):
        pass
    assert os.listdir(output) == ["manifest.json"]


def test_a_holder_that_stood_still_and_lost_its_lease_ends(output):
    code = HOLD.replace("with lease", "from minitron_megatron.artifacts import lease as m\nm.RENEW_S = 0.2\nwith lease")
    holder = subprocess.Popen([sys.executable, "-c", code, str(output)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    elsewhere(output)
    assert holder.wait(timeout=30) == 1
    assert json.loads(lease_file(output).read_text())["id"] == "other"
