"""Causal attention on the CPU: by blocks of queries, on torch's matrix products.

torch's own kernel for the CPU, that of `scaled_dot_product_attention`, takes more than half as long again in bf16
(docs/benchmarks.md). Like it these blocks keep for the backward pass the inputs, the output and numbers for each row of
scores, and not the scores.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minitron_megatron.parallel.cpu import spared

# Queries at a time. A few times what all heads of so many score against every key is held of the score matrix.
_BLOCK = 64


def causal_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale * query @ key.T) @ value`, in which no token sees a later one.

    Products are of the inputs' number format, but for the scores of the forward pass, which are products in float32. In
    the backward pass scores are rounded once the largest of their row has been subtracted.

    Args:
        query: `[seq, batch, heads, head_dim]`.
        key, value: `[seq, batch, groups, head_dim]`.
        documents: `[batch, seq]`, the number of each token's document, which it attends to alone; None for one.
        scale: that scores are multiplied by.

    Returns:
        `[seq, batch, heads * head_dim]`.
    """
    with spared():
        return _CausalAttention.apply(query, key, value, documents, scale)


class _CausalAttention(torch.autograd.Function):
    """A matrix for each sequence and query group; its rows are tokens, or tokens and in them the group's heads."""

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, scale: float) -> Tensor:
        # Contiguous, for a view would keep the whole QKV projection for the backward pass.
        keys, values = _matrices(key).contiguous(), _matrices(value).contiguous()
        seq, batch, heads, _ = query.shape
        share = heads // key.size(2)
        wide = torch.promote_types(query.dtype, torch.float32)
        wide_keys = keys.to(wide) * scale
        out = query.new_empty(seq, batch, heads * value.size(-1))
        by_head = out.view(seq, batch, heads, -1)
        # Of each row, what its probabilities are made of again: its largest score, and the probability of that.
        peaks = []
        # For any block's scores, which would leave the cache if each had memory of its own.
        memory = query.new_empty(batch * heads * min(_BLOCK, seq) * seq, dtype=wide)
        for block, seen, hidden in _blocks(query, documents):
            queries = _matrices(query[block], share)
            size = len(queries), queries.size(1), seen.stop
            scores = memory[: math.prod(size)].view(size)
            torch.bmm(queries.to(wide), wide_keys[:, seen].mT, out=scores)
            _hide(scores, hidden, batch, share)
            if any(ctx.needs_input_grad):
                largest = scores.amax(-1)
                torch.softmax(scores, -1, out=scores)
                peaks += largest, scores.amax(-1)
            else:
                torch.softmax(scores, -1, out=scores)
            by_head[block] = _tokens(scores.to(query.dtype) @ values[:, seen], by_head[block])
        ctx.save_for_backward(query, keys, values, documents, out, *peaks)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):
        with spared():
            query, keys, values, documents, out, *peaks = ctx.saved_tensors
            batch, heads, dtype = query.size(1), query.size(2), query.dtype
            share = heads * batch // len(keys)
            grad, out = (x.unflatten(2, (heads, -1)) for x in (grad, out))
            # Two columns of ones: what they are multiplied by is subtracted within a product, which adds up in float32,
            # and so before the result is rounded.
            ones = keys.new_ones(*keys.shape[:2], 2)
            keys_and_ones, values_and_ones = torch.cat([keys, ones], -1), torch.cat([values, ones], -1)
            grad_query = torch.empty_like(query)
            grad_keys, grad_values = (torch.zeros_like(x, dtype=peaks[0].dtype) for x in (keys, values))
            for largest, peak, (block, seen, hidden) in zip(
                peaks[::2], peaks[1::2], _blocks(query, documents), strict=True
            ):
                queries, grads, outs = (_matrices(x[block], share) for x in (query, grad, out))
                rows = _minus(queries, largest / ctx.scale)
                scores = torch.baddbmm(rows.new_empty(()), rows, keys_and_ones[:, seen].mT, beta=0, alpha=ctx.scale)
                _hide(scores, hidden, batch, share)
                # A row's probabilities are these times its peak, which its gradient is multiplied by instead.
                weights = scores.exp_()
                grads = (grads * peak.unsqueeze(-1)).to(dtype)
                along = (grads.to(peak.dtype) * outs).sum(-1)
                grad_values[:, seen] += weights.mT @ grads
                grad_scores = (_minus(grads, along) @ values_and_ones[:, seen].mT).mul_(weights)
                grad_query[block] = _tokens(grad_scores @ keys[:, seen], query[block])
                grad_keys[:, seen] += grad_scores.mT @ queries
            grad_key, grad_value = (
                x.to(dtype).unflatten(0, (batch, -1)).permute(2, 0, 1, 3)
                for x in (grad_keys.mul_(ctx.scale), grad_values)
            )
            return grad_query.mul_(ctx.scale), grad_key, grad_value, None, None


def _matrices(x: Tensor, share: int = 1) -> Tensor:
    """`[tokens, batch, groups * share, head_dim]` as `[batch * groups, tokens * share, head_dim]`."""
    tokens, *_, head_dim = x.shape
    return x.reshape(tokens, -1, share, head_dim).transpose(0, 1).reshape(-1, tokens * share, head_dim)


def _tokens(matrices: Tensor, like: Tensor) -> Tensor:
    """What `_matrices` made of a tensor of the shape of `like`, made into that again."""
    return matrices.unflatten(1, (len(like), -1)).transpose(0, 1).reshape(like.shape)


def _minus(rows: Tensor, subtracted: Tensor) -> Tensor:
    """Rows `[..., row, column]` with what is subtracted from each in two more columns: rounded, and the rest of it."""
    rounded = subtracted.to(rows.dtype)
    rest = (subtracted - rounded).to(rows.dtype)
    return torch.cat([rows, -torch.stack([rounded, rest], -1)], -1)


def _blocks(query: Tensor, documents: Tensor | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """For each block of queries: its tokens, those up to its last one, and which of the last of these are hidden.

    What is hidden is `[batch or 1, tokens of the block, last tokens]`; all tokens before the last ones are seen.
    """
    seq = len(query)
    later = torch.ones(min(seq, _BLOCK), min(seq, _BLOCK), dtype=torch.bool, device=query.device).triu(1)
    for start in range(0, seq, _BLOCK):
        end = min(start + _BLOCK, seq)
        hidden = later[None, : end - start, : end - start]
        if documents is not None:
            of_block = hidden
            hidden = documents[:, start:end, None] != documents[:, None, :end]
            hidden[..., start:] |= of_block
        yield slice(start, end), slice(end), hidden


def _hide(scores: Tensor, hidden: Tensor, batch: int, share: int) -> None:
    """Set to `-inf` what is hidden, in scores `[batch * groups, tokens * share, tokens seen]`."""
    last = scores[..., -hidden.size(-1) :]
    last = last.unflatten(0, (batch, -1)).unflatten(2, (-1, share))
    last.masked_fill_(hidden[:, None, :, None], -torch.inf)
