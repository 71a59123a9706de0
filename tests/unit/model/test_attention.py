"""The CPU's attention by blocks against torch's of everything at once, and in bf16 both against float64."""

import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from torch.multiprocessing.reductions import StorageWeakRef

from minitron_megatron.model import torch_modules
from tests.rounding import assert_as_precise


def inputs(seq: int, groups: int, share: int, head_dim: int = 16, batch: int = 2, spread: float = 1.0) -> list:
    """Query, key and value, the key and value being parts of a larger tensor as they are in the model."""
    torch.manual_seed(seq)
    query = spread * torch.randn(seq, batch, groups * share, head_dim)
    key, value = torch.randn(seq, batch, groups, 3 * head_dim)[..., head_dim:].chunk(2, dim=-1)
    return [query, key, value]


def ours(query, key, value, documents, scale):
    config = SimpleNamespace(context_parallel_size=1)
    attention = torch_modules.CausalAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=scale)
    return attention(query, key, value, documents)


def torchs(query, key, value, documents, scale):
    mask = None
    if documents is not None:
        mask = (documents[:, None, :, None] == documents[:, None, None, :]).tril()
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
    attended = F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=True
    )
    return attended.permute(2, 0, 1, 3).flatten(2)


def with_gradients(attention, qkv, dtype, documents=None, scale=0.3) -> list[torch.Tensor]:
    """The output and the gradients by query, key and value, of a sum with fixed random weights."""
    qkv = [x.detach().to(dtype).requires_grad_() for x in qkv]
    out = attention(*qkv, documents, scale)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(0))
    out.backward(weights.to(dtype))
    return [out.detach(), *(x.grad for x in qkv)]


@pytest.mark.parametrize("seq", [1, 40, 256, 257, 600])
@pytest.mark.parametrize(("groups", "share"), [(1, 1), (3, 1), (2, 3)])
def test_output_and_gradients_are_torchs(seq, groups, share):
    qkv = inputs(seq, groups, share)
    found, expected = (with_gradients(f, qkv, torch.float64) for f in (ours, torchs))
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("seq", [40, 600])
def test_documents_are_apart(seq):
    qkv = inputs(seq, groups=2, share=2)
    # One of them begins again later in a row, with the number that it had: what a row's mask says, not what it means.
    documents = torch.stack([torch.arange(seq) // 33, torch.arange(seq) // 20 % 2])
    found, expected = (with_gradients(f, qkv, torch.float64, documents) for f in (ours, torchs))
    for own, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("seq", "spread"), [(256, 1), (256, 10), (1024, 0.3)])
def test_bf16_is_about_as_precise_as_torchs(seq, spread):
    """Scores of some tens, as trained models have, or logarithms of small probabilities that were rounded to bf16 would
    be several times as far off."""
    qkv = [x.bfloat16() for x in inputs(seq, groups=2, share=3, head_dim=64, spread=spread)]
    exact = with_gradients(torchs, qkv, torch.float64, scale=0.125)
    found, expected = (with_gradients(f, qkv, torch.bfloat16, scale=0.125) for f in (ours, torchs))
    for own, theirs, right in zip(found, expected, exact, strict=True):
        assert_as_precise(own, theirs, right, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_kernel_does_the_work(dtype):
    """Its fallback, for inputs that the kernel does not take, would hold all scores of a block."""
    with torch.profiler.profile() as profile:
        with_gradients(ours, inputs(600, groups=2, share=3), dtype)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu"] == 3
    assert calls["aten::_scaled_dot_product_flash_attention_for_cpu_backward"] == 3
    assert "aten::_scaled_dot_product_attention_math" not in calls


def test_neither_masks_nor_the_projection_are_kept_for_the_backward_pass(monkeypatch):
    masks = []

    def remembered(*args, make=torch_modules._mask):
        mask = make(*args)
        masks.append(weakref.ref(mask))
        return mask

    monkeypatch.setattr(torch_modules, "_mask", remembered)
    # As in the model, key and value are parts of what one projection returns.
    projected = torch.randn(600, 2, 5, 16, requires_grad=True) * 2
    query, key, value = projected.split([3, 1, 1], dim=2)
    out = ours(query * 2, key, value, None, 0.25)
    storage = StorageWeakRef(projected.untyped_storage())
    del projected, query, key, value
    assert [mask() for mask in masks] == [None] * 3
    assert storage.expired()
    out.sum().backward()
    assert len(masks) == 6


def test_no_block_outlives_the_output(monkeypatch):
    blocks = []

    def remembered(share, *of_output, join=torch_modules._joined):
        blocks.extend(map(weakref.ref, of_output))
        return join(share, *of_output)

    monkeypatch.setattr(torch_modules, "_joined", remembered)
    qkv = [x.requires_grad_() for x in inputs(300, groups=2, share=3)]
    out = ours(*qkv, None, 0.25)
    assert all(block() is not None for block in blocks)
    del out
    assert [block() for block in blocks] == [None] * 2
