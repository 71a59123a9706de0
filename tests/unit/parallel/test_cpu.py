import pytest
import torch

from minitron_megatron.parallel.cpu import install_cpu_backend


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled on CUDA")
def test_nothing_is_compiled():
    def compiler(*args):
        raise AssertionError("a C++ compiler is asked for")

    install_cpu_backend()
    assert torch.compile(lambda x: x + 1, backend=compiler)(torch.ones(1)) == 2
