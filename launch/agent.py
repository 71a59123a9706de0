"""`torch.distributed.run`, ending with one plain message instead of a traceback when a rank fails.

A rank that ends on a `UserError` writes its message where the elastic launcher keeps the errors of ranks
and exits with status 2. All ranks usually find the same error; one is shown.
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
"""What asks ranks to stop. Slurm may tell its direct children alone, which are the agents."""


def main(arguments: list[str]) -> int:
    asked: list[int] = []

    def forward(number: int, _: FrameType | None) -> None:
        asked.append(number)
        for rank in psutil.Process().children():
            rank.send_signal(number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    # torch's own answer to SIGTERM leaves ranks half a minute, and a large model takes longer to save.
    arguments = ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *arguments]
    if "SLURM_NODEID" in os.environ and any(a.startswith("--rdzv-endpoint") for a in arguments):
        # torch finds out by name or address, which need not be those that the first node knows itself by.
        is_host = os.environ["SLURM_NODEID"] == "0"
        arguments = [f"--rdzv-conf=is_host={str(is_host).lower()}", *arguments]
    # By name, for the rest of this package must not need torch.
    launcher = importlib.import_module("torch.distributed.run")
    errors = importlib.import_module("torch.distributed.elastic.multiprocessing.errors")
    rendezvous = importlib.import_module("torch.distributed.elastic.rendezvous")
    signals = importlib.import_module("torch.distributed.elastic.multiprocessing.api")
    # What these report about a failed rank is in the exception below, too.
    for name in ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    lost = []

    @errors.record  # keeps what the first rank that failed has written of it
    def launch() -> None:
        try:
            launcher.run(launcher.parse_args(arguments))
        except rendezvous.RendezvousConnectionError as error:
            # The first node's launcher has left before this one saw its own ranks leave. It knows why, and has written
            # that where all of them write.
            lost.append(error)

    try:
        launch()
    except errors.ChildFailedError as error:
        # Other ranks may have failed since, for want of the one that left, or were ended by the launcher's SIGTERM.
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
                print(f"minitron: rank {rank} was ended by {_told(signal.Signals(-status))}", file=sys.stderr)
                return 1
        print(error, file=sys.stderr)
        return 1
    except signals.SignalException as stop:
        return 128 + stop.sigval
    if lost:
        print(f"minitron: the first node's launcher has ended or is not reached: {lost[0]}", file=sys.stderr)
        return 128 + asked[0] if asked else 1
    return 0


def _told(ended_by: signal.Signals) -> str:
    if ended_by is signal.SIGALRM:  # of its watchdog
        return "SIGALRM: ranks waited for each other for parallel.timeout_min; the log of each tells where it stood"
    return f"{ended_by.name}: see whether the memory was enough"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
