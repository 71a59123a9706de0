"""Computes losses directly from hidden states, a chunk of tokens at a time.

Output projection, vocab-parallel softmaxes, losses and their gradients are one pass over each chunk, so full-vocabulary
logits of all tokens never exist. With p the student's and q the teacher's distribution, the gradient of
`kd * KL(q || p) + lm * CE` by the student's logits is `(kd + lm) * p - kd * q - lm * onehot(label)`, and is computed
analytically. With a temperature t, the divergence uses p and q at that temperature, and its gradient has
`kd * scale / t` in place of kd, where scale is t squared or 1. Autograd differentiates any other divergence of
`losses`, on a chunk of logits.

Matrix products run in the dtype of the hidden states, softmaxes and losses in float32. The gradient of the output
weight is accumulated over chunks in float32 (all in float64 if the hidden states are).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from torch import Tensor

from minitron_megatron.config.loss import LogitsConfig
from minitron_megatron.distillation.losses import divergence
from minitron_megatron.distillation.sparse_predictions import (
    SampledPredictions,
    SparsePredictions,
    TopPredictions,
    most_likely,
    on_top,
    own_columns,
)
from minitron_megatron.distillation.vocab_parallel import gather_columns, log_softmax, softmaxes
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.cpu import bypass_cpu_mode

# On the CPU, softmaxes run on blocks of tokens that stay in a core's cache; 2^18 float32 are 1 MiB.
_CACHE_ELEMENTS = 2**18

# Rows of the output weight whose gradient is computed at a time: the temporary is small beside the weight, and on the
# CPU still in the cache when it is added to the sum.
_WEIGHT_ROWS = 4096


class Predictions(NamedTuple):
    """A model's predictions before the output projection: last hidden states `[tokens, hidden]` and output weight
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
    teacher: Predictions | SparsePredictions | None = None,
    kd_weight: float = 0.0,
    lm_weight: float = 1.0,
    chunk_tokens: int = 512,
    config: LogitsConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes the weighted sum of divergence and cross-entropy over valid tokens.

    Under tensor parallelism every rank holds all tokens and its rows of the output weights. The gradient of `hidden` is
    this rank's share; the tensor-parallel region that `hidden` comes from sums it over the ranks.

    Args:
        hidden: the student's last hidden states `[tokens, hidden]`.
        weight: the student's output weight `[vocab/tp, hidden]`. If it has Megatron's `main_grad`, its
            gradient is added there in float32.
        labels: next tokens `[tokens]`.
        mask: `[tokens]`, 1 for tokens that count.
        group: tensor-parallel group.
        vocab: tokens of the tokenizer; rows beyond it pad the vocabulary and are ignored.
        teacher: the teacher's predictions, for the whole vocabulary or for a few tokens of it, which are taken to be at
            the temperature of `config`; None only if `kd_weight` is 0.
        kd_weight: weight of the divergence.
        lm_weight: weight of the cross-entropy.
        chunk_tokens: tokens whose logits exist at one time.
        config: which divergence; None for KL(teacher || student).

    Returns:
        the loss (a sum, not a mean), and its unweighted terms, float64 `[divergence, cross-entropy]` without gradient;
        the same on every rank of `group`.
    """
    assert teacher is not None or kd_weight == 0
    config = config or LogitsConfig()
    # Asked here, because inside an autograd function gradients are always off.
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _LinearDistillationLoss.apply(
        hidden, weight, labels, mask, group, vocab, teacher, kd_weight, lm_weight, chunk_tokens, config, needs_grad
    )


class _LinearDistillationLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        mask: Tensor,
        group: dist.ProcessGroup,
        vocab: int,
        teacher: Predictions | SparsePredictions | None,
        kd_weight: float,
        lm_weight: float,
        chunk_tokens: int,
        config: LogitsConfig,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor]:
        first_row = group.rank() * weight.size(0)
        num_rows = min(max(vocab - first_row, 0), weight.size(0))
        local_labels = labels - first_row
        grads = (torch.empty_like(hidden), torch.zeros_like(weight, dtype=_precise(weight))) if needs_grad else None
        terms = torch.zeros(2, dtype=torch.float64, device=hidden.device)
        options = _Options(group, kd_weight, lm_weight, needs_grad, config, first_row)
        project = Projection(Predictions(hidden, weight), chunk_tokens, num_rows)
        of_teacher: Callable[[slice], Tensor | SparsePredictions] | None = None
        if isinstance(teacher, Predictions):
            of_teacher = Projection(teacher, chunk_tokens, num_rows)
        elif teacher is not None:
            of_teacher = teacher.part
        # The ranks sum over their rows block by block, so the block must not depend on how many rows are not padding.
        block = _block(chunk_tokens, weight.size(0), weight.is_cuda)

        for start in range(0, hidden.size(0), chunk_tokens):
            rows = slice(start, start + chunk_tokens)
            logits = project(rows)
            target = of_teacher(rows) if of_teacher else None
            text = local_labels[rows], mask[rows]
            if isinstance(target, SampledPredictions):
                with bypass_cpu_mode():
                    kd, ce, grad = _sampled_chunk(logits, target, *text, options, block)
            elif target is None or (isinstance(target, Tensor) and config.is_whole_forward_kl):
                with bypass_cpu_mode():
                    kd, ce, grad = _kl_chunk(logits, target, *text, options, block)
            else:
                kd, ce, grad = _any_chunk(logits, target, *text, options)
            terms += torch.stack([kd, ce])
            if grads:
                grad_hidden, grad_weight = grads
                torch.mm(grad, weight[:num_rows], out=grad_hidden[rows])
                for first in range(0, num_rows, _WEIGHT_ROWS):
                    of_weight = slice(first, min(first + _WEIGHT_ROWS, num_rows))
                    grad_weight[of_weight].add_(torch.mm(grad[:, of_weight].T, hidden[rows]))

        ctx.weight, ctx.grads = weight, grads
        loss = (kd_weight * terms[0] + lm_weight * terms[1]).to(_precise(hidden))
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        weight, (grad_hidden, grad_weight) = ctx.weight, ctx.grads
        ctx.grads = None
        if hasattr(weight, "main_grad"):
            weight.main_grad.addcmul_(grad_weight, grad_loss)
            # Megatron's protocol for gradients that are in `main_grad` already: its hook must still fire. For a weight
            # tied to the embedding on this stage (zero_out_wgrad), the embedding's gradient makes it fire.
            if getattr(weight, "zero_out_wgrad", False):
                grad_weight = None
            else:
                weight.grad_added_to_main_grad = True
                grad_weight = torch.empty_like(weight)
        else:
            grad_weight = grad_weight.mul_(grad_loss).to(weight.dtype)
        return grad_hidden.mul_(grad_loss), grad_weight, *[None] * 10


class Projection:
    """Projects hidden states to logits `[tokens, rows of this rank]`, a chunk of tokens at a time.

    Every chunk overwrites the one before: memory that is new to the process costs more than the matrix product.
    """

    def __init__(self, predictions: Predictions, chunk_tokens: int, num_rows: int):
        self.hidden = predictions.hidden
        self.weight = predictions.weight[:num_rows]
        self.buffer = self.hidden.new_empty((min(chunk_tokens, self.hidden.size(0)), num_rows))

    def __call__(self, tokens: slice) -> Tensor:
        hidden = self.hidden[tokens]
        return torch.mm(hidden, self.weight.T, out=self.buffer[: hidden.size(0)])


def _block(num_rows: int, num_columns: int, is_cuda: bool) -> int:
    """Returns how many rows of a matrix to work on at a time: on the CPU as many as fit into its cache, on CUDA all."""
    return max(1, num_rows if is_cuda else _CACHE_ELEMENTS // num_columns)


def _precise(tensor: Tensor) -> torch.dtype:
    """Returns the dtype of softmaxes, losses and sums over tokens."""
    return torch.promote_types(tensor.dtype, torch.float32)


class _Options(NamedTuple):
    """What is computed of every chunk: weights of divergence and cross-entropy, which divergence, this rank's rows."""

    group: dist.ProcessGroup
    kd_weight: float
    lm_weight: float
    needs_grad: bool
    config: LogitsConfig
    first_row: int


