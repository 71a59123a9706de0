"""Notices signals that ask a run to stop: Slurm's warning before the end (SIGUSR1), and SIGTERM."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
    if threading.current_thread() is not threading.main_thread():  # where Python handles no signals
        yield lambda: False
        return
    asked = threading.Event()
    previous = {number: signal.signal(number, lambda *_: asked.set()) for number in (_WARNING, _END)}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {_WARNING})
    try:
        yield lambda: asked.is_set() or _WARNING in signal.sigpending()
    finally:
        signal.sigtimedwait({_WARNING}, 0)  # what was waiting has been answered
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in previous.items():
            signal.signal(number, handler)
