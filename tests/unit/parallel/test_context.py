import pytest
import torch

from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.parallel.context import _local_device, parallel_context


@pytest.mark.parametrize("local_rank, visible, expected", [("3", 8, 3), ("3", 1, 0), (None, 8, 0)])
def test_a_rank_takes_a_gpu_that_it_sees(local_rank, visible, expected, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    assert _local_device() == expected


@pytest.mark.parametrize(
    "visible, told", [(0, []), (1, []), (8, ["parallel.data=8 would use all GPUs of this machine"])]
)
def test_gpus_that_are_left_over_are_told_of(visible, told, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    with caplog.at_level("INFO", "minitron_megatron"), parallel_context(ParallelConfig()):
        assert [message.partition(";")[0] for message in caplog.messages] == told
