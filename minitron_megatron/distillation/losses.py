"""The losses, plainly: on one device, on whole logits, differentiated by autograd.

These are the definitions that `linear_losses` is tested against, and short enough to read at a glance.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) of every token (Minitron, 2407.14679, section 3).

    Args:
        student_logits, teacher_logits: `[tokens, vocab]`.

    Returns:
        `[tokens]`, in nats.
    """
    student, teacher = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (teacher.exp() * (teacher - student)).sum(-1)


def distillation_loss(
    student_logits: Tensor,
    labels: Tensor,
    mask: Tensor,
    teacher_logits: Tensor | None,
    kd_weight: float,
    lm_weight: float,
) -> Tensor:
    """The weighted sum of KL and cross-entropy over the tokens that `mask` counts.

    Args:
        student_logits: `[tokens, vocab]`.
        labels: `[tokens]`.
        mask: `[tokens]`, 1 for tokens that count.
        teacher_logits: `[tokens, vocab]`, or None where `kd_weight` is 0.

    Returns:
        a sum, not a mean: divide by the global number of valid tokens.
    """
    loss = lm_weight * F.cross_entropy(student_logits, labels, reduction="none")
    if teacher_logits is not None:
        loss = loss + kd_weight * forward_kl(student_logits, teacher_logits)
    return torch.sum(loss * mask)
