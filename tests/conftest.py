"""What holds for all tests: nothing stays in the user's cache, and what they import is never looked through."""

import gc
import os
import tempfile

import pytest

MANY_THREADS = 60  # as the groups of one rank have

# As in the commands: torch, Megatron-Core and transformers are a million objects, none of which is ever freed.
gc.disable()


def pytest_collection_finish():
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests():
    """A cache that is removed at the end, for this process and those that it starts."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("XDG_CACHE_HOME")
        os.environ["XDG_CACHE_HOME"] = folder
        yield
        if before is None:
            del os.environ["XDG_CACHE_HOME"]
        else:
            os.environ["XDG_CACHE_HOME"] = before


class Threads:
    """How many there may be before it is worth a look for those of groups that nobody has any more."""

    def __init__(self) -> None:
        self.most = 0

    def tidy(self) -> None:
        if self.count() > self.most:
            gc.collect()
            self.most = self.count() + MANY_THREADS

    @staticmethod
    def count() -> int:
        return len(os.listdir("/proc/self/task"))


THREADS = Threads()


@pytest.fixture(autouse=True)
def no_threads_of_former_groups():
    """What a test has caught keeps process groups alive, and each of them a thread that polls all the time."""
    yield
    THREADS.tidy()
