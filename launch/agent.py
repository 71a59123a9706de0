"""`torch.distributed.run`, ending with one plain message instead of a traceback when a rank fails.

A rank that ends on a `UserError` writes its message where the elastic launcher keeps the errors of ranks
and exits with status 2. All ranks usually find the same error; one is shown.
"""

import importlib
import logging
import signal
import sys

from minitron_megatron.errors import PREEMPTED

USER_ERROR = 2


def main(arguments: list[str]) -> int:
    # Slurm's warning is for the ranks, which get it as well, and would end this process.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # By name, for the rest of this package must not need torch.
    launcher = importlib.import_module("torch.distributed.run")
    errors = importlib.import_module("torch.distributed.elastic.multiprocessing.errors")
    signals = importlib.import_module("torch.distributed.elastic.multiprocessing.api")
    # What these report about a failed rank is in the exception below, too.
    for name in ("multiprocessing.api", "multiprocessing.errors.error_handler", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        launcher.main(arguments)
    except errors.ChildFailedError as error:
        # Other ranks may have failed since, for want of the one that left, or were ended by the launcher's SIGTERM.
        for rank, failure in error.failures.items():
            if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
                name = signal.Signals(-failure.exitcode).name
                print(f"minitron: rank {rank} was ended by {name}: see whether the memory was enough", file=sys.stderr)
                return 1
        if any(failure.exitcode == PREEMPTED for failure in error.failures.values()):
            return PREEMPTED
        for failure in error.failures.values():
            if failure.exitcode == USER_ERROR and isinstance(failure.message, dict):
                print(failure.message["message"], file=sys.stderr)
                return USER_ERROR
        print(error, file=sys.stderr)
        return 1
    except signals.SignalException as stop:
        return 128 + stop.sigval
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
