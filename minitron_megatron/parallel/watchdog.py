"""An end for ranks that wait for each other for ever."""

import faulthandler
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def watchdog(timeout_min: float) -> Iterator[Callable[[], None]]:
    """End this process if nothing moves, with the stack of every thread on stderr.

    Yields a function to call whenever a piece of work is done; more than `timeout_min` minutes between two calls are
    too long. Every rank has its own, so that in a hung collective each one says where it stands. The timer is one of C,
    which waits for neither the interpreter nor a kernel.
    """

    def moved() -> None:
        faulthandler.dump_traceback_later(60 * timeout_min, exit=True, file=stream)

    # What replaces stderr in tests has no file behind it.
    stream = sys.stderr if _has_file(sys.stderr) else sys.__stderr__
    moved()
    try:
        yield moved
    finally:
        faulthandler.cancel_dump_traceback_later()


def _has_file(stream) -> bool:
    try:
        stream.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True
