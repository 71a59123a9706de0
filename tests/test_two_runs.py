"""Two real commands with one output."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CODE = """
import sys, time
from minitron_megatron import cli
from minitron_megatron.checkpoint import convert
def slow(source):
    print("began", flush=True)
    time.sleep(120)
convert._resolve = slow
sys.exit(cli.main(["import", "source=hf", "output=out"]))
"""


def start(folder: Path, code: str) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=environment, **pipes)


def test_a_second_command_changes_nothing_and_a_killed_one_holds_nothing(tmp_path):
    first = start(tmp_path, CODE)
    assert first.stdout.readline() == "began\n"
    holder = json.loads((tmp_path / ".out.lease").read_text())
    second = start(tmp_path, CODE)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 2 and out == ""
    assert f"output = out is being written by another process (host {holder['host']}, pid {first.pid}, since 20" in err
    assert os.listdir(tmp_path) == [".out.lease"]
    first.kill()
    first.wait()
    third = start(tmp_path, CODE)
    assert third.stdout.readline() == "began\n"
    third.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert third.wait(timeout=60) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 30
    assert os.listdir(tmp_path) == []
