"""One training step of a student beside its teacher, on the same ranks, through Megatron's own schedules.

The teacher goes first: it runs forward-only over the step's micro-batches and leaves its last hidden states
`[seq, batch, hidden]` on the last stage, never its logits. Then the student runs the ordinary schedule, and
its loss reads them. Nothing of Megatron's is patched, and the teacher's stages need not match the student's.
"""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from torch import Tensor

from minitron_megatron.config.loss import Balance, LossConfig
from minitron_megatron.distillation.hidden import HiddenLosses
from minitron_megatron.distillation.linear_losses import Teacher, linear_distillation_loss
from minitron_megatron.errors import raise_if_any
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.cpu import give_back_freed_memory
from minitron_megatron.parallel.groups import Groups
from minitron_megatron.parallel.schedule import Batch, forward_hidden, output_weight, run_forward, run_schedule


@dataclass
class StepResult:
    """What a step (or a validation) measured, over all ranks.

    Attributes:
        kd_logits: mean divergence from the teacher per valid token; 0 without a teacher.
        lm: mean cross-entropy per valid token, in nats.
        num_tokens: valid tokens; where there are none, both means are 0.
        errors, measures: of each pair of hidden states, by its name, two sums whose quotient is the pair's loss.
        alpha: what the weight of the hidden losses was multiplied by.
        teacher_s: seconds that the teacher took on this rank.
        teacher_lm: cross-entropy of a teacher that is trained beside its student; None of one that is not.
    """

    kd_logits: float
    lm: float
    num_tokens: int
    errors: dict[str, float] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    alpha: float = 1.0
    teacher_s: float = 0.0
    teacher_lm: float | None = None

    @property
    def of_pairs(self) -> dict[str, float]:
        """The loss of each pair of hidden states."""
        return {name: error / max(self.measures[name], 1e-30) for name, error in self.errors.items()}

    @property
    def kd_hidden(self) -> float:
        """Mean over the pairs."""
        return sum(self.of_pairs.values()) / max(len(self.of_pairs), 1)

    @property
    def is_finite(self) -> bool:
        """Whether every loss is a number."""
        return all(map(math.isfinite, (self.kd_logits, self.lm, self.kd_hidden, self.teacher_lm or 0.0)))

    def total(self, loss: LossConfig) -> float:
        """The weighted sum that is minimised."""
        of_predictions = loss.kd_logits_weight * self.kd_logits + loss.lm_weight * self.lm
        return of_predictions + self.alpha * loss.hidden.weight * self.kd_hidden


def mean_of(results: list[StepResult]) -> StepResult:
    """Several results as one, each token counting the same."""
    num_tokens = sum(r.num_tokens for r in results)
    return StepResult(
        sum(r.kd_logits * r.num_tokens for r in results) / max(num_tokens, 1),
        sum(r.lm * r.num_tokens for r in results) / max(num_tokens, 1),
        num_tokens,
        {name: sum(r.errors[name] for r in results) for name in results[0].errors},
        {name: sum(r.measures[name] for r in results) for name in results[0].measures},
        results[0].alpha,
    )


