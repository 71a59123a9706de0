import pytest
import torch

from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.parallel.context import parallel_context


def pytest_collection_modifyitems(items):
    """Everything in this folder needs a GPU, and says so where there is none."""
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device here"))


@pytest.fixture
def ctx():
    with parallel_context(ParallelConfig()) as ctx:
        yield ctx
