"""Nothing that the tests do stays in the user's cache."""

import os
import tempfile

import pytest


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
