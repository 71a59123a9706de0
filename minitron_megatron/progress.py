"""Progress of long work, shown by rank 0 on a terminal."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Show a bar of `total` steps while the block runs.

    Yields a function `advance(steps=1, text="")`; `text` is shown behind the bar. Where there is no terminal,
    or on any rank but the first, it shows nothing.
    """
    console = Console(stderr=True)
    quiet = not console.is_terminal or int(os.environ.get("RANK", 0)) > 0
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with Progress(*columns, console=console, disable=quiet) as bar:
        task = bar.add_task(title, total=total, text="")

        def advance(steps: int = 1, text: str = "") -> None:
            bar.update(task, advance=steps, text=text)

        yield advance
