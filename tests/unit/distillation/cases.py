"""Random hidden states and output weights, and the loss of them in two ways."""

import torch

from minitron_megatron.distillation.linear_losses import Predictions, linear_distillation_loss
from minitron_megatron.distillation.losses import distillation_loss
from tests.rounding import of_rounded

TOKENS, STUDENT, TEACHER, VOCAB, PADDED = 23, 10, 14, 37, 64


class Case:
    """Random hidden states and output weights of a student and a teacher; padding rows are far from zero."""

    def __init__(self, vocab=VOCAB, padded=PADDED, dtype=torch.float32, config=None):
        generator = torch.Generator().manual_seed(0)

        def random(*size):
            return torch.randn(*size, generator=generator, dtype=dtype)

        self.vocab, self.config = vocab, config
        self.hidden, self.weight = random(TOKENS, STUDENT), random(padded, STUDENT)
        self.teacher = Predictions(random(TOKENS, TEACHER), random(padded, TEACHER))
        # Where padding took part it would drown the rest.
        self.weight[vocab:] *= 20
        self.teacher.weight[vocab:] *= 20
        self.labels = torch.randint(0, vocab, (TOKENS,), generator=generator)
        self.mask = (torch.rand(TOKENS, generator=generator) > 0.3).float()

    def plain(self, kd_weight, lm_weight, scale=1.0):
        """Loss, and its gradients by hidden states and weights, by autograd in float64."""
        hidden, weight = (x.double().clone().requires_grad_() for x in (self.hidden, self.weight))
        teacher_logits = self.teacher.hidden.double() @ self.teacher.weight.double()[: self.vocab].T
        logits = hidden @ weight[: self.vocab].T
        loss = distillation_loss(logits, self.labels, self.mask, teacher_logits, kd_weight, lm_weight, self.config)
        (scale * loss).backward()
        return loss.item(), hidden.grad, weight.grad

    def in_its_formats(self, kd_weight, lm_weight, scale=1.0):
        """As `plain`, with products and gradients in the number formats of the inputs, and the loss in float32 (in
        float64 where the inputs are)."""
        precise = torch.promote_types(self.hidden.dtype, torch.float32)
        hidden, weight = (x.detach().clone().requires_grad_() for x in (self.hidden, self.weight))
        teacher_logits = (self.teacher.hidden @ self.teacher.weight[: self.vocab].T).to(precise)
        logits = (hidden @ weight[: self.vocab].T).to(precise)
        loss = distillation_loss(logits, self.labels, self.mask, teacher_logits, kd_weight, lm_weight, self.config)
        (scale * loss).backward()
        return loss.item(), hidden.grad, weight.grad

    def loss_error(self, kd_weight, lm_weight):
        """By how much the loss may be off for logits that are rounded to the number formats of the inputs."""
        products = (self.hidden, self.weight), (self.teacher.hidden, self.teacher.weight)
        logits = [(a.double() @ b.double()[: self.vocab].T).requires_grad_() for a, b in products]
        distillation_loss(logits[0], self.labels, self.mask, logits[1], kd_weight, lm_weight, self.config).backward()
        formats = self.hidden.dtype, self.teacher.hidden.dtype
        return of_rounded((z.detach(), z.grad, dtype) for z, dtype in zip(logits, formats, strict=True))

    def linear(self, group, kd_weight, lm_weight, chunk_tokens, scale=1.0, weight=None):
        """The same from `linear_distillation_loss`, on this rank's rows, and the two terms."""
        share = self.weight.size(0) // group.size()
        rows = slice(group.rank() * share, (group.rank() + 1) * share)
        hidden = self.hidden.clone().requires_grad_()
        weight = self.weight[rows].clone().requires_grad_() if weight is None else weight
        teacher = Predictions(self.teacher.hidden, self.teacher.weight[rows]) if kd_weight else None
        loss, terms = linear_distillation_loss(
            hidden,
            weight,
            self.labels,
            self.mask,
            group,
            self.vocab,
            teacher,
            kd_weight,
            lm_weight,
            chunk_tokens,
            self.config,
        )
        assert not terms.requires_grad
        (scale * loss).backward()
        return loss.item(), hidden.grad, weight.grad, terms
