"""Kills ranks that hang in a collective."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from minitron_megatron.process import restart_deadline

_limits: list[float | None] = []
"""Limits in minutes of the blocks that this process is in. The innermost, which is the last, applies."""


@contextmanager
def watchdog(timeout_min: float | None) -> Iterator[Callable[[], None]]:
    """Kills this process if it makes no progress, and prints the stack of every thread on stderr.

    Yields a function to call after each piece of work; it restarts the timer of `timeout_min` minutes (None for no
    limit). Blocks may be nested: the inner limit replaces the outer one, whose timer restarts afterwards. Every rank
    has its own watchdog, so that in a hung collective each rank logs where it stands.
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
