"""Losses between hidden states of a student and its teacher, each on the stage that has the student's state.

A loss enters the backward pass at its state: an autograd function passes the state on and adds the loss's gradient to
the state's. So the schedules and the messages between stages stay as they are.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from minitron_megatron.config.loss import HiddenConfig, HiddenLoss
from minitron_megatron.distillation.pairs import resolve_pairs
from minitron_megatron.distillation.projections import projections_of
from minitron_megatron.distillation.taps import ModuleOutput, module_at, pipeline_rank_of, state_of
from minitron_megatron.distillation.teachers import Targets, Wanted
from minitron_megatron.model.network import Network
from minitron_megatron.parallel.collectives import gather_dim, sum_over
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.schedule import Batch, own_tokens

# Tokens that are compared with all others at one time, which bounds memory.
_CONTRAST_TOKENS = 1024


class HiddenDistance:
    """Distance between states of the student and its teacher, averaged over pairs of states.

    Args:
        config: which pairs, and how to compare them. `weight` and `balance` are not used here.
        student: this rank's student, with its projections; see `add_projections`.
        networks: of the whole student and teacher.
        ctx: this rank's place.

    Attributes:
        pairs: all of them, on every rank.
    """

    name = "kd_hidden"

    def __init__(
        self,
        config: HiddenConfig,
        student: Sequence[GPTModel],
        networks: tuple[Network, Network],
        ctx: ParallelContext,
    ):
        self.config = config
        self.ctx = ctx
        self.pairs = resolve_pairs(config, *networks)
        self.pair_names = [pair.name for pair in self.pairs]
        num_layers = len(networks[0].layers)
        self.wanted = Wanted(
            states=tuple(
                (pair.teacher_tap, pipeline_rank_of(pair.student_tap, num_layers, ctx.layout)) for pair in self.pairs
            )
        )
        modules = ((number, module_at(student, pair.student_tap)) for number, pair in enumerate(self.pairs))
        self._modules = {number: module for number, module in modules if module is not None}
        self._projections = projections_of(student, self.pairs)

    def problems(self, vocab: int) -> list[str]:
        """Returns what is wrong with its settings. `hidden_problems` checks them against the networks."""
        return self.config.problems()

    @contextmanager
    def watch(self, batches: Sequence[Batch], targets: Targets, weight: float, training: bool) -> Iterator[Tensor]:
        """Adds the losses while the student runs over the micro-batches; see `StateObjective`."""
        sums = torch.zeros(2, len(self.pairs), dtype=torch.float64, device=self.ctx.device)
        masks = [own_tokens(batch["loss_mask"], self.ctx) for batch in batches]
        scales: dict[int, Tensor] = {}
        calls: Counter[int] = Counter()

        def compare(number: int, output: ModuleOutput) -> ModuleOutput | None:
            # A recomputed layer runs first without gradients, and with them in the backward pass, which is the run that
            # counts. Backward passes take the micro-batches in the order of the forward passes.
            if torch.is_grad_enabled() != training:
                return None
            if not calls and training and self.config.loss is HiddenLoss.SQUAREHEAD:
                scales.update(self._scales(targets, masks))
            batch_number = calls[number]
            calls[number] += 1
            tap, mask = self.pairs[number].teacher_tap, masks[batch_number]
            target = targets.state(tap, batch_number)
            targets.release(tap, batch_number)
            projection = self._projections[number]
            scale = weight / len(self.pairs) * scales.get(number, 1.0)
            weights = None if projection is None else projection.weight
            compare_all = partial(_errors, kind=self.config.loss)
            if self.config.loss is HiddenLoss.INFONCE:
                compare_all = self._contrast(target, mask)
            error, loss = _StateLoss.apply(state_of(output), weights, target, mask, compare_all, scale)
            sums[:, number] += torch.stack([error.detach(), _denominator(target, mask, self.config.loss)])
            return _attach(output, loss) if training else None

        with ExitStack() as stack:
            for number, module in self._modules.items():
                hook = module.register_forward_hook(lambda module, args, output, n=number: compare(n, output))
                stack.callback(hook.remove)
            yield sums
        if not self.ctx.layout.sequence and self.ctx.tensor_rank > 0:
            sums.zero_()  # every tensor rank has the same sums; one counts

    def _contrast(self, target: Tensor, mask: Tensor) -> "_Contrast":
        """Gathers the teacher's states of a micro-batch over all ranks that hold tokens. Collective for them."""
        states, counts, first = target.flatten(0, 1), mask.flatten(), 0
        groups = [self.ctx.collection.tp] if self.ctx.layout.sequence else []
        for group in (*groups, self.ctx.collection.dp):
            first += group.rank() * len(states)
            states, counts = gather_dim(states, group, dim=0), gather_dim(counts, group, dim=0)
        return _Contrast(F.normalize(_wide(states), dim=-1), counts > 0, first, self.config.temperature)

    def _scales(self, targets: Targets, masks: list[Tensor]) -> dict[int, Tensor]:
        """Returns for each pair of this stage the number of tokens divided by the sum of the teacher's mean squares.

        Both are sums over the whole step and all ranks that hold tokens. With this factor, the mean over tokens is the
        quotient of the sums (2310.06927, section 3.1).
        """
        both = torch.zeros(2, len(self._modules), dtype=torch.float64, device=self.ctx.device)
        for column, number in enumerate(self._modules):
            for batch_number, mask in enumerate(masks):
                target = targets.state(self.pairs[number].teacher_tap, batch_number)
                both[:, column] += torch.stack([mask.sum(), _denominator(target, mask, HiddenLoss.SQUAREHEAD)])
        if self.ctx.layout.sequence:
            sum_over(both, self.ctx.collection.tp)
        sum_over(both, self.ctx.collection.dp)
        tokens, squares = both
        return dict(zip(self._modules, (tokens / squares.clamp(min=1e-30)).float(), strict=True))


