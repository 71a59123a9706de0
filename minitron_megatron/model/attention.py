"""Causal attention on the CPU: by blocks of queries, on torch's matrix products.

torch's own kernel for the CPU, that of `scaled_dot_product_attention`, takes about twice as long in bf16, forward and
backward (docs/benchmarks.md). Like it these blocks keep for the backward pass the inputs, the output and a number for
each row of scores, and not the scores.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from minitron_megatron.parallel.cpu import spared

# Queries at a time. What all heads of so many score against every key is all that is ever held of the score matrix.
_BLOCK = 64


def causal_attention(query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, scale: float) -> Tensor:
    """`softmax(scale * query @ key.T) @ value`, in which no token sees a later one.

    Products are of the inputs' number format, all that happens to scores of at least float32: in the forward pass they
    are float32 products, and the backward pass rounds them only once the normaliser is subtracted from them.

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
        groups = key.size(2)
        share = query.size(2) // groups
        wide = torch.promote_types(query.dtype, torch.float32)
        wide_keys = keys.to(wide) * scale
        out = torch.empty_like(query)
        normalizers = []
        # Of any block's scores: what each allocates anew leaves the cache.
        memory = query.new_empty(query.size(1) * query.size(2) * _BLOCK * len(query), dtype=wide)
        for block, seen, masked, mask in _blocks(query, groups, documents, wide):
            queries = _matrices(query[block], share)
            size = len(queries), queries.size(1), seen.stop
            scores = memory[: math.prod(size)].view(size)
            torch.bmm(queries.to(wide), wide_keys[:, seen].mT, out=scores)
            scores[..., masked] += mask
            largest = scores.amax(-1)
            torch.softmax(scores, -1, out=scores)
            # The largest probability is exp(largest - normaliser).
            normalizers.append(largest - scores.amax(-1).log())
            out[block] = _tokens(scores.to(query.dtype) @ values[:, seen], out[block])
        ctx.save_for_backward(query, keys, values, documents, out, *normalizers)
        ctx.scale = scale
        return out.flatten(2)

    @staticmethod
    def backward(ctx, grad: Tensor):
        with spared():
            query, keys, values, documents, out, *normalizers = ctx.saved_tensors
            grad = grad.view_as(out)
            groups = len(keys) // query.size(1)
            share = query.size(2) // groups
            # Two columns of ones: what they are multiplied by is subtracted within a product, which adds up in float32,
            # and so before the result is rounded.
            ones = keys.new_ones(*keys.shape[:2], 2)
            keys_and_ones, values_and_ones = torch.cat([keys, ones], -1), torch.cat([values, ones], -1)
            grad_query = torch.empty_like(query)
            grad_keys, grad_values = (torch.zeros_like(x, dtype=normalizers[0].dtype) for x in (keys, values))
            blocks = _blocks(query, groups, documents, query.dtype)
            for normalizer, (block, seen, masked, mask) in zip(normalizers, blocks, strict=True):
                queries, grads, outs = (_matrices(x[block], share) for x in (query, grad, out))
                rows = _minus(queries, normalizer / ctx.scale)
                logs = torch.baddbmm(rows.new_empty(()), rows, keys_and_ones[:, seen].mT, beta=0, alpha=ctx.scale)
                logs[..., masked] += mask
                probabilities = logs.exp_()
                grad_values[:, seen] += probabilities.mT @ grads
                along = (grads.to(normalizer.dtype) * outs).sum(-1)
                grad_scores = (_minus(grads, along) @ values_and_ones[:, seen].mT).mul_(probabilities)
                grad_query[block] = _tokens(grad_scores @ keys[:, seen], query[block])
                grad_keys[:, seen] += grad_scores.mT @ queries
            grad_key, grad_value = (
                x.to(query.dtype).unflatten(0, (-1, groups)).permute(2, 0, 1, 3)
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


def _blocks(
    query: Tensor, groups: int, documents: Tensor | None, dtype: torch.dtype
) -> Iterator[tuple[slice, slice, slice, Tensor]]:
    """For each block of queries: its tokens, those it may see, those of them that a mask is for, and the mask.

    The mask is added to scores: 0 or `-inf`, and spreads over `[batch * groups, rows of the block, masked]`.
    """
    seq, share = len(query), query.size(2) // groups
    later = torch.ones(min(seq, _BLOCK), min(seq, _BLOCK), dtype=torch.bool, device=query.device).triu(1)
    mask = _minus_infinity(later, dtype).repeat_interleave(share, 0)
    for start in range(0, seq, _BLOCK):
        end = min(start + _BLOCK, seq)
        size = end - start
        if documents is None:
            # All that came before the block is seen.
            yield slice(start, end), slice(end), slice(start, end), mask[: size * share, :size]
            continue
        apart = documents[:, start:end, None] != documents[:, None, :end]
        apart[..., start:] |= later[:size, :size]
        of_block = _minus_infinity(apart, dtype).repeat_interleave(groups, 0).repeat_interleave(share, 1)
        yield slice(start, end), slice(end), slice(end), of_block


def _minus_infinity(where: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(where, dtype=dtype).masked_fill_(where, -torch.inf)
