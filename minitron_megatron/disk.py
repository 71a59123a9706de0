"""Disks that are too small, told by name."""

import shutil
import traceback
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
def told_when_full(folder: Path) -> Iterator[None]:
    """Turn what fails in the block because the disk of `folder` is full into a `DiskSpaceError`.

    The libraries that write files lose the system's error on its way up, or complain that a file came out too
    short. So the whole traceback is searched for the system's words, and the disk is asked as well.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = any("No space left on device" in line for line in traceback.format_exception(error))
        if told or _free(folder) < 2**20:
            raise DiskSpaceError(f"the disk of {folder} is full: free some space and run it again") from error
        raise


def _free(folder: Path) -> int:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
