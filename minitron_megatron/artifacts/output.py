"""A verb's output: whether it is there already, and how it comes to be there, whole or not at all."""

import logging
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from minitron_megatron.artifacts.files import publish
from minitron_megatron.artifacts.manifest import MANIFEST, Manifest
from minitron_megatron.disk import convert_enospc, require_space
from minitron_megatron.errors import ConfigError
from minitron_megatron.parallel.workers import ALONE, Workers
from minitron_megatron.process import handling

logger = logging.getLogger(__name__)


def conflict_message(output: Path, changes: list[str]) -> str:
    """The problem of an output that holds a result which differs in `changes` from the one that is asked for."""
    return (
        f"output = {output} holds a result of other settings or inputs ({'; '.join(changes)}): go back to those, "
        f"choose another output or remove this one"
    )


def is_done(output: Path, manifest: Manifest) -> bool:
    """Whether `output` already holds what `manifest` describes.

    Raises:
        ConfigError: it holds something else, which is never overwritten.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    if not (output / MANIFEST).exists():
        raise ConfigError([f"output = {output} exists and is not a finished result: choose another or remove it"])
    if changes := Manifest.read(output).changes(manifest):
        raise ConfigError([conflict_message(output, changes)])
    logger.info("%s is there already with the same inputs: skipped", output)
    return True


@contextmanager
def writing(output: Path, manifest: Manifest, num_bytes: int = 0, workers: Workers = ALONE) -> Iterator[Path]:
    """Write a result folder so that it appears whole or not at all.

    Yields a temporary folder beside `output`. When the block ends, the manifest is added and the folder
    renamed to `output`; when it fails, or the process is told to end (SIGTERM), the folder is removed.

    Args:
        output: the folder to make; it must not exist, or be empty.
        manifest: of the result.
        num_bytes: what will be written, to be refused before any work if the disk is too small.
        workers: who write it together. What fails in the block must fail on all of them.

    Raises:
        DiskSpaceError: the disk is or gets full.
    """
    temporary = output.with_name(f".{output.name}.partial")

    def begin() -> None:
        require_space(output.parent, num_bytes)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def finish() -> None:
        manifest.write(temporary)
        publish(temporary, output)

    # By whoever is left, for the first worker may be the one that was ended.
    with _removed_at_the_end(temporary), convert_enospc(output):
        workers.run_on_main(begin)
        yield temporary
        workers.run_on_main(finish)


@contextmanager
def _removed_at_the_end(folder: Path) -> Iterator[None]:
    """Remove `folder` when the block ends. SIGTERM, which launchers send to the ranks that are left, ends it, too."""
    is_ending = False

    def end(number: int, frame: FrameType | None) -> None:
        if not is_ending:
            raise SystemExit(128 + number)

    with handling((signal.SIGTERM,), end):
        try:
            yield
        finally:
            is_ending = True
            shutil.rmtree(folder, ignore_errors=True)
