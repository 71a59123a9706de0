"""Attention within documents, on Transformer Engine's kernels for sequences of different lengths."""

from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


def documents_apart(attention: type[torch.nn.Module]) -> type[torch.nn.Module]:
    """Extends a core attention, such as Transformer Engine's, to take document numbers as its mask.

    Only the core attention sees packed sequences: it gets the rows of a micro-batch as one, `[batch * seq, ...]`, with
    the offset of each document, and everything around it keeps `[seq, batch, ...]`. Rotary embeddings are relative, so
    a document's position in its row makes no difference.

    Args:
        attention: a class of Megatron-Core that takes `packed_seq_params`.
    """

    class DocumentsApart(attention):  # type: ignore[valid-type,misc]  # the checker knows no base chosen at run time
        def forward(
            self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
        ) -> Tensor:
            """See `CausalAttention.forward`."""
            if attention_mask is None:
                return super().forward(query, key, value, None, **options)
            length, batch = query.shape[:2]
            packed = (x.transpose(0, 1).flatten(0, 1) for x in (query, key, value))
            bounds = _bounds(attention_mask)
            options["packed_seq_params"] = PackedSeqParams(
                qkv_format="thd",
                cu_seqlens_q=bounds,
                cu_seqlens_kv=bounds,
                max_seqlen_q=length,
                max_seqlen_kv=length,
            )
            context = super().forward(*packed, None, **options)
            return context.reshape(batch, length, -1).transpose(0, 1).contiguous()

    return DocumentsApart


def _bounds(documents: Tensor) -> Tensor:
    """Returns the offsets of documents in the concatenated rows `[batch, seq]`, and the end of the last one."""
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    end = torch.tensor([documents.numel()], device=documents.device)
    return torch.cat([begins.flatten().nonzero().flatten(), end]).int()
