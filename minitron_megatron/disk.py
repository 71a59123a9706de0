"""Disks that are too small, told by name."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_megatron.errors import DiskSpaceError, UserError


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse work whose result would not fit on the disk of `folder`, which need not exist yet.

    Raises:
        DiskSpaceError: it would not fit.
    """
    free = _free(folder)
    if free < num_bytes:
        raise DiskSpaceError(
            f"{folder} has {free / 1e9:.2f} GB free, and {num_bytes / 1e9:.2f} GB are needed: free some space "
            f"or choose another output"
        )


@contextmanager
def convert_enospc(folder: Path) -> Iterator[None]:
    """Turn what fails in the block because the disk of `folder` is full into a `DiskSpaceError`."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # as those of torch's distributed checkpoints are
        # Megatron's writing processes pass on no more than that a file came out too short, so the disk is asked too.
        if _disk_was_full(error) or _free(folder) < 2**20:
            raise DiskSpaceError(f"the disk of {folder} is full: free some space and run it again") from error
        raise


def _disk_was_full(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, is the system's. Some libraries keep its words alone."""
    if error is None:
        return False
    # torch's distributed checkpoints collect the errors of all ranks instead of chaining them.
    failures = [failure for failure, _ in getattr(error, "failures", {}).values()]
    causes = [*failures, error.__cause__, error.__context__]
    return "No space left on device" in str(error) or any(map(_disk_was_full, causes))


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
