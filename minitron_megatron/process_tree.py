"""Processes that belong together end together: whoever is killed, none of the others stays.

A process of a run watches the one that started it, and its own helpers, such as the writers of a checkpoint. Whoever
starts others adopts what these leave behind, and ends it.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

_EVERY_S = 1.0
_OWNER_S = 5.0
"""Whoever started a helper, such as a pool of processes, may notice for so long by itself that it was killed."""

_SET_SUBREAPER, _GET_SUBREAPER = 36, 37  # of prctl(2)

_watches: list[threading.Event] = []
"""The watches that this process keeps; processes that it forks keep one as well."""

_forking: int = 0
"""This process as it forks another one, which may come too late to ask for it."""


@contextmanager
def watched(
    what: str, parent: int | None = None, helpers: bool = False, tell: Callable[[str], object] | None = None
) -> Iterator[None]:
    """Ends this process and all that descend from it when one dies without which it would wait for ever.

    It leaves without another word than a line on stderr: what was first, its process and host.

    Args:
        what: this process is, for people.
        parent: process that has started this one and must stay; None for a process that may outlive it.
        helpers: whether it cannot go on without any of its child processes. One that ends by itself is none of its
            business, whatever its status; one that was killed is.
        tell: called with that line as well.
    """
    ended = threading.Event()
    threading.Thread(target=_watch, args=(ended, what, parent, helpers, tell), daemon=True).start()
    _watches.append(ended)
    try:
        yield
        if helpers:  # one that was killed a moment ago has not been noticed yet
            for pid in _children():
                if (number := _killed_by(pid)) not in (0, signal.SIGTERM):  # by which owners end theirs
                    _leave(what, f"its helper, pid {pid}, was killed by {signal.Signals(number).name}", tell)
    finally:
        _watches.remove(ended)
        ended.set()


def watch_parent(parent: int) -> None:
    """Has this process, a helper of another one, end when that one is gone."""
    threading.Thread(target=_watch, args=(threading.Event(), "a helper", parent), daemon=True).start()


def _note_parent() -> None:
    global _forking
    _forking = os.getpid()


def _watch_parent_if_watched() -> None:
    if _watches:
        _watches.clear()
        watch_parent(_forking)


os.register_at_fork(before=_note_parent, after_in_child=_watch_parent_if_watched)


@contextmanager
def ending_descendants() -> Iterator[None]:
    """Kills, when the block ends, every process that was started in it and by those that it started.

    On Linux they are found even if the process between has died.
    """
    before, adopted = set(_descendants()), _adopt_orphans(True)
    try:
        yield
    finally:
        _kill([process for process in _descendants() if process not in before])
        _adopt_orphans(adopted)


def _watch(
    ended: threading.Event,
    what: str,
    parent: int | None,
    helpers: bool = False,
    tell: Callable[[str], object] | None = None,
) -> None:
    names: dict[int, str] = {}
    noticed: dict[int, float] = {}
    while not ended.wait(_EVERY_S):
        if parent is not None and os.getppid() != parent:
            _leave(what, f"the process that started it (pid {parent}) is gone", tell)
        for pid in _children() if helpers else ():
            names[pid] = _command_line(pid) or names.get(pid, "?")
            number = _killed_by(pid)
            if number and time.monotonic() > noticed.setdefault(pid, time.monotonic()) + _OWNER_S:
                cause = f"was killed by {signal.Signals(number).name}"
                _leave(what, f"its helper, pid {pid} ({names[pid]}), {cause}", tell)


def _leave(what: str, why: str, tell: Callable[[str], object] | None) -> None:
    """Ends this process and its descendants at once: the main thread may wait for ever."""
    line = f"minitron: {what} on {socket.gethostname()}, pid {os.getpid()}: {why}; all of this run ends"
    with suppress(OSError):
        os.write(2, f"{line}\n".encode(errors="replace"))
        if tell:
            tell(line)
    _kill(_descendants())
    os._exit(1)


def _children() -> list[int]:
    try:
        lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    except OSError:  # a thread has just ended
        return []
    return [int(pid) for pid in " ".join(lists).split()] if lists else [p.pid for p in psutil.Process().children()]


def _command_line(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def _killed_by(pid: int) -> int:
    """Returns the signal that has ended a child, which whoever started it may still ask for; 0 if none has."""
    try:
        state = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return 0
    return state.si_status if state and state.si_code in (os.CLD_KILLED, os.CLD_DUMPED) else 0


def _descendants() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


def _kill(processes: list[psutil.Process]) -> None:
    for process in processes:
        with suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


def _adopt_orphans(adopt: bool) -> bool:
    """Has the processes that a dying descendant leaves come to this one, or not. Returns what was before."""
    if sys.platform != "linux":
        return False
    prctl, before = ctypes.CDLL(None).prctl, ctypes.c_int()
    prctl(_GET_SUBREAPER, ctypes.byref(before), 0, 0, 0)
    prctl(_SET_SUBREAPER, int(adopt), 0, 0, 0)
    return bool(before.value)