class TeacherStudent:
    """A student, its teacher if it has one, and the loss between them.

    Args:
        student: this rank's student, wrapped in Megatron's DistributedDataParallel for training.
        teacher: this rank's teacher, frozen; None to learn from the text alone. A teacher that is wrapped in
            DistributedDataParallel as well gets gradients too: of its cross-entropy on the same batches. Either may be
            in Megatron's Float16Module.
        groups: this rank's place.
        loss: weights of the terms.
        vocab: tokens of the tokenizer that both share.
        hidden: the losses between their hidden states, if there are any.

    Raises:
        ConfigError: the loss has a setting of no value that it may have, or does not go with the models.

    Attributes:
        alpha: what the weight of the hidden losses is multiplied by in the next step; None before the first one.
    """

    def __init__(
        self,
        student: Sequence[torch.nn.Module],
        teacher: Sequence[torch.nn.Module] | None,
        groups: Groups,
        loss: LossConfig,
        vocab: int,
        hidden: HiddenLosses | None = None,
    ):
        self.student = list(student)
        self.teacher = unwrap_model(list(teacher)) if teacher else None
        raise_if_any(_loss_problems(loss, self.student, self.teacher, vocab, hidden))
        self.groups = groups
        self.loss = loss
        self.vocab = vocab
        self.hidden = hidden
        self.alpha: float | None = None
        # To itself, the teacher is a student of the text.
        self._as_student = (
            TeacherStudent(teacher, None, groups, LossConfig(0.0, 1.0, chunk_tokens=loss.chunk_tokens), vocab)
            if teacher
            else None
        )
        self._trains_teacher = bool(teacher) and isinstance(teacher[0], DistributedDataParallel)
        self._last = {"student": unwrap_model(self.student[-1]), "teacher": self.teacher[-1] if self.teacher else None}

    def train(self, batches: Sequence[Batch]) -> StepResult:
        """Forward and backward over a step's micro-batches; gradients end up in Megatron's `main_grad`,
        divided by the global number of valid tokens.

        Raises:
            ConfigError: the student's configuration would give other gradients.
        """
        if self._is_dynamic and self.alpha is None:
            self._rebalance(self.evaluate(batches))  # no step before this one
        result = self._train(batches)
        if self._is_dynamic:
            self._rebalance(result)
        return result

    def evaluate(self, batches: Sequence[Batch]) -> StepResult:
        """The losses of the batches, without gradients."""
        for chunk in self.student:
            chunk.eval()
        with torch.no_grad():
            return self._run(batches, forward_only=True)

    def evaluate_teacher(self, batches: Sequence[Batch]) -> StepResult:
        """The teacher's own cross-entropy, without gradients."""
        return self._as_student.evaluate(batches)

    @property
    def _is_dynamic(self) -> bool:
        return self.hidden is not None and self.loss.hidden.balance is Balance.DYNAMIC

    def _rebalance(self, result: StepResult) -> None:
        """Take the divergence of the predictions by the distance of the hidden states (2407.14679, section 3)."""
        if result.is_finite and result.num_tokens:
            self.alpha = result.kd_logits / max(result.kd_hidden, 1e-12)

    def _train(self, batches: Sequence[Batch], outputs: list[Tensor] | None = None) -> StepResult:
        for chunk in self.student:
            raise_if_any(_obstacles(chunk, self.groups, self.hidden is not None))
            chunk.train()
        return self._run(batches, forward_only=False, outputs=outputs)

    def _run(self, batches: Sequence[Batch], forward_only: bool, outputs: list[Tensor] | None = None) -> StepResult:
        """A pass over the batches; on the last stage `outputs` gets the last hidden states."""
        states, teacher_s, teacher_lm = self._run_teacher(batches, training=not forward_only)
        alpha = 1.0 if self.alpha is None else self.alpha
        watching = nullcontext(torch.zeros(2, 0, dtype=torch.float64, device=self.groups.device))
        if self.hidden:
            watching = self.hidden.watching_student(batches, alpha * self.loss.hidden.weight, not forward_only)
        # On all but the last stage there are no states, and nobody asks for them.
        pairs = list(zip(batches, states or [None] * len(batches), strict=True))

        def forward_step(iterator, model):
            batch, state = next(iterator)
            output = forward_hidden(model, batch)
            if outputs is not None and unwrap_model(model).post_process:
                outputs.append(output.detach())
            return output, lambda output: self._loss(output, state, batch)

        size = batches[0]["tokens"].shape
        with watching as of_pairs:
            losses = run_schedule(forward_step, self.student, pairs, size, forward_only=forward_only)
        sums = torch.zeros(3, dtype=torch.float64, device=self.groups.device)
        for found in losses:
            sums += found["sums"]
        # The last stage alone has seen the losses of predictions; every rank of a tensor group has seen the same.
        sums = torch.cat([sums, sum_over(of_pairs, self.groups.collection.tp).flatten()])
        sum_over(sums, self.groups.collection.pp)
        sum_over(sums, self.groups.collection.dp)
        kd_logits, lm, num_tokens, *of_pairs = sums.tolist()
        names = [pair.name for pair in self.hidden.pairs] if self.hidden else []
        return StepResult(
            kd_logits / max(num_tokens, 1),
            lm / max(num_tokens, 1),
            int(num_tokens),
            dict(zip(names, of_pairs[: len(names)], strict=True)),
            dict(zip(names, of_pairs[len(names) :], strict=True)),
            alpha,
            teacher_s,
            teacher_lm,
        )

    def _run_teacher(self, batches: Sequence[Batch], training: bool) -> tuple[list[Tensor], float, float | None]:
        """The teacher's last hidden states per micro-batch, on the last stage, the seconds that it took, and its
        cross-entropy if it was trained."""
        if not self.teacher or not self.loss.needs_teacher:
            return [], 0.0, None
        states, lm = [], None
        torch.cuda.synchronize()  # kernels run on after the call that starts them has returned
        started = time.perf_counter()
        training = training and self._trains_teacher
        with self.hidden.watching_teacher(training) if self.hidden else nullcontext():
            if training:
                lm = self._as_student._train(batches, states).lm
            else:
                states = run_forward(self.teacher, batches, self.groups, on_output=lambda output, batch: output)
        torch.cuda.synchronize()
        teacher_s = time.perf_counter() - started
        if self.hidden:
            self.hidden.exchange(batches)
        return states if self.loss.kd_logits_weight else [], teacher_s, lm

    def _loss(self, output: Tensor, state: Tensor | None, batch: Batch) -> tuple[Tensor, Tensor, dict]:
        """Loss of one micro-batch, as Megatron's schedules want it: sum, number of tokens, what to report."""
        labels, mask = (batch[key].transpose(0, 1).flatten() for key in ("labels", "loss_mask"))
        teacher = None
        if state is not None:
            teacher = Teacher(self._whole_sequence(state), output_weight(self._last["teacher"]))
        # What teacher and student left free is between all that the student keeps, and too small for logits.
        give_back_freed_memory()
        loss, terms = linear_distillation_loss(
            self._whole_sequence(output),
            output_weight(self._last["student"]),
            labels,
            mask,
            self.groups.collection.tp,
            self.vocab,
            teacher,
            self.loss.kd_logits_weight if teacher else 0.0,
            self.loss.lm_weight,
            self.loss.chunk_tokens,
            self.loss.logits,
        )
        num_tokens = mask.sum()
        sums = torch.cat([terms, num_tokens.double().unsqueeze(0)])
        return loss, num_tokens.to(torch.int), {"sums": sums}

    def _whole_sequence(self, hidden: Tensor) -> Tensor:
        """`[seq(/tp), batch, hidden]` to `[seq * batch, hidden]`, with the backward pass that a vocab-parallel
        projection needs: each rank's share of the gradient is summed over the tensor ranks."""
        group = self.groups.collection.tp
        if self.groups.layout.sequence:
            hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=group)
        return hidden.flatten(0, 1)


