"""One writer for one output: a lease that a dead holder does not keep, on shared file systems and between machines.

The lease is a small file beside the output. Its holder renews it every few seconds; whoever finds one watches whether
it is renewed. No clock of another machine is believed, and no lock of the operating system, which shared file systems
may not pass on.
"""

import functools
import json
import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import psutil

from minitron_megatron.artifacts.manifest import MANIFEST
from minitron_megatron.errors import ConfigError
from minitron_megatron.files import lease_of, write_json
from minitron_megatron.process import handle_signals

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

RENEW_S = 5.0
"""Between two renewals."""

WATCH_S = 30.0
"""A lease that is not renewed for so long has lost its holder."""


def sole_writer(verb: Callable[[Any], Result]) -> Callable[[Any], Result]:
    """Has a verb hold the lease of what its settings name, see `lease_for`, from before it begins until it ends."""

    @functools.wraps(verb)
    def alone(config: Any) -> Result:
        with lease_for(config):
            return verb(config)

    return alone


@contextmanager
def lease_for(config: Any) -> Iterator[None]:
    """Holds the lease of the settings' `output`, or `run_dir`, while the block runs.

    The first process of a job holds it for all, or whoever starts the ranks, which outlives them. A finished output,
    which is never written again, needs none.

    Raises:
        ConfigError: see `lease`.
    """
    output = getattr(config, "output", None) or getattr(config, "run_dir", None)
    is_first = os.environ.get("RANK", "0") == "0"
    if not output or not is_first or (Path(output) / MANIFEST).exists():
        yield
        return
    with lease(Path(output)):
        yield


@contextmanager
def lease(output: Path) -> Iterator[None]:
    """Holds the lease of `output` while the block runs.

    A process that the holder has started, such as the report of a launch, shares it.

    Raises:
        ConfigError: another process writes there; the error says which one, where, and since when.
    """
    file = lease_of(output.resolve())  # one folder has one lease, whatever links lead to it
    missing = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        if _is_held_by_ancestor(file):
            yield
            return
        with _leaving_on_signals(), _held(file, output):
            yield
    finally:
        for folder in missing:  # of a verb that has written nothing
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _held(file: Path, output: Path) -> Iterator[None]:
    own = {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "processes": _process_table(),
        "pid": os.getpid(),
        "started": psutil.Process().create_time(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "renewals": 0,
    }
    while not _create(file, own):
        _wait_for_its_end(file, output)
    released = threading.Event()
    renewing = threading.Thread(target=_renew, args=(file, own, released), daemon=True)
    renewing.start()
    try:
        yield
    finally:
        with _after_signals():
            released.set()
            renewing.join()
            if _read(file).get("id") == own["id"]:
                file.unlink(missing_ok=True)


@contextmanager
def _after_signals() -> Iterator[None]:
    """Has SIGTERM, which launchers send to the ranks that are left when one fails, wait until the block ends."""
    got: list[int] = []
    with handle_signals((signal.SIGTERM,), lambda number, _: got.append(number)):
        yield
    if got:
        os.kill(os.getpid(), got[0])


@contextmanager
def _leaving_on_signals() -> Iterator[None]:
    """Ends this process by an exception on signals that would end it without one, so that the lease is released.

    Ranks of a job keep their ways: a collective would keep Python from seeing the signal.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        numbers = ()
    with handle_signals(tuple(n for n in numbers if signal.getsignal(n) is signal.SIG_DFL), _leave):
        yield


def _leave(number: int, _: FrameType | None) -> None:
    raise SystemExit(128 + number)


def _create(file: Path, own: dict) -> bool:
    """Makes the lease, unless there is one."""
    temporary = file.with_name(f"{file.name}.{own['id']}")
    write_json(temporary, own)
    try:
        os.link(temporary, file)  # fails if it exists, on network file systems as well
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        os.close(descriptor)
        write_json(file, own)
    finally:
        temporary.unlink(missing_ok=True)
    return True


def _renew(file: Path, own: dict, released: threading.Event) -> None:
    while not released.wait(RENEW_S):
        if (now := _read(file)) and now.get("id") != own["id"]:
            # This process stood still for so long that it was taken for dead. Two must not write.
            logger.error("%s was taken over by %s: this process ends", file, _who(now))
            os._exit(1)
        own["renewals"] += 1
        with suppress(OSError):  # a disk that is full for a while; the output's own writes say so
            write_json(file, own)


def _wait_for_its_end(file: Path, output: Path) -> None:
    """Returns once the lease is gone, or was taken away from a holder that is dead.

    Raises:
        ConfigError: its holder lives.
    """
    before = _read(file)
    if before.get("processes") == _process_table():
        if _is_alive(before):
            raise ConfigError([_problem(output, before)])
    else:
        logger.warning("%s: looking for up to %.0f s whether it still runs", _problem(output, before), WATCH_S)
        deadline = time.monotonic() + WATCH_S
        while time.monotonic() < deadline and (now := _read(file)) == before:
            time.sleep(0.5)
        if not file.exists():
            return
        if now != before:
            raise ConfigError([_problem(output, now)])
    _take_away(file, before)


def _take_away(file: Path, dead: dict) -> None:
    """Removes the lease of a dead holder, unless somebody else has done it and holds one of its own by now."""
    aside = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    try:
        file.rename(aside)
    except FileNotFoundError:
        return
    if _read(aside) != dead:
        with suppress(OSError):
            os.link(aside, file)
    aside.unlink(missing_ok=True)


def _process_table() -> str:
    """Names where a process number means the same process: this boot of this machine, and container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux
        return socket.gethostname()


def _is_held_by_ancestor(file: Path) -> bool:
    holder = _read(file)
    ancestors = (process.pid for process in psutil.Process().parents())
    return holder.get("processes") == _process_table() and holder.get("pid") in ancestors and _is_alive(holder)


def _is_alive(holder: dict) -> bool:
    try:
        return abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1
    except (psutil.Error, KeyError):
        return False


def _read(file: Path) -> dict:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _problem(output: Path, holder: dict) -> str:
    return (
        f"output = {output} is being written by another process ({_who(holder)}): wait for it, end it or choose "
        f"another one"
    )


def _who(holder: dict) -> str:
    return ", ".join(f"{name} {holder.get(name, '?')}" for name in ("host", "pid", "since"))
