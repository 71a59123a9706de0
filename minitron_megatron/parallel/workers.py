"""Processes that share one piece of work, whatever its layout: the ranks that there are, or this process alone."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from minitron_megatron.errors import LostWorkerError
from minitron_megatron.parallel.collectives import gather_objects, raise_on_all_ranks

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This process among those that share the work.

    Attributes:
        rank, size: which of how many.
        group: all of them, where they are several.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def run(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on all workers and wait for each other.

        Returns:
            what it returned on each of them, by rank.

        Raises:
            UserError: of the first worker that has one.
            LostWorkerError: a worker is gone.
            RuntimeError: another worker found a defect. What fails on this one is raised as it is.
        """
        if self.size == 1:
            return [work()]
        with raise_on_all_ranks(self._gather):
            result = work()
        return self._gather(result)

    def _gather(self, value: T) -> list[T]:
        try:
            return _in_a_thread(lambda: gather_objects(value, self.group))
        except RuntimeError as e:
            raise LostWorkerError(
                f"one of the {self.size} processes that share this work was ended from outside: see whether the memory "
                f"was enough, and run it again"
            ) from e

    def run_on_main(self, work: Callable[[], object]) -> None:
        """Run `work` on the first worker alone, while the others wait."""
        self.run(lambda: work() if self.is_main else None)


def _in_a_thread(work: Callable[[], T]) -> T:
    """Wait for `work` so that a signal can end the wait, as it cannot inside a collective."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result()
    finally:
        pool.shutdown(wait=False)


ALONE = Workers()
"""This process, when nobody shares its work."""


@contextmanager
def join_workers() -> Iterator[Workers]:
    """Join the ranks that torchrun or srun started, and leave them at the end. Without any, work alone."""
    owns_world = not dist.is_initialized()
    if owns_world and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    if owns_world:
        dist.init_process_group("gloo")
    try:
        # Of its own, since the group of a training run may be of a kind that has no objects to send. Who is done waits
        # for the others as long as they live.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        yield Workers(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if owns_world:
            dist.destroy_process_group()
