"""`torch.distributed.run` that prints one plain message instead of a traceback when a rank fails.

A rank that raises a `UserError` writes its message to the error file of the elastic launcher and exits with status 2.
Ranks usually raise the same error, so only one is shown.
"""

import importlib
import logging
import os
import signal
import socket
import sys
from contextlib import ExitStack
from types import FrameType
from typing import Any

import psutil

from minitron_megatron.errors import PREEMPTED
from minitron_megatron.launch.local import COMMAND
from minitron_megatron.process_tree import ending_descendants, watched

USER_ERROR = 2
_FORWARDED = (signal.SIGUSR1, signal.SIGTERM)
"""Signals that ask ranks to stop. Slurm may send them only to its direct children, which are the agents."""


def main(arguments: list[str]) -> int:
    """Runs the ranks, and ends with all that descends from them; and when the command that waits for it is killed."""
    with ExitStack() as stack:
        stack.enter_context(ending_descendants())
        if command := os.environ.get(COMMAND):
            stack.enter_context(watched("the launcher of the ranks", parent=int(command)))
        return _run(arguments)


def _run(arguments: list[str]) -> int:
    asked: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        asked.append(number)
        for rank in psutil.Process().children():
            rank.send_signal(number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    # On SIGTERM torch gives ranks only half a minute, and saving a large model takes longer.
    arguments = ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments]
    if "SLURM_NODEID" in os.environ and any(a.startswith("--rdzv-endpoint") for a in arguments):
        # torch decides by host name or address, which may differ from those the first node knows itself by.
        is_host = os.environ["SLURM_NODEID"] == "0"
        arguments = [f"--rdzv-conf=is_host={str(is_host).lower()}", *arguments]
    # By name, because the rest of this package must not import torch.
    launcher = importlib.import_module("torch.distributed.run")
    errors = importlib.import_module("torch.distributed.elastic.multiprocessing.errors")
    rendezvous = importlib.import_module("torch.distributed.elastic.rendezvous")
    signals = importlib.import_module("torch.distributed.elastic.multiprocessing.api")
    # The exception below also has what these log about a failed rank.
    for name in ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    lost = []

    @errors.record  # keeps the message of the first rank that failed
    def launch() -> None:
        try:
            launcher.run(launcher.parse_args(arguments))
        except rendezvous.RendezvousConnectionError as error:
            # The first node's launcher ended before this one saw its own ranks fail. It knows why, and has logged it.
            lost.append(error)

    try:
        launch()
    except errors.ChildFailedError as error:
        return _status_of(error, asked)
    except signals.SignalException as stop:
        return 128 + stop.sigval
    if lost:
        print(f"minitron: the first node's launcher has ended or is unreachable: {lost[0]}", file=sys.stderr)
        return 128 + asked[0] if asked else 1
    return 0


def _status_of(error: Any, asked: list[int]) -> int:
    """Says once why the ranks have ended, and returns the exit status.

    Args:
        error: torch's `ChildFailedError`.
        asked: signals that have asked for it.
    """
    # The other ranks fail as a consequence, or are ended by the launcher's SIGTERM.
    failures = dict(sorted(error.failures.items(), key=lambda item: item[1].timestamp))
    if any(failure.exitcode == PREEMPTED for failure in failures.values()):
        return PREEMPTED
    if asked:
        return 128 + asked[0]
    told = [failure for failure in failures.values() if isinstance(failure.message, dict)]
    for failure in told:
        if failure.exitcode == USER_ERROR:
            print(failure.message["message"], file=sys.stderr)
            return USER_ERROR
    for rank, failure in failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            cause = _cause(signal.Signals(-failure.exitcode))
            where = f"pid {failure.pid} on {socket.gethostname()}"
            print(f"minitron: rank {rank} was killed by {cause} ({where})", file=sys.stderr)
            return 1
    print(told[0].message["message"] if told else error, file=sys.stderr)
    return 1


def _cause(ended_by: signal.Signals) -> str:
    if ended_by is signal.SIGALRM:  # of its watchdog
        return "SIGALRM: no progress for parallel.timeout_min; every rank's stack is in its log"
    return f"{ended_by.name}: it may have run out of memory"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
