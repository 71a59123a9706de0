"""Inference with a Megatron model: scores and continues sequences of tokens, in batches and in any layout."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_megatron.evaluation.sampling import Sampler, SamplingParams, StopCriteria
from minitron_megatron.model.kv_cache import key_value_cache
from minitron_megatron.model.network import Network
from minitron_megatron.parallel.collectives import broadcast_from_last, gather_dim, gather_objects
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.cpu import bypass_cpu_mode
from minitron_megatron.parallel.schedule import Batch, output_weight, run_forward, to_device
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.progress import progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

# Full-vocabulary logits are computed in float32 for this many tokens at a time.
_BLOCK_TOKENS = 256
# Every decoding step reads all weights, however many sequences share it, so several batches of prompts decode together.
_BATCHES_TOGETHER = 4


class Inference:
    """A model for inference. All ranks make the same calls in the same order, and get all results.

    Args:
        model_chunks: this rank's model, without virtual pipeline stages.
        ctx: this rank's place, without sequence parallelism.
        network: the whole network.
        tokenizer: of transformers.
        end_tokens: tokens that end a sequence.
        batch: sequences per forward pass and rank. Generation prefills this many prompts at a time, and decodes up to
            four times as many together.
    """

    def __init__(
        self,
        model_chunks: Sequence[torch.nn.Module],
        ctx: ParallelContext,
        network: Network,
        tokenizer: PreTrainedTokenizerBase,
        end_tokens: list[int],
        batch: int,
    ):
        assert len(model_chunks) == 1 and not ctx.layout.sequence
        self.model_chunks, self.ctx, self.network = model_chunks, ctx, network
        self.tokenizer, self.end_tokens = tokenizer, end_tokens
        self.batch = batch

    def score(self, sequences: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
        """Scores how likely sequences end as they do.

        Args:
            sequences: tokens, and how many of the last ones to score.

        Returns:
            for each, the sum of the log-probabilities of the scored tokens, given all tokens before them, in nats; and
            whether greedy decoding would choose all of them.
        """

        # Sequences that differ only in their last token, as short choices do, share one input.
        same: dict[tuple[int, ...], list[int]] = {}
        for index, (tokens, _) in enumerate(sequences):
            same.setdefault(tuple(tokens[:-1]), []).append(index)
        inputs = list(same)

        def score(batches: list[list[int]]) -> list[list[list[tuple[float, bool]]]]:
            size, length = max(map(len, batches)), max(len(inputs[i]) for batch in batches for i in batch)
            filled = []
            for batch in batches:
                targets = _targets([[sequences[index] for index in same[inputs[i]]] for i in batch])
                filled.append({**_padded([inputs[i] for i in batch], size, length), **targets})
            return self._run(filled, self._score)

        # Several batches at a time keep a pipeline busy.
        per_call = 1 if self.ctx.layout.pipeline == 1 else 4 * self.ctx.layout.pipeline
        of_inputs = self._in_batches("score", list(map(len, inputs)), self.batch, per_call, score)
        scores_of: dict[int, tuple[float, bool]] = {}
        for indices, scores in zip(same.values(), of_inputs, strict=True):
            scores_of.update(zip(indices, scores, strict=True))
        return [scores_of[index] for index in range(len(sequences))]

    def generate(self, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[int]]:
        """Continues sequences.

        Args:
            prompts: of at least one token each.
            params: how to sample and when to stop.

        Returns:
            the new tokens of each, including the one that ends it.
        """

        def generate(batches: list[list[int]]) -> list[list[list[int]]]:
            return [self._generate([prompts[index] for index in batch], batch, params) for batch in batches]

        of_rank = -(-len(prompts) // (self.batch * self.ctx.layout.replicas))
        size = self.batch * min(of_rank, _BATCHES_TOGETHER)
        return self._in_batches("generate", [len(prompt) for prompt in prompts], size, 1, generate)

    def _in_batches(
        self,
        title: str,
        lengths: list[int],
        size: int,
        per_call: int,
        work: Callable[[list[list[int]]], Sequence[Iterable[T]]],
    ) -> list[T]:
        """Runs `work` on batches of items of similar length, given as indices, and returns its results by item."""
        # The longest first, so that running out of memory happens at once.
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        own = batches[self.ctx.data_rank :: self.ctx.layout.replicas]
        own_results: dict[int, T] = {}
        with watchdog(self.ctx.timeout_min) as heartbeat, progress(title, len(own)) as advance:
            for start in range(0, len(own), per_call):
                call = own[start : start + per_call]
                # Only the last stage has results.
                for indices, results in zip(call, work(call), strict=False):
                    own_results.update(zip(indices, results, strict=False))
                heartbeat()
                advance(len(call))
        all_results = {index: result for part in gather_objects(own_results) for index, result in part.items()}
        return [all_results[index] for index in range(len(lengths))]

    def _run(self, batches: list[Batch], on_output: Callable[[Tensor, Batch], T], **options: Any) -> list[T]:
        batches = to_device(batches, self.ctx.device)
        return run_forward(self.model_chunks, batches, self.ctx, on_output, **options)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Projects last hidden states `[token, hidden]` to float32 logits `[token, vocab]`, on the last stage."""
        logits = F.linear(hidden, output_weight(self.model_chunks[-1]))
        return gather_dim(logits, self.ctx.collection.tp, dim=1)[:, : self.network.vocab_size].float()

    def _score(self, hidden: Tensor, batch: Batch) -> list[list[tuple[float, bool]]]:
        """Scores the sequences of each row of a batch, from last hidden states `[seq, batch, hidden]`."""
        num_sequences = len(batch["row_of_sequence"])
        total = torch.zeros(num_sequences, dtype=torch.float64, device=hidden.device)
        misses = torch.zeros_like(total)
        targets = (batch["rows"], batch["positions"], batch["labels"], batch["sequences"])
        for rows, positions, labels, numbers in zip(*(part.split(_BLOCK_TOKENS) for part in targets), strict=True):
            logits = self._logits(hidden[positions, rows])
            misses.index_add_(0, numbers, (logits.argmax(-1) != labels).double())
            total.index_add_(0, numbers, -F.cross_entropy(logits, labels, reduction="none").double())
        of_rows: list[list[tuple[float, bool]]] = [[] for _ in range(hidden.size(1))]
        scores = zip(batch["row_of_sequence"].tolist(), total.tolist(), misses.tolist(), strict=True)
        for row, log_prob, missed in scores:
            of_rows[row].append((log_prob, missed == 0))
        return of_rows

    def _generate(self, prompts: list[list[int]], numbers: list[int], params: SamplingParams) -> list[list[int]]:
        """Continues several batches of prompts together. Each batch is sampled with the number of its first prompt."""
        device = self.ctx.device
        samplers = [Sampler(params, self.end_tokens, number, device) for number in numbers[:: self.batch]]
        ends = StopCriteria(params, self.end_tokens, self.tokenizer)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        size, longest = min(self.batch, len(prompts)), int(lengths.max())
        starts = range(0, len(prompts), size)

        def last_logits(hidden: Tensor, batch: Batch) -> Tensor:
            rows = torch.arange(len(batch["last"]), device=device)
            return self._logits(hidden[batch["last"], rows])

        def next_tokens(batches: list[Batch], **options: Any) -> Tensor:
            """Returns the next tokens `[sequences]`, on every rank."""
            tokens = torch.empty_like(lengths)
            # The other stages only receive them.
            if logits := self._run(batches, last_logits, **options):
                parts = torch.cat(logits).split(self.batch)
                tokens = torch.cat([choose(part, num_made) for choose, part in zip(samplers, parts, strict=True)])
            return broadcast_from_last(tokens, self.ctx.collection.pp)

        made: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        with key_value_cache(
            self.model_chunks, self.network, size * len(starts), longest + params.max_new_tokens
        ) as cursor:
            batches = []
            for start in starts:
                part, last = prompts[start : start + size], lengths[start : start + size] - 1
                # Pipeline stages expect batches of one length.
                length = longest if self.ctx.layout.pipeline > 1 else int(last.max()) + 1
                batches.append({**_padded(part, size, length), "last": last})
            beginning = iter(starts)
            num_made = 0
            tokens = next_tokens(batches, before=lambda _: cursor.begin_at(next(beginning)))
            while True:
                for row, token in enumerate(tokens.tolist()):
                    if row in open_rows:
                        made[row].append(token)
                        if ends(made[row]):
                            open_rows.remove(row)
                if not open_rows:
                    return made
                positions = lengths + num_made
                cursor.move_to(positions)
                num_made += 1
                batch = {
                    "tokens": tokens[:, None],
                    "position_ids": positions[:, None],
                    "last": torch.zeros_like(lengths),
                }
                # Unlike the model's own attention, that of the cache never names a CUDA device.
                tokens = next_tokens([batch], within=bypass_cpu_mode)


def _padded(sequences: Sequence[Sequence[int]], size: int, length: int) -> Batch:
    """Pads sequences to one batch, on the right and with rows at the bottom."""
    tokens = torch.zeros(size, length, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        tokens[row, : len(sequence)] = torch.tensor(sequence)
    return {"tokens": tokens, "position_ids": torch.arange(length).expand(size, length)}


def _targets(rows: list[list[tuple[list[int], int]]]) -> Batch:
    """Returns the scored tokens of a batch: the last tokens of the sequences of each of its rows.

    Returns:
        `rows`, `positions`, `labels` and `sequences` (the number within the batch) of every scored token `[token]`, and
        `row_of_sequence` `[sequence]`.
    """
    targets: list[tuple[int, int, int, int]] = []
    row_of_sequence: list[int] = []
    for row, sequences in enumerate(rows):
        for tokens, count in sequences:
            targets += [
                (row, at - 1, tokens[at], len(row_of_sequence)) for at in range(len(tokens) - count, len(tokens))
            ]
            row_of_sequence.append(row)
    columns = torch.tensor(targets).unbind(1)
    names = ("rows", "positions", "labels", "sequences")
    return {**dict(zip(names, columns, strict=True)), "row_of_sequence": torch.tensor(row_of_sequence)}
