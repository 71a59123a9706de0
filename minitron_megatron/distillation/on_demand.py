"""A teacher that is in memory only while it teaches."""

import gc
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from minitron_megatron.distillation.result import StepResult
from minitron_megatron.distillation.teachers import Targets, Teacher, Wanted
from minitron_megatron.parallel.cpu import give_back_freed_memory
from minitron_megatron.parallel.schedule import Batch
from minitron_megatron.parallel.watchdog import watchdog


class OnDemandTeacher:
    """Loads a teacher before the first step that it teaches in, and frees it before the first that it does not.

    Args:
        load: makes the teacher. Collective.
        name: what messages call it.
        vocab: tokens that it predicts.
    """

    def __init__(self, load: Callable[[], Teacher], name: str, vocab: int):
        self.name = name
        self.vocab = vocab
        self._load = load
        self._wanted = Wanted()
        self._teacher: Teacher | None = None

    def prepare(self, wanted: Wanted) -> None:
        """Remembers what every step will want; see `Teacher`."""
        self._wanted = wanted

    def problems(self, student: torch.nn.Module) -> list[str]:
        """Returns nothing: it is not there yet, and its checkpoint has been compared with the student's."""
        return []

    def teach(self, batches: Sequence[Batch], training: bool) -> AbstractContextManager[Targets]:
        """Yields the targets of a step; see `Teacher`."""
        return self._loaded().teach(batches, training)

    def evaluate(self, batches: Sequence[Batch]) -> StepResult | None:
        """Measures the teacher itself; see `Teacher`."""
        return self._loaded().evaluate(batches)

    def free(self) -> None:
        """Frees the teacher."""
        if self._teacher is not None:
            self._teacher = None
            gc.collect()  # modules and their hooks refer to each other
            give_back_freed_memory()

    def _loaded(self) -> Teacher:
        if self._teacher is None:
            with watchdog(None):  # for as long as it takes
                self._teacher = self._load()
                self._teacher.prepare(self._wanted)
        return self._teacher
