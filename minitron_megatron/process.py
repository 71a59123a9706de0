"""What is set for the whole process: signal handlers, timers, environment, garbage collection, logging.

All of it stands here, but for the stand-ins for CUDA (`parallel.cpu`), so that whoever calls this package in a program
of their own can see what it does to the rest.
"""

import faulthandler
import gc
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import FrameType, ModuleType
from typing import Any

# Ranks do not reach a limit at the same moment, and launchers end those that are left when one goes.
_MAX_GRACE_S = 30.0


@contextmanager
def handling(numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], Any]) -> Iterator[bool]:
    """Have a function called for signals while the block runs.

    Yields:
        whether it will be: Python handles signals in its main thread alone.
    """
    if threading.current_thread() is not threading.main_thread():
        yield False
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield True
    finally:
        for number, before in previous.items():
            signal.signal(number, before)


@contextmanager
def blocking(number: signal.Signals) -> Iterator[None]:
    """Have a signal wait while the block runs, in this thread and in those that it starts; it is answered in there."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.sigtimedwait({number}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def restart_deadline(limit_s: float) -> None:
    """End this process when `limit_s` seconds have passed, with the stack of every thread on stderr; 0 for never.

    It ends a little later, when other ranks will have said it, too: as long again, or after half a minute. The timers
    are those of C and of the kernel, which wait for neither the interpreter nor a GPU.
    """
    faulthandler.cancel_dump_traceback_later()
    if limit_s:
        # What replaces stderr in tests has no file behind it.
        stream = sys.stderr if _has_file(sys.stderr) else sys.__stderr__
        faulthandler.dump_traceback_later(limit_s, file=stream or 2)
    # SIGALRM, which ends a process that does nothing about it; no time at all stops the clock.
    signal.setitimer(signal.ITIMER_REAL, limit_s + min(limit_s, _MAX_GRACE_S))


def _has_file(stream: Any) -> bool:
    try:
        stream.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True


def adopt(environment: Mapping[str, str]) -> None:
    """Give this process, and those that it starts, variables of the environment."""
    os.environ.update(environment)


def import_for_good(module: str) -> ModuleType:
    """A module that imports much, such as torch and Megatron-Core, and stays.

    Looking for garbage among so many objects takes a third of the time, and seconds when Python ends. There is none.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def set_up_logging(is_first: bool) -> None:
    """Messages of this package on the first rank, warnings of everything on all; all on stderr."""
    from rich.console import Console
    from rich.logging import RichHandler

    # A file has no width, and lines broken at column 80 cannot be searched.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    if is_first:
        logging.getLogger("minitron_megatron").setLevel(logging.INFO)
    # Megatron-Core says these at import, for every configuration and for every model. The manual says which kernels are
    # used when, and the class of the model is this package's choice.
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed")
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: "GPTModel IS DEPRECATED" not in str(record.msg)
    )
