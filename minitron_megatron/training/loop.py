"""The training loop: trains, validates, logs and saves, so that a killed run can resume."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from minitron_megatron.config.schema import DistillConfig
from minitron_megatron.data.samples import FIRST_HELDOUT, Samples, rank_batches
from minitron_megatron.distillation.objectives import CrossEntropy, Divergence
from minitron_megatron.distillation.result import StepResult, combine
from minitron_megatron.distillation.step import DistillationStep
from minitron_megatron.distillation.teachers import Teacher
from minitron_megatron.errors import DataError, Preempted, TrainingError
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.schedule import Batch, group_microbatches, to_device
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.progress import progress
from minitron_megatron.tracking.metrics import Metrics
from minitron_megatron.training.masks import share_of_zeros
from minitron_megatron.training.optimizer import TrainableModel
from minitron_megatron.training.saver import Saver
from minitron_megatron.training.state import RunState
from minitron_megatron.training.step_metrics import (
    Stopwatch,
    largest_over_ranks,
    loss_values,
    memory_values,
    throughput_values,
)

logger = logging.getLogger(__name__)

Heartbeat = Callable[[], None]
"""Resets the timer of the watchdog."""


@dataclass
class _Outcome:
    """The outcome of a step.

    Attributes:
        result: its losses.
        grad_norm: of the student's gradient, before clipping.
        values: the metrics of the step.
        is_stopping: whether a signal has asked any rank to stop.
        heldout_loss: the held-out loss that decides which checkpoint is best, if measured.
        is_best: whether it is the lowest so far.
    """

    result: StepResult
    grad_norm: float
    values: dict[str, float] = field(default_factory=dict)
    is_stopping: bool = False
    heldout_loss: float | None = None
    is_best: bool = False


@dataclass
class Trainer:
    """A training run.

    A step with a loss or gradient that is not finite, or without a token to learn from, is skipped and counted: neither
    weights nor optimiser nor schedule move, and the next step takes the next sequences.

    Attributes:
        config: settings of the run.
        step: student, and the entries of its loss.
        models: trained models, by the prefix of its keys in checkpoints; the student, whose prefix is empty, first.
        samples: of the whole run; step i takes `global_batch` sequences from i * global_batch on, in any layout.
        heldout: for validation.
        ctx: this rank's place.
        run: progress of the run.
        saver: of checkpoints.
        metrics: where to log, on rank 0; None elsewhere.
        flops_per_token: of student and teachers, by the step, for the throughput.
        stop_requested: returns whether this rank has received a signal to stop.
    """

    config: DistillConfig
    step: DistillationStep
    models: Mapping[str, TrainableModel]
    samples: Samples
    heldout: Samples
    ctx: ParallelContext
    run: RunState
    saver: Saver
    metrics: Metrics | None
    flops_per_token: Callable[[int], float]
    stop_requested: Callable[[], bool]
    _checked: list[Teacher] | None = field(default=None, init=False)

    def train(self) -> None:
        """Trains to the end, or until a signal asks one of the ranks to stop. Collective.

        Raises:
            DataError: the teacher is not better than chance on the text.
            Preempted: a signal came; the run was saved after the current step.
            TrainingError: too many steps in a row had no finite loss and gradient, or no token to learn from.
        """
        self.step.alpha = self.run.alpha
        title = "distill" if self.step.teachers else "train"
        with watchdog(self.ctx.timeout_min) as heartbeat, progress(title, self.config.steps) as advance:
            advance(self.run.step)
            while not self._is_last:
                heartbeat()
                outcome = self._make_step()
                if self._is_validation_due:
                    self._validate(outcome, heartbeat)
                if self.metrics:
                    self.metrics.log(outcome.values)
                loss, tokens_per_s = outcome.values["loss/total"], outcome.values["throughput/tokens_per_s"]
                advance(1, f"loss {loss:.3f}  {tokens_per_s:.0f} tokens/s")
                self._stop_if_diverged(outcome)
                self._save_if_due(outcome, heartbeat)
                if outcome.is_stopping and not self._is_last:
                    raise Preempted(
                        f"a signal asked to stop: {self.saver.root} is saved at step {self.run.step} of "
                        f"{self.config.steps}"
                    )

    @property
    def _is_last(self) -> bool:
        return self.run.step == self.config.steps

    @property
    def _is_validation_due(self) -> bool:
        every = self.config.validate_every
        return bool(every and (self.run.step % every == 0 or self._is_last))

    def _make_step(self) -> _Outcome:
        """Makes the next step, and collects its metrics."""
        watch, run = Stopwatch(), self.run
        values: dict[str, float] = {}
        batches = self._next_batches()
        watch.lap("data")
        run.step += 1
        if unchecked := self._unchecked():
            values |= self._check_teachers(unchecked, batches)
            watch.lap("teacher_check")
        for model in self.models.values():
            model.zero_grad()
        result = self.step.train(batches, run.step)
        watch.lap("student", less=("teacher", result.teacher_s))
        norms, rates = self._update_weights(result)
        values |= self._drop_and_round()
        watch.lap("optimizer")
        run.alpha = self.step.alpha
        seconds = {**watch.seconds, "step": watch.total, "stop": float(self.stop_requested())}
        seconds = largest_over_ranks(seconds, self.ctx)
        is_stopping = bool(seconds.pop("stop"))
        tokens = self.config.global_batch * self.config.data.sequence_length
        values |= {
            "progress/step": run.step,
            "progress/tokens": run.step * tokens,
            "progress/skipped_steps": run.skipped,
            **loss_values("loss", result),
            "optim/lr": rates[0],
            "optim/grad_norm": norms[0],
            **throughput_values(
                result.num_tokens / seconds["step"], self.flops_per_token(run.step) * tokens / seconds["step"], self.ctx
            ),
            **{f"time/{name}_s": value for name, value in seconds.items()},
            **largest_over_ranks(memory_values(self.ctx.device), self.ctx),
        }
        if result.teacher_text_loss is not None:
            values |= {"teacher/lm": result.teacher_text_loss, "teacher/grad_norm": norms[1], "teacher/lr": rates[1]}
        return _Outcome(result, norms[0], values, is_stopping)

    def _next_batches(self) -> list[Batch]:
        """Returns this rank's micro-batches of the next step, on its device."""
        count, first = self.config.global_batch, self.run.step * self.config.global_batch
        data_rank, data_size = self.ctx.data_rank, self.ctx.layout.replicas
        batches = rank_batches(self.samples, first, count, self.config.micro_batch, data_rank, data_size)
        return to_device(batches, self.ctx.device)

    def _unchecked(self) -> list[Teacher]:
        """Returns the teachers of this step that have not been measured yet."""
        if self._checked is None:  # the first step of this process; earlier ones have measured their teachers
            step = 0 if self.run.step - 1 == self.run.empty_in_a_row else self.run.step - 1
            self._checked = [entry.teacher for entry in self.step.entries if entry.teacher and entry.first_step <= step]
        return [teacher for teacher in self.step.teachers_at(self.run.step) if teacher not in self._checked]

    def _check_teachers(self, teachers: Sequence[Teacher], batches: list[Batch]) -> dict[str, float]:
        """Measures teachers on their first batch with tokens that count.

        Raises:
            DataError: one of them is not better than chance.
        """
        assert self._checked is not None
        self.step.free_idle(self.run.step)
        values = {}
        for teacher in teachers:
            result = teacher.evaluate(batches)
            if result is None or result.num_tokens:
                self._checked.append(teacher)
            if result is not None and result.num_tokens:
                name = list(self.config.all_teachers)[self.step.teachers.index(teacher)]
                loss = better_than_chance(result, teacher.name, self.step.vocab)
                values[f"teacher/first_lm/{name}" if name else "teacher/first_lm"] = loss
        return values

    def _update_weights(self, result: StepResult) -> tuple[list[float], list[float]]:
        """Applies the gradients, if they and the losses are finite and of any token.

        Returns:
            norms of the models' gradients, and the learning rates.
        """
        models, run = self.models.values(), self.run
        norms = [model.grad_norm() for model in models]
        rates = [model.optimizer.param_groups[0]["lr"] for model in models]
        self.saver.loss_seen_since_save |= result.is_finite
        if result.is_finite and all(map(math.isfinite, norms)):
            rates = [model.step() for model in models]
            run.skipped_in_a_row = run.empty_in_a_row = 0
            self.saver.weights_updated()
        elif result.num_tokens:
            run.skipped += 1
            run.skipped_in_a_row += 1
            run.empty_in_a_row = 0
        else:  # which says nothing of the weights
            run.skipped += 1
            run.empty_in_a_row += 1
            logger.warning("no token counts in step %d, %s: skipped", run.step, self._sequences())
        return norms, rates

    def _drop_and_round(self) -> dict[str, float]:
        """Makes the student sparser where its schedule says so, and rounds what is left.

        Returns:
            its share of zeros, if it has masks.
        """
        student = next(iter(self.models.values()))
        values = self._make_sparser(student)
        if student.fake_quant:  # last, for what is rounded has many equal weights
            student.fake_quant.round_weights()
        return values

    def _make_sparser(self, student: TrainableModel) -> dict[str, float]:
        if student.masks is None:
            return {}
        if self.run.zeros_before is None:
            self.run.zeros_before = student.masks.sparsity()
        share = share_of_zeros(self.config.masks, self.run.step, self.run.zeros_before)
        if share is not None:
            student.drop_smallest(share)
        return {"masks/sparsity": student.masks.sparsity()}

    def _sequences(self) -> str:
        """Returns the words for the sequences of the latest step."""
        first = (self.run.step - 1) * self.config.global_batch
        return f"of sequences {first} to {first + self.config.global_batch - 1}"

    def _validate(self, outcome: _Outcome, heartbeat: Heartbeat) -> None:
        """Measures the losses on held-out text."""
        result = validate(self.step, self.heldout, self.config, self.ctx, self.run.step, heartbeat)
        outcome.values |= loss_values("val", result)
        # The total loss is not comparable over the run: its weights may change, and so may a teacher and a divergence.
        changes = any(name.startswith("logits.") for name in self.config.loss.schedule)
        is_fixed = self.config.teacher_lr is None and not changes
        follows_teacher = Divergence.name in result.losses and is_fixed
        outcome.heldout_loss = result.losses[Divergence.name if follows_teacher else CrossEntropy.name]
        # A signal may have come during validation.
        stop = largest_over_ranks({"stop": float(self.stop_requested())}, self.ctx)["stop"]
        outcome.is_stopping |= bool(stop)
        outcome.is_best = outcome.heldout_loss < self.run.best_loss
        if outcome.is_best:
            self.run.best_loss = outcome.heldout_loss

    def _stop_if_diverged(self, outcome: _Outcome) -> None:
        """Ends training after too many steps in a row without a finite loss and gradient, or without a token.

        Raises:
            TrainingError: there were too many.
        """
        run, most = self.run, self.config.max_skipped_steps
        if run.empty_in_a_row >= most:
            raise TrainingError(
                f"no token counts in the last {run.empty_in_a_row} steps, which were skipped, up to step {run.step}, "
                f"{self._sequences()}: give text with answers to learn, longer sequences (data.sequence_length), more "
                f"of them in a step (global_batch), or raise max_skipped_steps = {most}"
            )
        if run.skipped_in_a_row < most:
            return
        self.saver.distrust_latest()
        raise TrainingError(
            f"no finite loss and gradient in the last {run.skipped_in_a_row} steps, which were skipped. In step "
            f"{run.step}, {self._sequences()}, the loss was {outcome.result.total} and the gradient's norm "
            f"{outcome.grad_norm}: look at that text, or {self.saver.advice()}, with a lower optimizer.lr or another "
            f"dtype"
        )

    def _save_if_due(self, outcome: _Outcome, heartbeat: Heartbeat) -> None:
        """Saves the run every `save_every` steps, at the best held-out loss, and at the end.

        Raises:
            TrainingError: the held-out loss of the final weights is not finite; they are not saved.
        """
        run, config, loss = self.run, self.config, outcome.heldout_loss
        # While steps are skipped, the weights may be broken, so earlier checkpoints are kept.
        is_suspect = run.skipped_in_a_row > 0
        if loss is not None and not math.isfinite(loss):
            is_suspect, problem = True, f"the loss on held-out text is {loss} after step {run.step}"
            if self._is_last:
                raise TrainingError(
                    f"{problem}, the last one, which is not saved: look at that text, or begin anew with a lower "
                    f"optimizer.lr or another dtype"
                )
            logger.warning(problem)
        is_due = bool(config.save_every and run.step % config.save_every == 0) and not is_suspect
        if self._is_last or outcome.is_best or outcome.is_stopping or is_due:
            heartbeat()
            self.saver.save(run, outcome.is_best, self._is_last, loss is not None, is_suspect)
            heartbeat()


