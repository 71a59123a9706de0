"""What a user can get wrong, by name.

Every class here is a `ValueError` whose message names the field, the value and the fix. The command
line prints the message alone and exits with its status; anything else is a defect and keeps its traceback.
"""


class UserError(ValueError):
    """Something the user can mend. The message says what, where and how."""

    exit_status = 2


class ConfigError(UserError):
    """One or more settings are wrong. Every problem found is listed, not only the first.

    Args:
        problems: one sentence per problem, each naming the field, the value and the fix.
    """

    def __init__(self, problems: list[str]):
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self) -> tuple[type["ConfigError"], tuple[list[str]]]:
        # An exception is otherwise made again from its message, which is no list.
        return type(self), (self.problems,)


class CheckpointError(UserError):
    """A folder is not a whole checkpoint, or not of the model that was expected."""


class UnsupportedModelError(UserError):
    """A model family, or a part of one, that the axis table does not describe."""


class DataError(UserError):
    """A corpus that is missing, empty, too short, or tokenised for another tokenizer."""


class TrainingError(UserError):
    """A training run that cannot go on. What it has saved is whole."""


class DiskSpaceError(UserError):
    """The target disk cannot hold what is about to be written."""


class LostWorkerError(UserError):
    """One of the processes that share one piece of work was ended from outside."""

    exit_status = 1  # the same settings may do the next time


PREEMPTED = 75
"""Exit status of a run that a signal has stopped, and that can go on: EX_TEMPFAIL of sysexits.h."""


class Preempted(Exception):
    """A signal asked a run to stop. What it has done is saved, and the same command goes on from there."""


def raise_if_any(problems: list[str]) -> None:
    """Raise one `ConfigError` that lists all `problems`, if there are any."""
    if problems:
        raise ConfigError(problems)