def _kl_chunk(
    logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, mask: Tensor, options: _Options, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes KL and cross-entropy summed over a chunk, and the gradient by the logits in their dtype.

    The gradient overwrites `logits` `[tokens, rows of this rank]`, `block` tokens at a time.
    """
    group, kd_weight, lm_weight, needs_grad, config, _ = options
    num_tokens, num_rows = logits.shape
    dtype = _precise(logits)
    labelled, label_columns = own_columns(labels, num_rows)
    label_logits = _zero_unless(labelled, logits, label_columns)
    mask = mask.to(dtype)
    has_teacher = teacher_logits is not None
    # With a temperature, divergence and cross-entropy use different probabilities.
    is_tempered = has_teacher and config.temperature != 1
    kd_slope = kd_weight * config.scale / config.temperature if has_teacher else 0.0
    # Reused by every block, because newly allocated results are not in the cache. In this order: the student's, and if
    # needed the teacher's, their difference, and the student's without the temperature.
    num_parts = 1 + 2 * has_teacher + is_tempered
    work = torch.empty(num_parts, min(block, num_tokens), num_rows, device=logits.device, dtype=dtype)
    sums_of_blocks = []
    products = torch.zeros(num_tokens, device=logits.device, dtype=dtype)

    for start in range(0, num_tokens, block):
        rows = slice(start, start + block)
        student, *parts = work[:, : logits[rows].size(0)]
        softened = [student.copy_(logits[rows])]
        if teacher_logits is not None:
            target, difference, *untempered = parts
            softened += [target.copy_(teacher_logits[rows]), *(part.copy_(student) for part in untempered)]
            if is_tempered:
                student.div_(config.temperature)
                target.div_(config.temperature)
            torch.sub(target, student, out=difference)
        of_block, shares = softmaxes(softened, group)
        sums_of_blocks.append(of_block)
        if has_teacher:
            # sum_v q (z_t - z_s), the divergence's sum over the vocabulary
            products[rows] = difference.mul_(target).sum(1).mul_(shares[1])
        if needs_grad:
            counts = mask[rows]
            factors = (shares * counts).unsqueeze(-1)
            student.mul_(factors[0] * (kd_slope if is_tempered else kd_slope + lm_weight))
            if has_teacher:
                student.addcmul_(target, factors[1] * -kd_slope)
            if is_tempered and lm_weight:
                student.addcmul_(softened[2], factors[2] * lm_weight)
            if lm_weight and num_rows:
                student.scatter_add_(1, label_columns[rows, None], (-lm_weight * counts * labelled[rows])[:, None])
            logits[rows] = student

    log_sums = torch.cat(sums_of_blocks, dim=1)
    label_logits, products = sum_over(torch.stack([label_logits, products]), group)
    mask = mask.double()
    ce = ((log_sums[2 if is_tempered else 0] - label_logits) * mask).sum()
    kl = torch.zeros_like(ce)
    if has_teacher:
        kl = config.scale * ((products - log_sums[1] + log_sums[0]) * mask).sum()
    return kl, ce, logits


def _sampled_chunk(
    logits: Tensor, target: SampledPredictions, labels: Tensor, mask: Tensor, options: _Options, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the same as `_kl_chunk`, of drawn tokens: their mean cross-entropy, less the teacher's entropy."""
    group, kd_weight, lm_weight, needs_grad, config, first_row = options
    num_tokens, num_rows = logits.shape
    dtype = _precise(logits)
    mask = mask.to(dtype)
    labelled, label_columns = own_columns(labels, num_rows)
    is_own, columns = own_columns(target.ids - first_row, num_rows)
    shares = target.shares.to(dtype) * is_own
    is_tempered = config.temperature != 1
    kd_slope = kd_weight * config.scale / config.temperature
    label_logits = _zero_unless(labelled, logits, label_columns)
    drawn_logits = (gather_columns(logits, columns).to(dtype) * shares).sum(1) / config.temperature
    work = torch.empty(1 + is_tempered, min(block, num_tokens), num_rows, device=logits.device, dtype=dtype)
    sums_of_blocks = []

    for start in range(0, num_tokens, block):
        rows = slice(start, start + block)
        student, *tempered = work[:, : logits[rows].size(0)]
        student.copy_(logits[rows])
        for part in tempered:
            torch.div(student, config.temperature, out=part)
        of_block, own_sums = softmaxes([student, *tempered], group)
        sums_of_blocks.append(of_block)
        if needs_grad:
            counts = mask[rows]
            factors = (own_sums * counts).unsqueeze(-1)
            student.mul_(factors[0] * (lm_weight if is_tempered else kd_slope + lm_weight))
            for part in tempered:
                student.addcmul_(part, factors[1] * kd_slope)
            if num_rows:
                student.scatter_add_(1, columns[rows], shares[rows] * (-kd_slope * counts)[:, None])
                student.scatter_add_(1, label_columns[rows, None], (-lm_weight * counts * labelled[rows])[:, None])
            logits[rows] = student

    log_sums = torch.cat(sums_of_blocks, dim=1)
    label_logits, drawn_logits = sum_over(torch.stack([label_logits, drawn_logits]), group)
    mask = mask.double()
    ce = ((log_sums[0] - label_logits) * mask).sum()
    kl = config.scale * ((log_sums[-1] - drawn_logits - target.entropy) * mask).sum()
    return kl, ce, logits


def _any_chunk(
    logits: Tensor, target: Tensor | TopPredictions, labels: Tensor, mask: Tensor, options: _Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the same as `_kl_chunk` for any divergence, with autograd's gradient."""
    group, kd_weight, lm_weight, needs_grad, config, first_row = options
    labelled, label_columns = (values[:, None] for values in own_columns(labels, logits.size(1)))
    if isinstance(target, Tensor):
        target = target.to(_precise(logits)) / config.temperature
        if config.top_k:
            target = most_likely(target, config.top_k, first_row, group, with_rest=config.tail)

    def total(x: Tensor) -> Tensor:
        """Sums over the vocabulary of all ranks, with a backward pass for a result that every rank has."""
        return reduce_from_tensor_model_parallel_region(x.sum(-1), group=group)

    with torch.set_grad_enabled(needs_grad):
        student = logits.to(_precise(logits)).detach().requires_grad_(needs_grad)
        of_labels = gather_columns(log_softmax(student, group), label_columns)
        ce = -total(of_labels * labelled)
        at_temperature = student / config.temperature
        if isinstance(target, TopPredictions):
            own, of_teacher, is_own = on_top(at_temperature, target, config.tail, first_row, group)
            kd = divergence(own, of_teacher, config, lambda x: total(x * is_own))
        else:
            kd = divergence(log_softmax(at_temperature, group), log_softmax(target, group), config, total)
        kd, ce = kd * mask, ce * mask
        if needs_grad:
            [grad] = torch.autograd.grad((kd_weight * kd + lm_weight * ce).sum(), student)
            logits.copy_(grad)
    return kd.detach().sum(dtype=torch.float64), ce.detach().sum(dtype=torch.float64), logits


def _zero_unless(condition: Tensor, logits: Tensor, columns: Tensor) -> Tensor:
    return torch.where(condition, gather_columns(logits, columns[:, None])[:, 0].to(_precise(logits)), 0.0)
