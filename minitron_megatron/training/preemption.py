"""Catches signals that ask a run to stop: Slurm's warning before the time limit (SIGUSR1), and SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minitron_megatron.process import blocked_signal, handle_signals

_WARNING, _END = signal.SIGUSR1, signal.SIGTERM


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Remembers signals while the block runs, instead of ending the process.

    Ranks receive a signal at different moments, or only some of them do, so they have to agree on stopping.

    Slurm signals every process of a job step, including those that write checkpoints and send metrics. They inherit the
    signal mask of this thread, so the warning is blocked and polled here, and caught if another thread receives it.

    Yields:
        a function that returns whether a signal has come to this process.
    """
    requested = threading.Event()
    with handle_signals((_WARNING, _END), lambda *_: requested.set()) as handled:
        if not handled:
            yield lambda: False
            return
        with blocked_signal(_WARNING):
            yield lambda: requested.is_set() or _WARNING in signal.sigpending()
