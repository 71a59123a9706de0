"""A verb's output folder: checks whether it exists already, and writes it atomically."""

import json
import logging
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from minitron_megatron.artifacts.manifest import MANIFEST, Manifest
from minitron_megatron.disk import convert_enospc, require_space
from minitron_megatron.errors import ConfigError
from minitron_megatron.files import is_lease, publish
from minitron_megatron.parallel.workers import ALONE, Workers
from minitron_megatron.process import handle_signals

logger = logging.getLogger(__name__)


def conflict_message(output: Path, changes: list[str]) -> str:
    """Returns the error message for an output that holds a result with other settings or inputs.

    Args:
        output: the folder.
        changes: what differs, a phrase for each; see `Manifest.changes`.
    """
    return (
        f"output = {output} holds a result of other settings or inputs ({'; '.join(changes)}): go back to those, "
        f"choose another output or remove this one"
    )


def is_done(output: Path, manifest: Manifest) -> bool:
    """Returns whether `output` already holds the result that `manifest` describes.

    Raises:
        ConfigError: it holds something else, which is never overwritten.
    """
    if not output.exists() or (output.is_dir() and all(map(is_lease, output.iterdir()))):
        return False
    if not (output / MANIFEST).exists():
        raise ConfigError([f"output = {output} exists and is not a finished result: choose another or remove it"])
    if changes := Manifest.read(output).changes(manifest):
        raise ConfigError([conflict_message(output, changes)])
    logger.info("%s is there already with the same inputs: skipped", output)
    return True


def begin_parts(folder: Path, manifest: Manifest) -> None:
    """Makes the folder of the finished parts of a result, for a run that is interrupted to go on with.

    Parts of other settings or inputs are removed.
    """
    content, file = json.dumps(manifest.cache_key), folder / "of.json"
    if file.is_file() and file.read_text() == content:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    file.write_text(content)


@contextmanager
def writing(output: Path, manifest: Manifest, num_bytes: int = 0, workers: Workers = ALONE) -> Iterator[Path]:
    """Writes a result folder atomically.

    Yields a temporary folder beside `output`. When the block ends, the manifest is added and the folder renamed to
    `output`; when it fails, or the process gets SIGTERM, the folder is removed.

    Args:
        output: the folder to make; it must not exist, or be empty.
        manifest: of the result.
        num_bytes: size of the result; checked against the free space before any work.
        workers: the processes that write it together. If the block fails on one, it must fail on all.

    Raises:
        DiskSpaceError: the disk is full, or becomes full.
    """
    temporary = output.with_name(f".{output.name}.partial")

    def begin() -> None:
        require_space(output.parent, num_bytes)
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()

    def finish() -> None:
        manifest.write(temporary)
        for left in filter(is_lease, output.glob(".*")):  # of an output within that was never made
            left.unlink()
        publish(temporary, output)

    # Every worker removes the folder, because the first one may be the one that was killed.
    with _removed_on_exit(temporary), convert_enospc(output):
        workers.run_on_main(begin)
        yield temporary
        workers.run_on_main(finish)


@contextmanager
def _removed_on_exit(folder: Path) -> Iterator[None]:
    """Removes `folder` when the block ends, also by SIGTERM, which launchers send to the remaining ranks."""
    is_ending = False

    def end(number: int, frame: FrameType | None) -> None:
        if not is_ending:
            raise SystemExit(128 + number)

    with handle_signals((signal.SIGTERM,), end):
        try:
            yield
        finally:
            is_ending = True
            shutil.rmtree(folder, ignore_errors=True)
