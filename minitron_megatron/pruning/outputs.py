"""What leaving something out does to a network's predictions, token by token.

Logits exist for a chunk of tokens at a time, each tensor rank's share of the vocabulary on its own.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

MEASURES = ("loss", "kl", "logits")
_CHUNK_TOKENS = 256


def compare_outputs(
    hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor, group: dist.ProcessGroup, vocab: int
) -> Tensor:
    """Compare the predictions from several last hidden states with those from the first one.

    Args:
        hiddens: last hidden states `[tokens, hidden]`, the first of them the whole network's.
        weight: output weight `[vocab/tp, hidden]`.
        labels: next tokens `[tokens]`.
        group: tensor-parallel group; every rank of it gets the result.
        vocab: tokens of the tokenizer; rows beyond it pad the vocabulary and take no part.

    Returns:
        float32 `[hidden state, measure, tokens]`, with q the first and p another one's distribution: `loss`, the
        cross-entropy in nats; `kl`, KL(q || p) in nats; and `logits`, the sum of squared changes of the logits.
        For the first one itself `kl` is 0, and `logits` is the sum of the squared logits.
    """
    first_row = group.rank() * weight.size(0)
    weight = weight[: min(max(vocab - first_row, 0), weight.size(0))]
    found = []
    for start in range(0, labels.numel(), _CHUNK_TOKENS):
        rows = slice(start, start + _CHUNK_TOKENS)
        own = labels[rows] - first_row
        is_own = (own >= 0) & (own < weight.size(0))
        own = own.clamp(0, max(weight.size(0) - 1, 0))
        logits, log_q = _log_softmax(hiddens[0][rows], weight, group)
        q, parts = log_q.exp(), []
        for number, hidden in enumerate(hiddens):
            other, log_p = (logits, log_q) if number == 0 else _log_softmax(hidden[rows], weight, group)
            change = logits if number == 0 else other - logits
            likelihood = log_p.gather(1, own[:, None])[:, 0] if len(weight) else torch.zeros_like(own)
            parts.append(
                torch.stack(
                    [
                        torch.where(is_own, -likelihood, 0.0),
                        torch.linalg.vecdot(q, log_q - log_p),
                        change.square().sum(1),
                    ]
                )
            )
        found.append(torch.stack(parts))
    found = torch.cat(found, dim=-1)
    if group.size() > 1:
        dist.all_reduce(found, group=group)
    return found


def _log_softmax(hidden: Tensor, weight: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Logits and their log-softmax over the whole vocabulary, this rank's `[tokens, vocab/tp]` in float32."""
    logits = (hidden @ weight.T).float()
    if group.size() == 1:
        return logits, logits.log_softmax(1)
    largest = logits.amax(1) if len(weight) else logits.new_full((len(logits),), -torch.inf)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    total = (logits - largest[:, None]).exp_().sum(1)
    dist.all_reduce(total, group=group)
    return logits, logits - (largest + total.log())[:, None]
