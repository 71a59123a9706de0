"""What a user can get wrong, by name.

Every class here is a `ValueError` whose message names the field, the value and the fix. The command
line prints the message alone and exits with status 2; anything else is a defect and keeps its traceback.
"""

import shutil
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """Something the user can mend. The message says what, where and how."""


class ConfigError(UserError):
    """One or more settings are wrong. Every problem found is listed, not only the first.

    Args:
        problems: one sentence per problem, each naming the field, the value and the fix.
    """

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


class CheckpointError(UserError):
    """A folder is not a whole checkpoint, or not of the model that was expected."""


class UnsupportedModelError(UserError):
    """A model family, or a part of one, that the axis table does not describe."""


class DataError(UserError):
    """A corpus that is missing, empty, too short, or tokenised for another tokenizer."""


class DiskSpaceError(UserError):
    """The target disk cannot hold what is about to be written."""


class WorkerError(UserError):
    """Another of the processes that share one piece of work failed, or was ended from outside."""


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """Turn what fails in the block because the disk of `folder` is full into a `DiskSpaceError`.

    The libraries that write files lose the system's error number on its way up, or raise for a file that came
    out too short. So the whole traceback is searched for the system's words, and the disk is asked as well.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = any("No space left on device" in line for line in traceback.format_exception(error))
        if told or shutil.disk_usage(_existing(folder)).free < 2**20:
            raise DiskSpaceError(f"the disk of {folder} is full: free some space and run it again") from error
        raise


def require_space(folder: Path, num_bytes: int) -> None:
    """Refuse work whose result would not fit on the disk of `folder`, which need not exist yet."""
    free = shutil.disk_usage(_existing(folder)).free
    if free < num_bytes:
        raise DiskSpaceError(
            f"{folder} has {free / 1e9:.2f} GB free, and {num_bytes / 1e9:.2f} GB are needed: free some space "
            f"or choose another output"
        )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder, *folder.absolute().parents) if path.exists())


def raise_if_any(problems: list[str]) -> None:
    """Raise one `ConfigError` that lists all `problems`, if there are any."""
    if problems:
        raise ConfigError(problems)
