"""Process-wide settings: signal handlers, timers, environment, garbage collection, logging.

Everything that affects the caller's whole process is in this module, except for the CPU backend (`parallel.cpu`) and
the watching of parents and helpers (`process_tree`).
"""

import ast
import faulthandler
import functools
import gc
import inspect
import logging
import os
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, TextIO

STACKS = "MINITRON_STACKS"
"""Environment variable: folder for the stacks of ranks that share one stderr, where theirs would mix."""

# Ranks do not reach a limit at the same moment, and launchers kill the others as soon as one exits.
_MAX_GRACE_S = 30.0


@contextmanager
def handle_signals(
    numbers: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], Any]
) -> Iterator[bool]:
    """Installs a signal handler while the block runs.

    Yields:
        whether it is installed: Python handles signals in its main thread only.
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
def blocked_signal(number: signal.Signals) -> Iterator[None]:
    """Blocks a signal while the block runs, in this thread and in threads started there; the block itself reads it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {number})
    try:
        yield
    finally:
        signal.sigtimedwait({number}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def restart_deadline(limit_s: float) -> None:
    """Restarts the timer that kills this process after `limit_s` seconds; 0 stops it.

    At the limit the stack of every thread goes to stderr, or to a file of this rank in the folder that `STACKS` names.
    The process is killed up to half a minute later, so that other ranks can print theirs. Both timers run outside of
    the interpreter (C and kernel), so a hung call into CUDA does not stop them.
    """
    faulthandler.cancel_dump_traceback_later()
    if limit_s:
        faulthandler.dump_traceback_later(limit_s, file=_stack_stream())
    # SIGALRM kills a process that has no handler for it; 0 stops the timer.
    signal.setitimer(signal.ITIMER_REAL, limit_s + min(limit_s, _MAX_GRACE_S))


def _stack_stream() -> Any:
    """Returns where the stacks of this process go."""
    if folder := os.environ.get(STACKS):
        return _stack_file(Path(folder) / os.environ.get("RANK", "0"))
    # pytest's replacement of stderr has no file descriptor.
    return sys.stderr if _has_descriptor(sys.stderr) else sys.__stderr__ or 2


@functools.cache  # faulthandler needs it to stay open
def _stack_file(path: Path) -> TextIO:
    """Opens the file of this rank's stacks."""
    file = path.open("w", encoding="utf-8")
    file.write(f"rank {path.name} on {socket.gethostname()}, pid {os.getpid()}, made no progress in:\n")
    file.flush()
    return file


def _has_descriptor(stream: Any) -> bool:
    try:
        stream.fileno()
    except (OSError, ValueError, AttributeError):
        return False
    return True


def update_environment(environment: Mapping[str, str]) -> None:
    """Sets environment variables for this process and its children."""
    os.environ.update(environment)


def import_heavy(module: str) -> ModuleType:
    """Imports a module that loads a lot, such as torch and Megatron-Core, without what would slow it down.

    Garbage collection waits meanwhile: scanning that many objects takes a third of the time, and seconds at exit, and
    finds nothing to free. On the CPU `torch.compile` leaves Megatron-Core's functions as they are: none of its fused
    ones is used there, and the compiler alone takes seconds to load.
    """
    if module in sys.modules:  # freezing once more would keep for ever what the process makes meanwhile
        return sys.modules[module]
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with _megatron_uncompiled():
            return import_module(module)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def _megatron_uncompiled() -> Iterator[None]:
    torch: Any = import_module("torch")
    compiled = torch.compile

    def compile(model: Callable | None = None, **settings: Any) -> Any:
        is_megatrons = getattr(model, "__module__", "").startswith("megatron.")
        return model if is_megatrons else compiled(model, **settings)

    if not torch.cuda.is_available():
        torch.compile = compile
    try:
        yield
    finally:
        torch.compile = compiled


def is_spawned() -> bool:
    """Returns whether `multiprocessing` is starting this process just now, and imports the main module for it."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and bool(getattr(process.current_process(), "_inheriting", False))


def main_script_problems(name: str, starts_processes: bool) -> list[str]:
    """Returns what keeps the main script from being imported, as by each process that `multiprocessing` spawns.

    Args:
        name: of the function that the script calls.
        starts_processes: whether the function is sure to start some; otherwise only they themselves are refused.
    """
    if is_spawned() or (starts_processes and _is_unguarded(sys.modules["__main__"])):
        return [
            f"{name} is called each time that a process of multiprocessing imports the main script: call it below "
            f'`if __name__ == "__main__":`'
        ]
    return []


def _is_unguarded(main: ModuleType) -> bool:
    """Returns whether a file that multiprocessing would import has got to its present line without the condition."""
    frame = inspect.currentframe()
    while frame and not (frame.f_globals is vars(main) and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    file = getattr(main, "__file__", None)
    if frame is None or file is None:
        return False
    try:
        nodes = ast.walk(ast.parse(Path(file).read_bytes()))
    except (OSError, SyntaxError, ValueError):  # no file of Python's
        return False
    conditions = (node for node in nodes if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test))
    return not any(node.lineno <= frame.f_lineno for node in conditions)


def meeting_problems(environ: Mapping[str, str]) -> list[str]:
    """Returns what keeps ranks from meeting, for which torch would wait several minutes."""
    missing = " and ".join(name for name in ("MASTER_ADDR", "MASTER_PORT") if not environ.get(name))
    if missing:
        size = environ.get("WORLD_SIZE")
        return [f"WORLD_SIZE = {size} without {missing}: set where rank 0 listens, or use torchrun or srun"]
    return address_problems(environ["MASTER_ADDR"])


def address_problems(address: str) -> list[str]:
    """Returns a problem if a host name does not resolve, for which torch would wait several minutes."""
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError) as error:
        host = socket.gethostname()
        return [f"MASTER_ADDR = {address} cannot be resolved on {host} ({error}): set a name or address known there"]
    return []


def set_up_logging(is_first: bool) -> None:
    """Logs to stderr: this package's messages on the first rank, all warnings on every rank."""
    from rich.console import Console
    from rich.logging import RichHandler

    # A file has no width; rich would break lines at column 80, where they cannot be searched.
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 200)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=console)])
    if is_first:
        logging.getLogger("minitron_megatron").setLevel(logging.INFO)
    # Megatron-Core warns of these at import, for every configuration and every model. The documentation says which
    # kernels are used when, and the class of the model is this package's choice.
    warnings.filterwarnings("ignore", message="full scope is deprecated")
    warnings.filterwarnings("ignore", message=r"(Transformer Engine and )?Apex (is|are) not installed")
    logging.getLogger("megatron.core.models.gpt.gpt_model").addFilter(
        lambda record: "GPTModel IS DEPRECATED" not in str(record.msg)
    )
