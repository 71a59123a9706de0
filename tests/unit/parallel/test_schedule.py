from types import SimpleNamespace

import pytest
import torch

from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.parallel.schedule import group_microbatches, to_device


def micro_batch(first):
    ids = torch.tensor([first, first + 1])
    return {"tokens": torch.full((2, 4), first), "loss_mask": torch.ones(2, 4), "sample_ids": ids}


def test_sample_ids_stay_where_they_are_looked_up():
    """`meta` stands for a device that the ids must not wait for."""
    [batch] = to_device(iter([micro_batch(6)]), torch.device("meta"))
    assert {key: value.device.type for key, value in batch.items()} == {
        "tokens": "meta",
        "loss_mask": "meta",
        "sample_ids": "cpu",
    }
    assert batch["sample_ids"].tolist() == [6, 7]


@pytest.mark.parametrize("with_ids", [True, False])
def test_what_fills_up_a_call_of_the_interleaved_schedule_is_no_sample(with_ids):
    ctx = SimpleNamespace(layout=ParallelConfig(pipeline=2, virtual_pipeline=2))
    batches = [micro_batch(2 * number) for number in range(9)]
    if not with_ids:  # of a loop of somebody's own
        for batch in batches:
            del batch["sample_ids"]
    first, last = group_microbatches(batches, ctx)
    assert len(first) == 8 and len(last) == 2
    real, padding = last
    assert real is batches[8] and real["loss_mask"].all()
    assert not padding["loss_mask"].any() and torch.equal(padding["tokens"], real["tokens"])
    assert ("sample_ids" in padding) == with_ids
    if with_ids:
        assert padding["sample_ids"].tolist() == [-1, -1] and real["sample_ids"].tolist() == [16, 17]
