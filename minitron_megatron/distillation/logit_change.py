"""Compares a network's predictions with and without some sublayers, token by token.

Logits are computed for a block of tokens at a time, on each tensor rank for its share of the vocabulary.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.parallel.cpu import in_blocks

MEASURES = ("loss", "kl", "logits")
_BLOCK_TOKENS = 256


def compare_outputs(
    hiddens: Sequence[Tensor], weight: Tensor, labels: Tensor, mask: Tensor, group: dist.ProcessGroup, vocab: int
) -> Tensor:
    """Compares the predictions from several last hidden states with those from the first one.

    Args:
        hiddens: last hidden states `[tokens, hidden]`, the first of them the whole network's.
        weight: output weight `[vocab/tp, hidden]`.
        labels: next tokens `[tokens]`.
        mask: `[tokens]`; where it is 0, nothing is computed and the result is 0.
        group: tensor-parallel group; every rank of it gets the result.
        vocab: tokens of the tokenizer; rows beyond it are padding and ignored.

    Returns:
        float32 `[hidden state, measure, tokens]`, with q the first and p another one's distribution: `loss`, the
        cross-entropy in nats; `kl`, KL(q || p) in nats; and `logits`, the sum of squared changes of the logits.
        For the first one itself `kl` is 0, and `logits` is the sum of the squared logits.
    """
    first_row = group.rank() * weight.size(0)
    weight = weight[: min(max(vocab - first_row, 0), weight.size(0))]
    counted = mask.nonzero()[:, 0]
    own_labels = labels[counted] - first_row
    is_own = (own_labels >= 0) & (own_labels < weight.size(0))
    # Of this rank's logits z, with z_q the first one's, m the largest of them and m_q that of z_q: m, sum of
    # exp(z - m), sum of exp(z_q - m_q) (z_q - z), sum of (z_q - z)^2, and the label's.
    local = torch.zeros(5, len(hiddens), len(counted), device=weight.device)
    local[0] = -torch.inf
    if len(weight):
        # Reused for every block: allocating memory costs more than computing in it.
        size = min(_BLOCK_TOKENS, len(counted)), len(weight)
        logits_buffer = weight.new_empty(size)
        buffers = torch.empty(2, *size, device=weight.device)
        for start in range(0, len(counted), _BLOCK_TOKENS):
            rows = slice(start, start + _BLOCK_TOKENS)
            label_columns = own_labels[rows].clamp(0, len(weight) - 1)[:, None]
            for number, hidden in enumerate(hiddens):
                logits = logits_buffer[: len(label_columns)]
                torch.mm(hidden[counted[rows]], weight.T, out=logits)
                local[4, number, rows] = logits.gather(1, label_columns)[:, 0].float() * is_own[rows]
                whole, likelihoods = buffers[:, : len(logits)]
                _compare(number == 0, logits, whole, likelihoods, local[:4, number, rows])
    largest, total, product, change, label_logits = local.double()
    over_ranks = largest.clone()
    if group.size() > 1:
        dist.all_reduce(over_ranks, dist.ReduceOp.MAX, group=group)
    # Rescale from each rank's own largest logit to that of all ranks.
    total *= (largest - over_ranks).exp()
    product *= (largest[0] - over_ranks[0]).exp()
    sums = torch.stack([total, product, change, label_logits])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
    total, product, change, label_logits = sums
    log_sum = over_ranks + total.log()
    kl = product / total[0] - log_sum[0] + log_sum
    changes = torch.zeros(len(hiddens), len(MEASURES), len(labels), device=weight.device)
    changes[..., counted] = torch.stack([log_sum - label_logits, kl, change], dim=1).float()
    return changes


def _compare(is_first: bool, logits: Tensor, whole: Tensor, likelihoods: Tensor, results: Tensor) -> None:
    """Compares this rank's logits of a token block with those of the whole network, which the first call keeps.

    Args:
        is_first: whether they are the whole network's.
        logits: `[tokens, vocab/tp]`; overwritten.
        whole, likelihoods: float32 of the same size, for the whole network's logits and their exponentials.
        results: float32 `[4, tokens]`, see `compare_outputs`.
    """
    for rows in in_blocks(logits, whole, likelihoods, results.T):
        z, z_whole, exponentials, sums = rows[0].float(), rows[1], rows[2], rows[3].T
        largest = z.amax(1)
        if is_first:
            z_whole.copy_(z)
            change = z
        else:
            change = z_whole - z
            sums[2] = torch.linalg.vecdot(exponentials, change)
        sums[0], sums[3] = largest, torch.linalg.vecdot(change, change)
        powers = torch.sub(z, largest[:, None], out=exponentials if is_first else z).exp_()
        sums[1] = powers.sum(1)
