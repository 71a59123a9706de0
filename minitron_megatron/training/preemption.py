"""Notices signals that ask a run to stop: Slurm's warning before the end (SIGUSR1), and SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minitron_megatron.process import blocked_signal, handle_signals

_WARNING, _END = signal.SIGUSR1, signal.SIGTERM


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Remembers signals while the block runs, instead of ending the process.

    Ranks get a signal at different moments, or only some of them do: they have to agree on what to do.

    Slurm warns every process of a job step, including those that write checkpoints and send metrics. These are started
    from this thread and block what it blocks. So the warning is blocked here and polled, and caught where it comes to
    another thread.

    Yields:
        a function that returns whether a signal has come to this process.
    """
    asked = threading.Event()
    with handle_signals((_WARNING, _END), lambda *_: asked.set()) as handled:
        if not handled:
            yield lambda: False
            return
        with blocked_signal(_WARNING):
            yield lambda: asked.is_set() or _WARNING in signal.sigpending()