def _denominator(target: Tensor, mask: Tensor, kind: HiddenLoss) -> Tensor:
    """Returns a micro-batch's part of the loss's denominator: tokens, or the sum of the teacher's mean squares."""
    if kind is HiddenLoss.SQUAREHEAD:
        return (_wide(target).square().mean(-1) * mask).sum()
    return mask.sum()


def _wide(states: Tensor) -> Tensor:
    """Converts states to the dtype of losses, at least float32."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


Compare = Callable[[Tensor, Tensor, slice], Tensor]
"""Computes the distance `[tokens]` of states `[tokens, hidden]` from the teacher's, given which tokens they are."""


def _errors(state: Tensor, target: Tensor, tokens: slice, kind: HiddenLoss) -> Tensor:
    """Computes the distance between two states by themselves; see `Compare`."""
    if kind is HiddenLoss.COSINE:
        return 1 - F.cosine_similarity(state, target, dim=-1)
    return (state - target).square().mean(-1)


@dataclass(frozen=True)
class _Contrast:
    """InfoNCE: how badly a state tells the teacher's state of its own token from those of others, as in contrastive
    representation distillation (1910.10699), with the cosine as the critic; see `Compare`.

    Attributes:
        states: the teacher's, of unit length, of all tokens `[all, hidden]`.
        counts: bool `[all]`, which of them take part.
        first: place of this rank's first token among them.
        temperature: of the softmax over tokens.
    """

    states: Tensor
    counts: Tensor
    first: int
    temperature: float

    def __call__(self, state: Tensor, target: Tensor, tokens: slice) -> Tensor:
        logits = F.normalize(state, dim=-1) @ self.states.T / self.temperature
        own = torch.arange(len(state), device=state.device) + self.first + tokens.start
        # A token that does not count stays among its own candidates, so that its error, which is masked, is finite.
        others = ~self.counts & (torch.arange(len(self.states), device=state.device) != own[:, None])
        return logits.masked_fill(others, -torch.inf).logsumexp(1) - logits.gather(1, own[:, None])[:, 0]


class _StateLoss(torch.autograd.Function):
    """Error of a projected state, summed over valid tokens: unscaled and scaled. Only the scaled one has a gradient.

    The forward pass computes the gradient, so it keeps one tensor in the states' dtype for the backward pass and not
    the float32 ones of the loss. A projection's gradient goes to Megatron's `main_grad` in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        state: Tensor,
        projection: Tensor | None,
        target: Tensor,
        mask: Tensor,
        compare: Compare,
        scale: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        projected = state.detach() if projection is None else F.linear(state.detach(), projection.detach())
        flat, target, mask = projected.flatten(0, 1), target.flatten(0, 1), mask.flatten()
        block = _CONTRAST_TOKENS if isinstance(compare, _Contrast) else max(1, len(flat))
        grads, errors = [], []
        for start in range(0, len(flat), block):
            tokens = slice(start, start + block)
            with torch.set_grad_enabled(state.requires_grad):
                leaf = _wide(flat[tokens]).detach().requires_grad_(state.requires_grad)
                error = (compare(leaf, _wide(target[tokens]), tokens) * mask[tokens]).sum()
                if state.requires_grad:
                    grads.append(torch.autograd.grad(scale * error, leaf)[0].to(projected.dtype))
            errors.append(error.detach())
        error = reduce(torch.add, errors)
        if not state.requires_grad:
            return error, scale * error
        grad = torch.cat(grads).view_as(projected)
        ctx.projection = projection
        ctx.save_for_backward(grad, *([] if projection is None else [state]))
        ctx.mark_non_differentiable(error)
        return error, scale * error

    @staticmethod
    def backward(ctx: Any, _: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, *state = ctx.saved_tensors
        grad = grad * grad_loss.to(grad.dtype)
        weight = ctx.projection
        if weight is None:
            return grad, *[None] * 5
        share = grad.flatten(0, 1).T @ state[0].flatten(0, 1)
        if hasattr(weight, "main_grad"):
            weight.main_grad += share
            weight.grad_added_to_main_grad = True  # Megatron's protocol: its hook must fire, and add nothing
        return grad @ weight, share, *[None] * 4


class _AttachLoss(torch.autograd.Function):
    """Returns a state unchanged; the backward pass also starts at a loss."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss
        return state

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.ones_like(ctx.like)


def _attach(output: ModuleOutput, loss: Tensor) -> ModuleOutput:
    """Attaches a loss to the first tensor of a module's output, so that the backward pass includes it."""
    state, *others = output if isinstance(output, tuple) else (output,)
    state = make_viewless_tensor(_AttachLoss.apply(state, loss), requires_grad=True, keep_graph=True)
    return (state, *others) if isinstance(output, tuple) else state
