"""An end for ranks that wait for each other for ever."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minitron_megatron.process import restart_deadline

_limits: list[float | None] = []
"""In minutes, of the blocks that this process is in; that of the innermost, which comes last, holds."""


@contextmanager
def watchdog(timeout_min: float | None) -> Iterator[Callable[[], None]]:
    """End this process if nothing moves, with the stack of every thread on stderr.

    Yields a function to call whenever a piece of work is done; more than `timeout_min` minutes between two calls are
    too long, and without a limit (None) nothing is. Blocks may be nested: the inner one's limit holds, and afterwards
    the outer one's, from the start. Every rank has its own, so that in a hung collective each one says where it stands.
    """
    _limits.append(timeout_min)
    _restart()
    try:
        yield _restart
    finally:
        _limits.pop()
        _restart()


def _restart() -> None:
    restart_deadline(60 * _limits[-1] if _limits and _limits[-1] is not None else 0.0)
