"""A teacher model that runs beside its student, on the same ranks.

It runs first over the step's micro-batches, through Megatron's own schedules. It leaves its last hidden states
`[seq(/tp), batch, hidden]`, never its logits, on the last stage, and states of layers on the stages that want them. Its
stages need not match the student's.
"""

import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from torch import Tensor

from minitron_megatron.distillation.linear_losses import Predictions
from minitron_megatron.distillation.objectives import CrossEntropy, Entry
from minitron_megatron.distillation.pairs import Tap
from minitron_megatron.distillation.result import StepResult
from minitron_megatron.distillation.state_exchange import StateExchange
from minitron_megatron.distillation.step import DistillationStep, predictions_of
from minitron_megatron.distillation.teachers import Wanted
from minitron_megatron.distillation.vocab_parallel import own_rows
from minitron_megatron.parallel.collectives import gather_dim
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.schedule import Batch, output_weight, run_forward

logger = logging.getLogger(__name__)


class LiveTeacher:
    """A model as a teacher; see `Teacher`. Only one step at a time uses its targets.

    Args:
        model_chunks: this rank's teacher, frozen. If wrapped in Megatron's DistributedDataParallel, it is trained too:
            it gets the gradients of its cross-entropy on the same batches. Either may be in a Float16Module.
        ctx: this rank's place.
        vocab: tokens of its tokenizer.
        chunk_tokens: tokens whose logits exist at one time when it is evaluated or trained.
        name: what messages call it.

    Attributes:
        weight: this rank's rows of its output weight as the student's vocabulary is split, where that is another way.
    """

    def __init__(
        self,
        model_chunks: Sequence[torch.nn.Module],
        ctx: ParallelContext,
        vocab: int,
        chunk_tokens: int = 512,
        name: str = "the teacher",
    ):
        self.name = name
        self.ctx = ctx
        self.model_chunks = unwrap_model(list(model_chunks))
        self.is_trained = isinstance(model_chunks[0], DistributedDataParallel)
        self._text_step = DistillationStep(model_chunks, [Entry(None, CrossEntropy())], ctx, vocab, chunk_tokens)
        self.vocab, self._chunk_tokens = vocab, chunk_tokens
        self._model_chunks = model_chunks
        self._wanted = Wanted()
        self.weight: Tensor | None = None
        self._exchange: StateExchange | None = None

    def prepare(self, wanted: Wanted) -> None:
        """Sets what every step will want; see `Teacher`."""
        self._wanted = wanted
        self.weight = None
        sizes_alike = wanted.padded_vocab in (0, self.model_chunks[0].vocab_size)
        if wanted.predictions and not sizes_alike and self.ctx.is_last_stage:
            whole = gather_dim(output_weight(self.model_chunks[-1]).detach(), self.ctx.collection.tp, dim=0)
            self.weight = own_rows(whole, wanted.padded_vocab, self.ctx.collection.tp)
        self._exchange = StateExchange(self.model_chunks, wanted.states, self.ctx) if wanted.states else None

    def problems(self, student: torch.nn.Module) -> list[str]:
        """Returns why it cannot teach a student; see `Teacher`."""
        own = self.model_chunks[0].vocab_size
        if student.vocab_size == own or not self.is_trained:
            return []
        return [
            f"the student's vocabulary is padded to {student.vocab_size}, and that of {self.name}, which is trained, "
            f"to {own}: they must share one vocabulary, and its padding, or the teacher be frozen"
        ]

    def free(self) -> None:
        """Keeps its model, which whoever built it may free."""

    def evaluate(self, batches: Sequence[Batch]) -> StepResult:
        """Measures its cross-entropy, without gradients, and says what it gives to tokens that are not compared."""
        result = self._text_step.evaluate(batches)
        if 0 < self._wanted.vocab < self.vocab and result.num_tokens:
            entries = [Entry(None, CrossEntropy())]
            of_compared = DistillationStep(
                self._model_chunks, entries, self.ctx, self._wanted.vocab, self._chunk_tokens
            ).evaluate(batches)
            left = result.losses[CrossEntropy.name] - of_compared.losses[CrossEntropy.name]
            logger.info(
                "%s gives %.2g of its probability to tokens from %d on, which are left out",
                self.name,
                -math.expm1(-left),
                self._wanted.vocab,
            )
        return result

    @contextmanager
    def teach(self, batches: Sequence[Batch], training: bool) -> Iterator["LiveTargets"]:
        """Runs over the micro-batches of a step; see `Teacher`."""
        training = training and self.is_trained
        text_loss: float | None = None
        last_states: list[Tensor] = []
        torch.cuda.synchronize()  # kernels are asynchronous
        started = time.perf_counter()
        with self._exchange.capturing(training) if self._exchange else nullcontext():
            if training:
                text_loss = self._text_step.train(batches, last_states=last_states).losses[CrossEntropy.name]
            else:
                last_states = run_forward(self.model_chunks, batches, self.ctx, on_output=lambda output, batch: output)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        if self._exchange:
            self._exchange.send(batches)
        if not self._wanted.predictions:
            last_states = []  # free them before the student runs
        yield LiveTargets(self, last_states, self._exchange, seconds, text_loss)
        if self._exchange:
            self._exchange.finish()


class LiveTargets:
    """The targets of a live teacher for one step; see `Targets`."""

    def __init__(
        self,
        teacher: LiveTeacher,
        last_states: list[Tensor],
        exchange: StateExchange | None,
        seconds: float,
        text_loss: float | None,
    ):
        self.seconds = seconds
        self.text_loss = text_loss
        self._teacher = teacher
        self._last_states = last_states
        self._exchange = exchange

    def predictions(self, number: int) -> Predictions:
        """Returns the predictions for a micro-batch, on the last stage."""
        own = predictions_of(self._teacher.model_chunks[-1], self._last_states[number], self._teacher.ctx)
        return own if self._teacher.weight is None else own._replace(weight=self._teacher.weight)

    def state(self, tap: Tap, number: int) -> Tensor:
        """Waits for a hidden state and returns it."""
        return self._states.state(tap, number)

    def release(self, tap: Tap, number: int) -> None:
        """Frees a state when all that want it on this rank have released it."""
        self._states.release(tap, number)

    @property
    def _states(self) -> StateExchange:
        if self._exchange is None:
            raise LookupError("no hidden states were requested: name them in the objective's `wanted.states`")
        return self._exchange
