"""Sums of second moments: the plain product, the same to the bit in any order of the micro-batches after the first."""

import pytest
import torch

from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.sparsity.moment_sums import MomentSums

COLUMNS = 20


@pytest.fixture
def batches(monkeypatch):
    monkeypatch.setattr("minitron_megatron.sparsity.moment_sums.BLOCK", 8)  # which the columns are no multiple of
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randn(COLUMNS, generator=generator).mul(3).exp()
    batches = [torch.randn(50, COLUMNS, generator=generator) * sizes for _ in range(4)]
    for batch in batches:
        batch[:, 3] = 0  # an input that is always zero
    batches[0][:, 5] = 0  # and one of which the first micro-batch has nothing
    return batches


def total(batches):
    with parallel_context(ParallelConfig()) as ctx:
        sums = MomentSums(COLUMNS, len(batches), ctx.device, ctx.collection.dp)
        for batch in batches:
            sums.add(batch)
        return sums.total()


def test_they_are_the_product_of_all_inputs(batches):
    inputs = torch.cat(batches).double()
    expected = inputs.T @ inputs
    scale = expected.diagonal().sqrt().clamp(min=1e-30)
    found = total(batches).double()
    found = found.triu() + found.triu(1).T
    torch.testing.assert_close(found / scale[:, None] / scale, expected / scale[:, None] / scale, rtol=0, atol=1e-5)
    assert not found[3].any()


def test_their_order_changes_no_bit(batches):
    """Not even where large parts cancel, and small ones are what is left."""
    first, small = batches[0], 1e-5 * batches[1]
    mirrored = first * torch.tensor([1.0, -1.0]).repeat(COLUMNS // 2)
    assert torch.equal(total([first, mirrored, small]).triu(), total([first, small, mirrored]).triu())
