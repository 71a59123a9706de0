"""One training step through Megatron's own schedules: teachers first, then the student with its objectives.

Nothing in Megatron is patched. Plain training is a step whose entries have no teacher.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import reduce

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallel
from megatron.core.utils import unwrap_model
from torch import Tensor

from minitron_megatron.distillation.linear_losses import Predictions
from minitron_megatron.distillation.objectives import (
    BalancedWeight,
    ComputeLoss,
    Entry,
    PredictionObjective,
    StateObjective,
    Term,
    Text,
)
from minitron_megatron.distillation.projections import add_up_copies
from minitron_megatron.distillation.result import EntryResult, StepResult
from minitron_megatron.distillation.teachers import Targets, Teacher, Wanted
from minitron_megatron.errors import raise_if_any
from minitron_megatron.parallel.collectives import sum_over
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.cpu import give_back_freed_memory
from minitron_megatron.parallel.schedule import Batch, forward_hidden, output_weight, run_schedule

LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]
"""The loss function of Megatron's schedules, on the last stage. Returns the loss, a sum over valid tokens; the number
of valid tokens; and values to report."""


class DistillationStep:
    """Runs steps of a student with the given entries. Collective.

    Args:
        student: this rank's student, for training wrapped in Megatron's DistributedDataParallel, with or without a
            Float16Module.
        entries: the losses. At least one takes the student's predictions; its weight may be 0.
        ctx: this rank's place.
        vocab: tokens of the student's tokenizer.
        chunk_tokens: tokens whose logits exist at one time.

    Raises:
        ConfigError: an objective's setting is invalid, or does not fit the models.

    Attributes:
        teachers: the distinct teachers of all entries.
    """

    def __init__(
        self,
        student: Sequence[torch.nn.Module],
        entries: Sequence[Entry],
        ctx: ParallelContext,
        vocab: int,
        chunk_tokens: int = 512,
    ):
        self.student = list(student)
        self.entries = list(entries)
        self.ctx = ctx
        self.vocab = vocab
        self.chunk_tokens = chunk_tokens
        self.teachers = list({id(e.teacher): e.teacher for e in self.entries if e.teacher is not None}.values())
        self._last_chunk = unwrap_model(self.student[-1])
        raise_if_any([*_entry_problems(self.entries, self._last_chunk, vocab), *_logit_problems(self._last_chunk)])
        self._balanced = next(iter(_balanced(self.entries)), None)
        for teacher in self.teachers:
            wanted = Wanted(vocab=vocab, padded_vocab=self._last_chunk.vocab_size)
            for entry in self.entries:
                if entry.teacher is teacher:
                    wanted |= entry.objective.wanted
            teacher.prepare(wanted)

    def entries_at(self, number: int) -> list[Entry]:
        """Returns the entries that count at a step."""
        return [entry for entry in self.entries if entry.counts_at(number)]

    def teachers_at(self, number: int) -> list[Teacher]:
        """Returns the teachers that teach at a step."""
        used = {id(entry.teacher) for entry in self.entries_at(number)}
        return [teacher for teacher in self.teachers if id(teacher) in used]

    def free_idle(self, number: int) -> None:
        """Frees the teachers that do not teach at a step."""
        for teacher in self.teachers:
            if teacher not in self.teachers_at(number):
                teacher.free()

    @property
    def alpha(self) -> float | None:
        """Factor of the balanced weight in the next step; None before the first step, or without a balanced entry."""
        if self._balanced is None:
            return None
        _, weight = self._balanced
        return weight.alpha

    @alpha.setter
    def alpha(self, alpha: float | None) -> None:
        if self._balanced is not None:
            _, weight = self._balanced
            weight.alpha = alpha

    def train(self, batches: Sequence[Batch], number: int = 1, last_states: list[Tensor] | None = None) -> StepResult:
        """Runs forward and backward over a step's micro-batches.

        Gradients end up in Megatron's `main_grad`, divided by the global number of valid tokens.

        Args:
            batches: this rank's micro-batches, on its device except for their `sample_ids`.
            number: of the step, from 1, for weights that change over a run.
            last_states: receives the last hidden state `[seq(/tp), batch, hidden]` of each micro-batch, on the last
                stage.

        Raises:
            ConfigError: the student's configuration would give wrong gradients.
        """
        if self._balanced is not None and self.alpha is None:
            self._balance(self.evaluate(batches, number))  # there is no previous step
        for chunk in self.student:
            raise_if_any(_gradient_problems(chunk, self.ctx))
            chunk.train()
        result = self._run(batches, number, training=True, last_states=last_states)
        add_up_copies(self.student)
        self._balance(result)
        return result

    def evaluate(self, batches: Sequence[Batch], number: int = 1) -> StepResult:
        """Measures the losses of micro-batches, without gradients; see `train`."""
        for chunk in self.student:
            chunk.eval()
        with torch.no_grad():
            return self._run(batches, number, training=False)

    def _balance(self, result: StepResult) -> None:
        """Sets the balanced weight, if there is one, from the losses of a step."""
        if self._balanced is not None and result.is_finite and result.num_tokens:
            entry, weight = self._balanced
            weight.update(result.losses[entry.name], result.losses[weight.against])

    def _run(
        self, batches: Sequence[Batch], number: int, training: bool, last_states: list[Tensor] | None = None
    ) -> StepResult:
        """Runs teachers and student over the micro-batches."""
        entries, teachers = self.entries_at(number), self.teachers_at(number)
        weights = {entry.name: entry.weight_at(number) for entry in entries}
        on_states = [(entry, entry.objective) for entry in entries if isinstance(entry.objective, StateObjective)]
        terms = [
            (entry, Term(entry.objective, weights[entry.name], None, number, self.vocab))
            for entry in entries
            if isinstance(entry.objective, PredictionObjective)
        ]
        alpha = 1.0 if self.alpha is None else self.alpha
        self.free_idle(number)
        with ExitStack() as stack:
            targets = {id(teacher): stack.enter_context(teacher.teach(batches, training)) for teacher in teachers}
            state_sums = [
                stack.enter_context(objective.watch(batches, targets[id(entry.teacher)], weights[entry.name], training))
                for entry, objective in on_states
            ]
            prediction_sums = self._run_student(batches, terms, targets, training, last_states)
        names = [entry.name for entry, _ in terms]
        results, num_tokens = self._sum_over_ranks(weights, names, prediction_sums, on_states, state_sums)
        text_losses = [given.text_loss for given in targets.values() if given.text_loss is not None]
        return StepResult(
            {entry.name: results[entry.name] for entry in entries},
            num_tokens,
            alpha,
            teacher_s=sum(given.seconds for given in targets.values()),
            teacher_text_loss=text_losses[0] if text_losses else None,
        )

    def _run_student(
        self,
        batches: Sequence[Batch],
        terms: Sequence[tuple[Entry, Term]],
        targets: dict[int, Targets],
        training: bool,
        last_states: list[Tensor] | None,
    ) -> Tensor:
        """Runs the student through the schedule.

        Args:
            batches: see `train`.
            terms: the objectives on predictions, without targets.
            targets: of the teachers, by identity.
            training: whether gradients are computed.
            last_states: see `train`.

        Returns:
            float64 `[1 + objectives on predictions]`: valid tokens and sums of losses, of this rank's micro-batches;
            zeros on all but the last stage.
        """

        def forward_step(iterator: Iterator[tuple[int, Batch]], model: torch.nn.Module) -> tuple[Tensor, LossFunction]:
            number, batch = next(iterator)
            output = forward_hidden(model, batch)
            if last_states is not None and unwrap_model(model).post_process:
                last_states.append(output.detach())
            return output, lambda output: self._loss(output, number, batch, terms, targets)

        size = batches[0]["tokens"].shape
        items = list(enumerate(batches))
        reports = run_schedule(forward_step, self.student, items, size, forward_only=not training)
        sums = torch.zeros(1 + len(terms), dtype=torch.float64, device=self.ctx.device)
        for report in reports:
            sums += report["sums"]
        return sums

    def _loss(
        self,
        output: Tensor,
        number: int,
        batch: Batch,
        terms: Sequence[tuple[Entry, Term]],
        targets: dict[int, Targets],
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Computes the losses on predictions in one micro-batch; see `LossFunction`."""
        text = Text(*(batch[key].transpose(0, 1).flatten() for key in ("labels", "loss_mask")))
        by_compute: dict[ComputeLoss, dict[int, Term]] = {}
        for position, (entry, term) in enumerate(terms):
            if entry.teacher is not None:
                vocab = min(self.vocab, entry.teacher.vocab)
                term = term._replace(target=targets[id(entry.teacher)].predictions(number), vocab=vocab)
            by_compute.setdefault(term.objective.compute, {})[position] = term
        # Memory freed by teachers and student is fragmented between kept activations, too small for logits.
        give_back_freed_memory()
        student = predictions_of(self._last_chunk, output, self.ctx)
        if len(by_compute) > 1:
            # One of them would mark the weight as done (see `linear_losses`), and Megatron would not add the others'.
            student = Predictions(student.hidden, student.weight.view_as(student.weight))
        num_tokens = text.mask.sum()
        sums = torch.zeros(1 + len(terms), dtype=torch.float64, device=output.device)
        sums[0] = num_tokens
        losses = []
        for compute, alike in by_compute.items():
            group = self.ctx.collection.tp
            loss, own_sums = compute(student, text, list(alike.values()), group, self.vocab, self.chunk_tokens)
            for position, value in zip(alike, own_sums, strict=True):
                sums[1 + position] = value
            losses.append(loss)
        return reduce(torch.add, losses), num_tokens.to(torch.int), {"sums": sums}

    def _sum_over_ranks(
        self,
        weights: dict[str, float],
        on_predictions: Sequence[str],
        prediction_sums: Tensor,
        on_states: Sequence[tuple[Entry, StateObjective]],
        state_sums: list[Tensor],
    ) -> tuple[dict[str, EntryResult], int]:
        """Sums over the ranks, and returns the entries' results by name, and the number of valid tokens."""
        # Losses of predictions are on the last stage only, the same on every rank of a tensor group.
        parts = [prediction_sums, *(sum_over(own, self.ctx.collection.tp).flatten() for own in state_sums)]
        sums = torch.cat(parts)
        sum_over(sums, self.ctx.collection.pp)
        sum_over(sums, self.ctx.collection.dp)
        values = iter(sums.tolist())
        num_tokens = next(values)
        results = {
            name: EntryResult(weights[name], {name: next(values)}, {name: num_tokens}) for name in on_predictions
        }
        for entry, objective in on_states:
            numerators = {name: next(values) for name in objective.pair_names}
            denominators = {name: next(values) for name in objective.pair_names}
            results[entry.name] = EntryResult(weights[entry.name], numerators, denominators)
        return results, int(num_tokens)


