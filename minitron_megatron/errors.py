"""The errors a user can fix.

Each `UserError` is a `ValueError` whose message names the field, the value and the fix. The command line prints the
message alone and exits with its status; any other exception is a defect and keeps its traceback.
"""


class UserError(ValueError):
    """An error the user can fix. The message says what is wrong, where, and how to fix it."""

    exit_status = 2


class ConfigError(UserError):
    """One or more settings are wrong. The message lists every problem, not only the first.

    Args:
        problems: one sentence per problem, each naming the field, the value and the fix.
    """

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        # Unpickling would otherwise pass the message, a string, to a constructor that takes a list.
        return type(self), (self.problems,)


class CheckpointError(UserError):
    """A folder is not a complete checkpoint, or not of the expected model."""


class UnsupportedModelError(UserError):
    """The axis table does not describe a model family, or a feature of it."""


class DataError(UserError):
    """A corpus is missing, empty, too short, or was tokenised with another tokenizer."""


class TrainingError(UserError):
    """A training run cannot continue. What it has saved is complete."""


class DiskSpaceError(UserError):
    """The output does not fit on the disk."""


class LostWorkerError(UserError):
    """Another process of the job was killed from outside."""

    exit_status = 1  # the same settings may work next time


PREEMPTED = 75
"""Exit status of a run that a signal has stopped and that can be resumed: EX_TEMPFAIL of sysexits.h."""


class Preempted(Exception):
    """A signal asked a run to stop. Its progress is saved, and the same command resumes it."""


def raise_if_any(problems: list[str]) -> None:
    """Raises one `ConfigError` that lists all `problems`, if there are any."""
    if problems:
        raise ConfigError(problems)
