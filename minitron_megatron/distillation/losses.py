"""Divergences between the next-token distributions of a student and its teacher.

Every divergence is written in terms of log-probabilities and one operation, the sum over the vocabulary. With a plain
sum it is the definition, on one device and whole logits; `linear_losses` passes a sum over the ranks that share the
vocabulary, and a chunk of tokens at a time.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_megatron.config.loss import Divergence, LogitsConfig

Total = Callable[[Tensor], Tensor]
"""Sums over the whole vocabulary, `[tokens, vocab]` to `[tokens]`."""


def _sum(x: Tensor) -> Tensor:
    return x.sum(-1)


def forward_kl(student: Tensor, teacher: Tensor, total: Total = _sum) -> Tensor:
    """Computes KL(teacher || student) of every token (Minitron, 2407.14679, section 3).

    Args:
        student, teacher: log-probabilities `[tokens, vocab]`.
        total: the sum over the vocabulary.

    Returns:
        `[tokens]`, in nats.
    """
    return total(teacher.exp() * (teacher - student))


def reverse_kl(student: Tensor, teacher: Tensor, total: Total = _sum) -> Tensor:
    """Computes KL(student || teacher); see `forward_kl`."""
    return forward_kl(teacher, student, total)


def jensen_shannon(student: Tensor, teacher: Tensor, total: Total, beta: float) -> Tensor:
    """Computes beta KL(teacher || m) + (1 - beta) KL(student || m) with m = beta teacher + (1 - beta) student (GKD,
    2306.13649, equation 1); see `forward_kl`."""
    mixture = _mixture(teacher, student, beta)
    return beta * forward_kl(mixture, teacher, total) + (1 - beta) * forward_kl(mixture, student, total)


def skewed_kl(student: Tensor, teacher: Tensor, total: Total, skew: float) -> Tensor:
    """Computes KL(teacher || skew teacher + (1 - skew) student) (DistiLLM, 2402.03898, eq. 4); see `forward_kl`."""
    return forward_kl(_mixture(teacher, student, skew), teacher, total)


def total_variation(student: Tensor, teacher: Tensor, total: Total = _sum) -> Tensor:
    """Computes half the sum of absolute differences of the probabilities, between 0 and 1; see `forward_kl`."""
    return total((teacher.exp() - student.exp()).abs()) / 2


def squared_error(student: Tensor, teacher: Tensor, total: Total = _sum) -> Tensor:
    """Computes the sum of squared differences of the probabilities, between 0 and 2; see `forward_kl`.

    It compares probabilities, as in Minitron's section 3. It is a sum because a mean over the vocabulary would vanish.
    """
    return total((teacher.exp() - student.exp()).square())


def cosine_distance(student: Tensor, teacher: Tensor, total: Total = _sum) -> Tensor:
    """Computes 1 - cosine of the probabilities, as vectors; see `forward_kl`."""
    p, q = student.exp(), teacher.exp()
    return 1 - total(p * q) * (total(p.square()) * total(q.square())).rsqrt()


def divergence(student: Tensor, teacher: Tensor, config: LogitsConfig, total: Total = _sum) -> Tensor:
    """Computes the configured divergence of log-probabilities at the configured temperature; see `forward_kl`."""
    match config.divergence:
        case Divergence.JENSEN_SHANNON:
            value = jensen_shannon(student, teacher, total, config.beta)
        case Divergence.SKEWED_KL:
            value = skewed_kl(student, teacher, total, config.skew)
        case kind:
            value = _PLAIN[kind](student, teacher, total)
    return value * config.scale


_PLAIN = {
    Divergence.FORWARD_KL: forward_kl,
    Divergence.REVERSE_KL: reverse_kl,
    Divergence.TOTAL_VARIATION: total_variation,
    Divergence.MSE: squared_error,
    Divergence.COSINE: cosine_distance,
}


def _mixture(first: Tensor, second: Tensor, share: float) -> Tensor:
    """Computes the log-probabilities of the mixture share * first + (1 - share) * second."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def on_top_k(student: Tensor, teacher: Tensor, top_k: int, tail: bool) -> tuple[Tensor, Tensor]:
    """Restricts both distributions to the teacher's `top_k` tokens.

    Args:
        student, teacher: log-probabilities `[tokens, vocab]`.
        top_k: tokens that are kept.
        tail: whether all other tokens count as one more; else the teacher's probabilities are made to sum to one.

    Returns:
        log-probabilities of student and teacher, `[tokens, top_k (+ 1)]`.
    """
    kept, columns = teacher.topk(top_k, dim=-1)
    own = student.gather(1, columns)
    if not tail:
        return own, kept - kept.logsumexp(-1, keepdim=True)
    others = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, columns, True)
    tails = [x.masked_fill(others, -torch.inf).logsumexp(-1, keepdim=True) for x in (student, teacher)]
    return torch.cat([own, tails[0]], dim=1), torch.cat([kept, tails[1]], dim=1)


def distillation_loss(
    student_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    teacher_logits: Tensor | None,
    kd_weight: float,
    lm_weight: float,
    config: LogitsConfig | None = None,
) -> Tensor:
    """Computes the weighted sum of divergence and cross-entropy over the tokens that `mask` counts.

    Args:
        student_logits: `[tokens, vocab]`.
        labels: `[tokens]`.
        mask: `[tokens]`, 1 for tokens that count.
        teacher_logits: `[tokens, vocab]`, or None where `kd_weight` is 0.
        kd_weight, lm_weight: of divergence and cross-entropy.
        config: which divergence; None for forward KL.

    Returns:
        a sum, not a mean: divide by the global number of valid tokens.
    """
    loss = lm_weight * F.cross_entropy(student_logits, labels, reduction="none")
    if teacher_logits is not None:
        config = config or LogitsConfig()
        student, teacher = (
            (logits / config.temperature).log_softmax(-1) for logits in (student_logits, teacher_logits)
        )
        if config.top_k:
            student, teacher = on_top_k(student, teacher, config.top_k, config.tail)
        loss = loss + kd_weight * divergence(student, teacher, config)
    return torch.sum(loss * mask)
