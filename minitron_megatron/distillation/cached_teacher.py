"""A teacher whose predictions are in a cache: no model is in memory, but for the output layer of hidden states."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from minitron_megatron.distillation.linear_losses import Predictions
from minitron_megatron.distillation.pairs import Tap
from minitron_megatron.distillation.prediction_cache import PredictionCache
from minitron_megatron.distillation.sparse_predictions import SparsePredictions
from minitron_megatron.distillation.teachers import Wanted
from minitron_megatron.distillation.vocab_parallel import own_rows
from minitron_megatron.parallel.collectives import raise_on_all_ranks
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.schedule import SAMPLE_IDS, Batch


class CachedTeacher:
    """A cache as a teacher; see `Teacher`.

    Args:
        cache: of the predictions.
        ctx: this rank's place.
        name: what messages call it.
    """

    def __init__(self, cache: PredictionCache, ctx: ParallelContext, name: str = "the teacher"):
        self.name = name
        self.vocab = cache.index.vocab
        self.cache = cache
        self.ctx = ctx
        self._weight: Tensor | None = None

    def prepare(self, wanted: Wanted) -> None:
        """Reads the output weight of a cache of hidden states; see `Teacher`."""
        assert not wanted.states, "settings with losses between hidden states are refused before"
        with raise_on_all_ranks():
            if self.cache.has_states and self.ctx.is_last_stage:
                rows = own_rows(self.cache.output_weight(), wanted.padded_vocab, self.ctx.collection.tp)
                self._weight = rows.to(self.ctx.device)

    def problems(self, student: torch.nn.Module) -> list[str]:
        """Returns nothing: caches are compared with students before these are built."""
        return []

    def free(self) -> None:
        """Keeps what little it has."""

    def evaluate(self, batches: Sequence[Batch]) -> None:
        """Measures nothing: `cache` has done so."""

    @contextmanager
    def teach(self, batches: Sequence[Batch], training: bool) -> Iterator["CachedTargets"]:
        """Yields what reads the predictions for the micro-batches of a step; see `Teacher`."""
        yield CachedTargets(self.cache, batches, self._weight, self.ctx)


class CachedTargets:
    """The targets of a cached teacher for one step; see `Targets`. Predictions are read when they are asked for."""

    def __init__(self, cache: PredictionCache, batches: Sequence[Batch], weight: Tensor | None, ctx: ParallelContext):
        self.seconds = 0.0
        self.text_loss: float | None = None
        self._cache = cache
        self._batches = batches
        self._weight = weight
        self._ctx = ctx

    def predictions(self, number: int) -> Predictions | SparsePredictions:
        """Reads the predictions for a micro-batch, on the last stage."""
        started = time.perf_counter()
        found = self._cache.read(self._batches[number][SAMPLE_IDS].tolist())
        self.seconds += time.perf_counter() - started
        if isinstance(found, Tensor):
            assert self._weight is not None
            return Predictions(found.to(self._ctx.device), self._weight)
        return type(found)(*(values.to(self._ctx.device) for values in found))

    def state(self, tap: Tap, number: int) -> Tensor:
        """There are none."""
        raise LookupError("a cache has no hidden states of inner layers")

    def release(self, tap: Tap, number: int) -> None:
        """There is nothing to free."""