def predictions_of(model: torch.nn.Module, last_state: Tensor, ctx: ParallelContext) -> Predictions:
    """Returns a model's predictions, on the last stage, for whole sequences.

    The backward pass sums each rank's share of the gradient over the tensor ranks, as a vocab-parallel projection
    requires.

    Args:
        model: its last model chunk, without Megatron's wrappers.
        last_state: its last hidden state, `[seq(/tp), batch, hidden]`.
        ctx: this rank's place.
    """
    group = ctx.collection.tp
    if ctx.layout.sequence:
        last_state = tensor_parallel.gather_from_sequence_parallel_region(last_state, group=group)
    else:
        last_state = tensor_parallel.copy_to_tensor_model_parallel_region(last_state, group=group)
    return Predictions(last_state.flatten(0, 1), output_weight(model))


def _entry_problems(entries: list[Entry], student: torch.nn.Module, vocab: int) -> list[str]:
    """Returns what is wrong with the entries, one sentence each."""
    names = [entry.name for entry in entries]
    problems = [
        f"{names.count(name)} entries are called {name}: give each an Entry(name=...) of its own"
        for name in sorted({name for name in names if names.count(name) > 1})
    ]
    if not any(isinstance(entry.objective, PredictionObjective) for entry in entries):
        problems.append(
            "no entry looks at predictions: add Entry(None, CrossEntropy(), weight=0.0), which measures them"
        )
    for entry in entries:
        if entry.teacher is None and entry.objective.wanted != Wanted():
            problems.append(f"entry {entry.name} has no teacher, and its objective needs one: give it, or leave it out")
        problems += entry.objective.problems(vocab)
    balanced = _balanced(entries)
    if len(balanced) > 1:
        problems.append(
            f"entries {' and '.join(entry.name for entry, _ in balanced)} have balanced weights: one can have one"
        )
    problems += [
        f"entry {entry.name} is balanced against {weight.against}, which is none of {', '.join(names)}: name one"
        for entry, weight in balanced
        if weight.against not in names
    ]
    teachers = {id(entry.teacher): entry.teacher for entry in entries if entry.teacher is not None}
    return problems + [problem for teacher in teachers.values() for problem in teacher.problems(student)]


