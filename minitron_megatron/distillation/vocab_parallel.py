"""Softmaxes over a vocabulary whose rows a tensor-parallel group splits."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from minitron_megatron.parallel.collectives import sum_over


class LogSumExp(torch.autograd.Function):
    """Log-sum-exp over a vocabulary that a group splits: `[tokens, rows of this rank]` to `[tokens]`.

    Each rank uses the result for its own rows, so the backward pass sums the ranks' gradients of it.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, group: dist.ProcessGroup) -> Tensor:
        largest = _largest(logits, group)
        log_sum = sum_over((logits - largest[:, None]).exp_().sum(1), group).log_().add_(largest)
        ctx.save_for_backward(logits, log_sum)
        ctx.group = group
        return log_sum

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        logits, log_sum = ctx.saved_tensors
        return sum_over(grad.clone(), ctx.group)[:, None] * (logits - log_sum[:, None]).exp_(), None


def log_softmax(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Computes the log-probabilities of this rank's rows, `[tokens, rows of this rank]`."""
    return logits - LogSumExp.apply(logits, group)[:, None]


def own_rows(weight: Tensor, padded_vocab: int, group: dist.ProcessGroup) -> Tensor:
    """Returns this rank's rows of a whole output weight, as a vocabulary of any size is split.

    Args:
        weight: `[rows, hidden]`.
        padded_vocab: rows over all ranks. Those that the weight does not have are zero, and no loss may count them.
        group: tensor-parallel group.
    """
    size = padded_vocab // group.size()
    own = weight[group.rank() * size :][:size]
    rows = weight.new_zeros(size, weight.shape[1])
    rows[: len(own)] = own
    return rows


def gather_columns(values: Tensor, columns: Tensor) -> Tensor:
    """Returns `values[i, columns[i]]`; on a rank without rows zeros, whose backward pass joins the collectives too."""
    return values.gather(1, columns) if values.size(1) else values.sum(1, keepdim=True).expand_as(columns)


def _largest(logits: Tensor, group: dist.ProcessGroup) -> Tensor:
    if logits.size(1):
        largest = logits.amax(1)
    else:
        largest = logits.new_full((logits.size(0),), -torch.inf)
    if group.size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    return largest


def softmaxes(logits: list[Tensor], group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Replaces the logits of this rank's rows by the softmax over these rows, in place.

    Returns:
        log-sum-exp over all ranks `[len(logits), tokens]`, and this rank's share of the sum of exponentials, the factor
        that turns its softmax into probabilities.
    """
    largest = logits[0].new_full((len(logits), len(logits[0])), -torch.inf)
    sums = torch.zeros_like(largest)  # of the exponentials of logits minus the largest
    if logits[0].size(1):
        for number, part in enumerate(logits):
            largest[number] = part.amax(1)
            torch.softmax(part, 1, out=part)
            sums[number] = part.amax(1).reciprocal_()
    if group.size() == 1:
        return largest.add_(sums.log_()), torch.ones_like(sums)
    own = torch.stack([largest, sums])
    of_ranks = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(of_ranks, own, group=group)
    largest, sums = torch.stack(of_ranks, dim=1)
    top = largest.amax(0)
    sums *= (largest - top).exp_()
    total = sums.sum(0)
    return top + total.log(), sums[group.rank()] / total