def validate(
    step: DistillationStep,
    heldout: Samples,
    config: DistillConfig,
    ctx: ParallelContext,
    number: int,
    heartbeat: Heartbeat,
) -> StepResult:
    """Measures mean losses per token over the first `validate_batches` global batches of held-out text. Collective.

    Args:
        step: student, and the entries of its loss.
        heldout: the samples.
        config: settings of the run.
        ctx: this rank's place.
        number: training step, for the weights of the entries.
        heartbeat: called after every few micro-batches.
    """
    count = min(len(heldout), config.validate_batches * config.global_batch)
    data_rank, data_size = ctx.data_rank, ctx.layout.replicas
    batches = rank_batches(heldout, 0, count, config.micro_batch, data_rank, data_size, FIRST_HELDOUT)
    results = []
    for call in group_microbatches(batches, ctx):
        results.append(step.evaluate(to_device(call, ctx.device), number))
        heartbeat()
    return combine(results)


def better_than_chance(result: StepResult, teacher: str, vocab: int) -> float:
    """Returns a teacher's loss per token on its first batch, if it is better than chance.

    Args:
        result: of the teacher.
        teacher: what messages call it.
        vocab: tokens of the tokenizer.

    Raises:
        DataError: it is not.
    """
    chance, loss = math.log(vocab), result.losses[CrossEntropy.name]
    if not loss < chance:
        raise DataError(
            f"{teacher} has a loss of {loss:.3f} nats per token on the first batch, and chance over "
            f"{vocab} tokens has {chance:.3f}: its weights, its tokenizer or the text are not what they should be"
        )
    logger.info("%s has a loss of %.3f nats per token on the first batch; chance has %.3f", teacher, loss, chance)
    return loss
