"""Reports what a disk does not give, space or permission, as an error that names it."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_megatron.errors import ConfigError, DiskSpaceError, Preempted, UserError

_FULL, _QUOTA = "No space left on device", "Disk quota exceeded"
# Of Python's tempfile, which tries every folder by writing to it.
_NO_TEMPORARY = "No usable temporary directory"
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS)
_ALMOST_NOTHING = 2**20
_SHARED_MEMORY = Path("/dev/shm")


def require_space(folder: Path, num_bytes: int) -> None:
    """Checks before any work that the result fits on the disk of `folder`, which need not exist yet.

    Raises:
        DiskSpaceError: it does not fit.
    """
    free = _free(folder)
    if free < num_bytes:
        raise DiskSpaceError(
            f"{folder} has {_size(free)} free, and {_size(num_bytes)} are needed: free some space or choose another "
            f"output"
        )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"


@contextmanager
def convert_enospc(folder: Path) -> Iterator[None]:
    """Converts exceptions in the block that a full disk causes into a `DiskSpaceError` that names the one that is full.

    Args:
        folder: that the block writes to.
    """
    try:
        yield
    except (UserError, Preempted, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # CheckpointException of torch's distributed checkpoints is no Exception
        if (problem := user_error(error, folder)) is not None:
            raise problem from error
        # Megatron's writer processes report only that a file came out too short, so the free space counts too.
        if _is_full(folder):
            raise DiskSpaceError(_full(folder, is_quota=False)) from error
        raise


@contextmanager
def convert_os_errors(*folders: Path) -> Iterator[None]:
    """Converts errors of the system in the block that a user can fix; see `user_error`.

    Args:
        folders: that the block may write to, the likeliest first.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (problem := user_error(error, *folders)) is not None:
            raise problem from error
        raise


def user_error(error: BaseException, *folders: Path) -> UserError | None:
    """Returns what a user can do about a disk that is full, a quota that is exhausted, or a permission that is missing.

    Args:
        error: any exception.
        folders: that may have been written to, the likeliest first.

    Returns:
        None for an error with another cause, or a disk that is not known.
    """
    causes = list(_causes(error))
    for cause in causes:
        if any(text in str(cause) for text in (_FULL, _QUOTA, _NO_TEMPORARY)) and (place := _place(cause, folders)):
            return DiskSpaceError(_full(place, _QUOTA in str(cause)))
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno in _DENIED and cause.filename is not None:
            file = Path(os.fsdecode(cause.filename))
            what = "is read-only" if cause.errno == errno.EROFS else f"cannot be used by user {os.geteuid()}"
            return ConfigError(
                [f"{file} {what} ({cause.strerror}): see its permissions and its folder's, or choose another place"]
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error and all that led to it."""
    if error is None:
        return
    yield error
    # torch's distributed checkpoints collect the errors of all ranks instead of chaining them.
    for failure, _ in getattr(error, "failures", {}).values():
        yield from _causes(failure)
    yield from _causes(error.__cause__ or error.__context__)


def _place(error: BaseException, folders: tuple[Path, ...]) -> Path | None:
    """Returns the place that is full: where the file lies that an error names, or the first that has no space left."""
    places = [*folders, _temporary(), *([_SHARED_MEMORY] if _SHARED_MEMORY.is_dir() else [])]
    # Of a copy the second name is the file that is written.
    file = (error.filename2 or error.filename) if isinstance(error, OSError) else None
    if isinstance(file, str | bytes):
        path = Path(os.fsdecode(file)).absolute()
        return next((place for place in places if _device(place) == _device(path)), path.parent)
    if _NO_TEMPORARY in str(error):
        return _temporary()
    # What was written may have been removed by now.
    return next((place for place in places if _is_full(place)), folders[0] if folders else None)


def _full(place: Path, is_quota: bool) -> str:
    name = f"TMPDIR = {place}" if place == _temporary() else str(place)
    if is_quota:
        return f"the quota of the disk of {name} is exhausted: remove something there and run it again"
    advice = "give the container more (--shm-size)" if place == _SHARED_MEMORY else "free some space"
    return f"the disk of {name} is full: {advice} and run it again"


def _temporary() -> Path:
    return Path(os.environ.get("TMPDIR") or "/tmp")


def _is_full(place: Path) -> bool:
    return _free(place) < _ALMOST_NOTHING


def _existing(path: Path) -> Path:
    return next(place for place in (path, *path.absolute().parents) if os.path.exists(place))


def _device(path: Path) -> int:
    return _existing(path).stat().st_dev


def _free(folder: Path) -> int:
    return shutil.disk_usage(_existing(folder)).free