def _logit_problems(model: torch.nn.Module) -> list[str]:
    """Returns why a model's logits are not its last hidden states times its output weight, one sentence each."""
    if not getattr(model.config, "use_mup", False):
        return []
    return [
        "config.use_mup = True: Megatron-Core scales the logits then, which is not done here: take models without muP"
    ]


def _balanced(entries: Sequence[Entry]) -> list[tuple[Entry, BalancedWeight]]:
    return [(entry, entry.weight) for entry in entries if isinstance(entry.weight, BalancedWeight)]


def _gradient_problems(chunk: torch.nn.Module, ctx: ParallelContext) -> list[str]:
    """Returns why the gradients of a model would be wrong, one sentence each."""
    config, problems = unwrap_model(chunk).config, []
    if isinstance(chunk, DistributedDataParallel) and chunk.ddp_config.overlap_param_gather:
        problems.append(
            "ddp_config.overlap_param_gather = True: the output weight is used here without its layer, which would "
            "wait for it, so set it to False"
        )
    if not config.calculate_per_token_loss:
        problems.append(
            "config.calculate_per_token_loss = False: losses are sums over tokens here, which Megatron-Core divides by "
            "the global number of tokens if it is True"
        )
    if config.finalize_model_grads_func is None:
        problems.append(
            "config.finalize_model_grads_func = None: set it to megatron.core.distributed.finalize_model_grads, which "
            "adds up gradients over ranks"
        )
    if config.sequence_parallel != ctx.layout.sequence:
        problems.append(
            f"ctx.layout.sequence = {ctx.layout.sequence}, and the model has sequence_parallel = "
            f"{config.sequence_parallel}: give current_context(sequence={config.sequence_parallel})"
        )
    if config.context_parallel_size > 1:
        problems.append(
            f"config.context_parallel_size = {config.context_parallel_size}: every rank must see whole sequences here, "
            f"so set it to 1"
        )
    if config.mtp_num_layers:
        problems.append(
            f"config.mtp_num_layers = {config.mtp_num_layers}: layers that predict several tokens ahead take no part "
            f"in this loss, so leave them out"
        )
    if config.fp16:
        problems.append(
            "config.fp16 = True: gradients of logits and states are not scaled here as fp16 needs it, so train in bf16"
        )
    return problems
