"""Attention over several documents in a row against each document by itself."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType

from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.model.te_varlen_attention import documents_apart
from minitron_megatron.model.torch_modules import CausalAttention
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.parallel.schedule import output_weight, run_forward
from tests.distributed.test_documents import documents, packed
from tests.tiny import FAMILIES, hf_model
from tests.unit.pruning.direct import build_ours


class Packed(torch.nn.Module):
    """Stands for Transformer Engine's attention, which is not here: `[tokens, heads, head_dim]` and where to cut."""

    def forward(self, query, key, value, attention_mask, attn_mask_type, packed_seq_params):
        assert attention_mask is None and attn_mask_type is AttnMaskType.causal
        assert packed_seq_params.qkv_format == "thd" and packed_seq_params.cu_seqlens_q.dtype is torch.int32
        assert packed_seq_params.cu_seqlens_kv is packed_seq_params.cu_seqlens_q
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        assert max(lengths) <= packed_seq_params.max_seqlen_q == packed_seq_params.max_seqlen_kv
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        out = [attend(*(x.transpose(0, 1)[None] for x in part))[0].transpose(0, 1) for part in parts]
        return torch.cat(out).flatten(1)


def attend(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


@pytest.fixture
def row():
    torch.manual_seed(0)
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2]])
    query, key, value = torch.randn(7, 2, 6, 8), torch.randn(7, 2, 2, 8), torch.randn(7, 2, 2, 8)
    expected = torch.zeros(7, 2, 48)
    for batch, own in enumerate(ids):
        for number in own.unique():
            at = own == number
            parts = (x[at, batch].transpose(0, 1)[None] for x in (query, key, value))
            expected[at, batch] = attend(*parts)[0].transpose(0, 1).flatten(1)
    return ids, (query, key, value), expected


def test_the_local_attention_keeps_documents_apart(row):
    ids, qkv, expected = row
    config = SimpleNamespace(context_parallel_size=1)
    attention = CausalAttention(config, 1, AttnMaskType.causal, "self")
    torch.testing.assert_close(attention(*qkv, ids), expected)
    whole = attention(*qkv, torch.zeros_like(ids))
    torch.testing.assert_close(whole, attention(*qkv, None))
    assert not torch.allclose(whole, expected)


def test_packed_attention_keeps_documents_apart(row):
    ids, qkv, expected = row
    attention = documents_apart(Packed)()
    torch.testing.assert_close(attention(*qkv, ids, attn_mask_type=AttnMaskType.causal), expected)


def test_one_document_is_not_packed(row):
    class Plain(torch.nn.Module):
        def forward(self, *qkv_and_mask, **options):
            return qkv_and_mask, options

    (*qkv, mask), options = documents_apart(Plain)()(*row[1], None, attn_mask_type="causal", packed_seq_params=None)
    assert all(a is b for a, b in zip(qkv, row[1])) and mask is None
    assert options == {"attn_mask_type": "causal", "packed_seq_params": None}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_packed_documents_are_those_of_each_alone(family):
    theirs = hf_model(**FAMILIES[family])
    batch = {key: torch.stack([row[key] for row in packed()]) for key in packed()[0]}
    with parallel_context(ParallelConfig()) as ctx, torch.no_grad():
        model_chunks, network = build_ours(theirs, ctx)
        [hidden] = run_forward(model_chunks, [batch], ctx, on_output=lambda output, batch: output)
        found = (hidden @ output_weight(model_chunks[0]).T)[..., : network.vocab_size].transpose(0, 1)
        for logits, row in zip(found, documents()):
            for own, document in zip(logits.split([len(d) for d in row]), row):
                torch.testing.assert_close(own, theirs(document[None]).logits[0], rtol=1e-5, atol=1e-5)
