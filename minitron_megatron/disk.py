"""Reports a disk that is too small as an error that names it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_megatron.errors import DiskSpaceError, UserError


def require_space(folder: Path, num_bytes: int) -> None:
    """Checks before any work that the result fits on the disk of `folder`, which need not exist yet.

    Raises:
        DiskSpaceError: it does not fit.
    """
    free = _free(folder)
    if free < num_bytes:
        raise DiskSpaceError(
            f"{folder} has {free / 1e9:.2f} GB free, and {num_bytes / 1e9:.2f} GB are needed: free some space "
            f"or choose another output"
        )


@contextmanager
def convert_enospc(folder: Path) -> Iterator[None]:
    """Converts exceptions in the block that a full disk causes into a `DiskSpaceError` that names `folder`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # CheckpointException of torch's distributed checkpoints is no Exception
        # Megatron's writer processes report only that a file came out too short, so the free space counts too.
        if _disk_was_full(error) or _free(folder) < 2**20:
            raise DiskSpaceError(f"the disk of {folder} is full: free some space and run it again") from error
        raise


def _disk_was_full(error: BaseException | None) -> bool:
    """Returns whether a full disk caused an error. Some libraries keep only the message of the OSError."""
    if error is None:
        return False
    # torch's distributed checkpoints collect the errors of all ranks instead of chaining them.
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    causes = [*failures, error.__cause__, error.__context__]
    return "No space left on device" in str(error) or any(map(_disk_was_full, causes))


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
