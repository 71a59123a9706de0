"""`torch.distributed.run` that prints one plain message instead of a traceback when a rank fails.

A rank that raises a `UserError` writes its message to the error file of the elastic launcher and exits with status 2.
Ranks usually raise the same error, so only one is shown.
"""

import importlib
import logging
import os
import signal
import sys
from types import FrameType

import psutil

from minitron_megatron.errors import PREEMPTED

USER_ERROR = 2
_FORWARDED = (signal.SIGUSR1, signal.SIGTERM)
"""Signals that ask ranks to stop. Slurm may send them only to its direct children, which are the agents."""


def main(arguments: list[str]) -> int:
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
        # The other ranks fail as a consequence, or are ended by the launcher's SIGTERM.
        statuses = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if any(status == PREEMPTED for status in statuses.values()):
            return PREEMPTED
        if asked:
            return 128 + asked[0]
        for failure in error.failures.values():
            if failure.exitcode == USER_ERROR and isinstance(failure.message, dict):
                print(failure.message["message"], file=sys.stderr)
                return USER_ERROR
        for rank, status in statuses.items():
            if status < 0 and status != -signal.SIGTERM:
                print(f"minitron: rank {rank} was killed by {_cause(signal.Signals(-status))}", file=sys.stderr)
                return 1
        print(error, file=sys.stderr)
        return 1
    except signals.SignalException as stop:
        return 128 + stop.sigval
    if lost:
        print(f"minitron: the first node's launcher has ended or is unreachable: {lost[0]}", file=sys.stderr)
        return 128 + asked[0] if asked else 1
    return 0


def _cause(ended_by: signal.Signals) -> str:
    if ended_by is signal.SIGALRM:  # of its watchdog
        return "SIGALRM: no progress for parallel.timeout_min; every rank's stack is in its log"
    return f"{ended_by.name}: it may have run out of memory"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