def _loss_problems(
    loss: LossConfig,
    student: list[torch.nn.Module],
    teacher: list[torch.nn.Module] | None,
    vocab: int,
    hidden: HiddenLosses | None,
) -> list[str]:
    """What of the loss is wrong, or does not go with the models, one sentence each."""
    found = loss.problems() + loss.logits.vocab_problems(vocab)
    if loss.hidden.weight and teacher and hidden is None:
        found.append(
            f"loss.hidden.weight = {loss.hidden.weight}, and there are no HiddenLosses: give hidden, or set it to 0"
        )
    ours, theirs = (unwrap_model(chunks[0]).vocab_size for chunks in (student, teacher or student))
    if ours != theirs:
        found.append(
            f"the student's vocabulary is padded to {ours} and the teacher's to {theirs}: they must share one "
            f"vocabulary, and its padding"
        )
    return found


def _obstacles(chunk: torch.nn.Module, groups: Groups, has_hidden: bool) -> list[str]:
    """Why the gradients of a model would not be those of the loss, one sentence each."""
    config, found = unwrap_model(chunk).config, []
    if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
        found.append(
            "ddp_config.overlap_param_gather = True: the output weight is used here without its layer, which would "
            "wait for it, so set it to False"
        )
    if not config.calculate_per_token_loss:
        found.append(
            "config.calculate_per_token_loss = False: losses are sums over tokens here, which Megatron-Core divides by "
            "the global number of tokens if it is True"
        )
    if config.finalize_model_grads_func is None:
        found.append(
            "config.finalize_model_grads_func = None: set it to megatron.core.distributed.finalize_model_grads, which "
            "adds up gradients over ranks"
        )
    if config.sequence_parallel != groups.layout.sequence:
        found.append(
            f"groups.layout.sequence = {groups.layout.sequence}, and the model has sequence_parallel = "
            f"{config.sequence_parallel}: give current_groups(sequence={config.sequence_parallel})"
        )
    if config.context_parallel_size > 1:
        found.append(
            f"config.context_parallel_size = {config.context_parallel_size}: every rank must see whole sequences here, "
            f"so set it to 1"
        )
    if config.mtp_num_layers:
        found.append(
            f"config.mtp_num_layers = {config.mtp_num_layers}: layers that predict several tokens ahead take no part "
            f"in this loss, so leave them out"
        )
    if config.fp16 and has_hidden:
        found.append(
            "config.fp16 = True: losses between hidden states are not scaled as fp16 needs it, so train in bf16 or "
            "set loss.hidden.weight to 0"
        )
    return found
