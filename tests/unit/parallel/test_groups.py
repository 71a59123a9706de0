import pytest
import torch

from minitron_megatron.parallel.groups import _local_device


@pytest.mark.parametrize("local_rank, visible, expected", [("3", 8, 3), ("3", 1, 0), (None, 8, 0)])
def test_a_rank_takes_a_gpu_that_it_sees(local_rank, visible, expected, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert _local_device() == expected
