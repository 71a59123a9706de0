"""Shows progress on rank 0: a bar on a terminal, ten lines in a log."""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows progress over `total` steps while the block runs.

    Yields a function `advance(steps=1, text="")` that any thread may call; `text` is shown beside the steps. Other
    ranks show nothing.
    """
    console = Console(stderr=True)
    if int(os.environ.get("RANK", 0)) > 0:
        yield lambda steps=1, text="": None
    elif not console.is_terminal:
        yield _log_progress(title, total)
    else:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=console) as bar:
            task = bar.add_task(title, total=total, text="")

            def advance(steps: int = 1, text: str = "") -> None:
                bar.update(task, advance=steps, text=text)

            yield advance


def _log_progress(title: str, total: int) -> Callable[..., None]:
    done, lock = 0, threading.Lock()

    def advance(steps: int = 1, text: str = "") -> None:
        nonlocal done
        with lock:
            tenths = 10 * done // max(total, 1)
            done += steps
            if 10 * done // max(total, 1) > tenths:
                logger.info("%s %d of %d  %s", title, done, total, text)

    return advance
