"""Losses taken straight from hidden states, a chunk of tokens at a time.

Output projection, vocab-parallel softmaxes, losses and their analytic gradients are one pass over each
chunk, so that full-vocabulary logits of neither model ever exist. With p the student's and q the teacher's
distribution, the gradient of `kd * KL(q || p) + lm * CE` by the student's logits is
`(kd + lm) * p - kd * q - lm * onehot(label)`.

Matrix products run in the number format of the hidden states, softmaxes and losses in float32, and the
gradient of the output weight is accumulated over chunks in float32.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# On the CPU, softmax work is done on blocks of rows that stay in the processor's cache; 2^18 float32 are 1 MiB.
_CACHE_ELEMENTS = 2**18


@dataclass(frozen=True)
class Teacher:
    """What the loss needs of the teacher: its last hidden states `[tokens, hidden]` and output weight
    `[vocab/tp, hidden]`."""

    hidden: Tensor
    weight: Tensor


def linear_distillation_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    mask: Tensor,
    group: dist.ProcessGroup,
    vocab: int,
    teacher: Teacher | None = None,
    kd_weight: float = 0.0,
    lm_weight: float = 1.0,
    chunk_tokens: int = 512,
) -> tuple[Tensor, Tensor]:
    """Weighted sum over valid tokens of KL(teacher || student) and cross-entropy.

    Under tensor parallelism every rank holds all tokens and its rows of the output weights. The gradient of
    `hidden` is this rank's share; the region that `hidden` comes from sums it over the ranks.

    Args:
        hidden: the student's last hidden states `[tokens, hidden]`.
        weight: the student's output weight `[vocab/tp, hidden]`. If it has Megatron's `main_grad`, its
            gradient is added there in float32.
        labels: next tokens `[tokens]`.
        mask: `[tokens]`, 1 for tokens that count.
        group: tensor-parallel group.
        vocab: tokens of the tokenizer; rows beyond it pad the vocabulary and take no part.
        teacher: the teacher's side, where `kd_weight` is not 0.
        kd_weight: weight of the KL divergence.
        lm_weight: weight of the cross-entropy.
        chunk_tokens: tokens whose logits exist at one time.

    Returns:
        the loss (a sum, not a mean), and its unweighted terms `[KL, cross-entropy]` without gradient;
        the same on every rank of `group`.
    """
    assert teacher is not None or kd_weight == 0
    # Inside an autograd function gradients are off always, and its own flags know nothing of `no_grad` around it.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearDistillationLoss.apply(
        hidden, weight, labels, mask, group, vocab, teacher, kd_weight, lm_weight, chunk_tokens, needs_grad
    )


class _LinearDistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden, weight, labels, mask, group, vocab, teacher, kd_weight, lm_weight, chunk_tokens, needs_grad
    ):
        first_row = group.rank() * weight.size(0)
        num_rows = min(max(vocab - first_row, 0), weight.size(0))
        local_labels = labels - first_row
        grad_hidden = torch.empty_like(hidden) if needs_grad else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_grad else None
        terms = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        # Written over by every chunk: memory that is new to the process costs more than the matrix product.
        size = min(chunk_tokens, hidden.size(0)), num_rows
        logits_buffer = hidden.new_empty(size)
        teacher_buffer = hidden.new_empty(size) if teacher else None
        share = torch.empty_like(weight[:num_rows]) if needs_grad else None
        # The ranks sum over their rows block by block, so that the block must not depend on how many of them are true.
        block = _block(chunk_tokens, weight.size(0), weight.is_cuda)

        for start in range(0, hidden.size(0), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = _project(hidden[rows], weight[:num_rows], logits_buffer)
            teacher_logits = None
            if teacher:
                teacher_logits = _project(teacher.hidden[rows], teacher.weight[:num_rows], teacher_buffer)
            kl, ce, grad = _chunk(
                logits, teacher_logits, local_labels[rows], mask[rows], group, kd_weight, lm_weight, needs_grad, block
            )
            terms += torch.stack([kl, ce])
            if needs_grad:
                torch.mm(grad, weight[:num_rows], out=grad_hidden[rows])
                _add_(grad_weight[:num_rows], torch.mm(grad.T, hidden[rows], out=share))

        ctx.weight, ctx.grad_hidden, ctx.grad_weight = weight, grad_hidden, grad_weight
        loss = (kd_weight * terms[0] + lm_weight * terms[1]).float()
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx, grad_loss, _):
        weight, grad_weight = ctx.weight, ctx.grad_weight
        ctx.grad_weight = None
        if hasattr(weight, "main_grad"):
            weight.main_grad.addcmul_(grad_weight, grad_loss)
            # Megatron's protocol for gradients that are in `main_grad` already: its hook must still fire. It marks a
            # weight that is the embedding here too, whose own gradient makes it fire and must be added.
            if getattr(weight, "zero_out_wgrad", False):
                grad_weight = None
            else:
                weight.grad_added_to_main_grad = True
                grad_weight = torch.empty_like(weight)
        else:
            grad_weight = grad_weight.mul_(grad_loss).to(weight.dtype)
        return ctx.grad_hidden.mul_(grad_loss), grad_weight, *[None] * 9


def _project(hidden: Tensor, weight: Tensor, buffer: Tensor) -> Tensor:
    return torch.mm(hidden, weight.T, out=buffer[: hidden.size(0)])


def _add_(total: Tensor, share: Tensor) -> None:
    """`total += share` for two number formats; the converted copy that this takes on a CPU stays in its cache."""
    block = _block(*total.shape, total.is_cuda)
    for start in range(0, total.size(0), block):
        total[start : start + block] += share[start : start + block]


def _block(num_rows: int, num_columns: int, is_cuda: bool) -> int:
    """Rows of a matrix to work on at a time: on the CPU what its cache holds, on CUDA all; at least one."""
    return max(1, num_rows if is_cuda else _CACHE_ELEMENTS // num_columns)


def _chunk(logits, teacher_logits, labels, mask, group, kd_weight, lm_weight, needs_grad, block):
    """KL and cross-entropy summed over a chunk, and the gradient by the logits in their number format.

    All of `logits` and `teacher_logits` `[tokens, rows of this rank]` is overwritten, `block` tokens at a time.
    """
    num_tokens, num_rows = logits.shape
    labelled = (labels >= 0) & (labels < num_rows)
    label_columns = labels.clamp(0, max(num_rows - 1, 0))
    label_logits = _zero_unless(labelled, logits, label_columns)
    mask = mask.float()
    # Reused by every block: results that are allocated each time leave the cache.
    work = torch.empty(3, min(block, num_tokens), num_rows, device=logits.device)
    log_sums = torch.empty(num_tokens, device=logits.device)
    target_log_sums, products = torch.empty_like(log_sums), torch.empty_like(log_sums)

    for start in range(0, num_tokens, block):
        rows = slice(start, start + block)
        student, target, difference = work[:, : logits[rows].size(0)]
        student.copy_(logits[rows])
        if teacher_logits is not None:
            torch.sub(target.copy_(teacher_logits[rows]), student, out=difference)
        log_sums[rows], scale = _exponentiate(student, group)
        if teacher_logits is not None:
            target_log_sums[rows], target_scale = _exponentiate(target, group)
            # sum_v q (z_t - z_s), the part of the divergence that runs over the vocabulary
            products[rows] = difference.mul_(target).sum(1).mul_(target_scale)
        if needs_grad:
            student.mul_(scale.mul_(mask[rows]).mul_(kd_weight + lm_weight)[:, None])
            if teacher_logits is not None:
                student.addcmul_(target, target_scale.mul_(mask[rows]).mul_(-kd_weight)[:, None])
            if lm_weight and num_rows:
                student.scatter_add_(1, label_columns[rows, None], (-lm_weight * mask[rows] * labelled[rows])[:, None])
            logits[rows] = student

    sums = [label_logits] if teacher_logits is None else [label_logits, products]
    sums = _sum(torch.stack(sums), group)
    mask = mask.double()
    ce = ((log_sums - sums[0]) * mask).sum()
    kl = torch.zeros_like(ce) if teacher_logits is None else ((sums[1] - target_log_sums + log_sums) * mask).sum()
    return kl, ce, logits


def _exponentiate(logits: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Vocab-parallel softmax in parts: turns float32 logits into exponentials, in place.

    Returns:
        log of the sum of exponentials `[tokens]`, and the factor `[tokens]` that makes them probabilities.
    """
    if logits.size(1):
        largest = logits.amax(1)
    else:
        largest = torch.full((logits.size(0),), -torch.inf, device=logits.device)
    if group.size() > 1:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    logits.sub_(largest[:, None]).exp_()
    total = _sum(logits.sum(1), group)
    return total.log().add_(largest), total.reciprocal_()


def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def _zero_unless(condition: Tensor, logits: Tensor, columns: Tensor) -> Tensor:
    if not logits.size(1):
        return torch.zeros_like(condition, dtype=torch.float32)
    return torch.where(condition, logits.gather(1, columns[:, None])[:, 0].float(), 0.0)
