"""An end for ranks that wait for each other for ever."""

import faulthandler
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Ranks do not reach the limit at the same moment, and launchers end those that are left when one goes.
_MAX_GRACE_S = 30.0

_limits: list[float | None] = []
"""In minutes, of the blocks that this process is in; that of the innermost, which comes last, holds."""


@contextmanager
def watchdog(timeout_min: float | None) -> Iterator[Callable[[], None]]:
    """End this process if nothing moves, with the stack of every thread on stderr.

    Yields a function to call whenever a piece of work is done; more than `timeout_min` minutes between two calls are
    too long, and without a limit (None) nothing is. Blocks may be nested: the inner one's limit holds, and afterwards
    the outer one's, from the start. Every rank has its own, so that in a hung collective each one says where it stands.
    It ends a little later, when the others will have said it, too: as long again, or after half a minute. The timers
    are those of C and of the kernel, which wait for neither the interpreter nor a GPU.
    """
    _limits.append(timeout_min)
    _restart()
    try:
        yield _restart
    finally:
        _limits.pop()
        _restart()


def _restart() -> None:
    faulthandler.cancel_dump_traceback_later()
    limit_s = 60 * _limits[-1] if _limits and _limits[-1] is not None else 0.0
    if limit_s:
        # What replaces stderr in tests has no file behind it.
        stream = sys.stderr if _has_file(sys.stderr) else sys.__stderr__
        faulthandler.dump_traceback_later(limit_s, file=stream)
    # SIGALRM, which ends a process that does nothing about it; no time at all stops the clock.
    signal.setitimer(signal.ITIMER_REAL, limit_s + min(limit_s, _MAX_GRACE_S))


def _has_file(stream) -> bool:
    try:
        stream.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True
