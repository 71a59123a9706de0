"""Workers that share work without a model-parallel layout: all ranks of the job, or this process alone."""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from minitron_megatron.errors import LostWorkerError, raise_if_any
from minitron_megatron.parallel.collectives import gather_objects, raise_on_all_ranks
from minitron_megatron.process import meeting_problems

T = TypeVar("T")


@dataclass(frozen=True)
class Workers:
    """This process and the others that share the work.

    Attributes:
        rank: of this process.
        size: number of workers.
        group: of all workers; None with only one.
    """

    rank: int = 0
    size: int = 1
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def run(self, work: Callable[[], T]) -> list[T]:
        """Runs `work` on all workers, and waits for all of them.

        Returns:
            the results of all workers, in rank order.

        Raises:
            UserError: a worker raised one; the first worker's is raised on all others.
            LostWorkerError: a worker was killed.
            RuntimeError: a worker raised another exception; that worker raises its own.
        """
        if self.size == 1:
            return [work()]
        with raise_on_all_ranks(self._gather):
            result = work()
        return self._gather(result)

    def _gather(self, value: T) -> list[T]:
        try:
            return _run_in_thread(lambda: gather_objects(value, self.group))
        except RuntimeError as e:
            raise LostWorkerError(
                f"one of the {self.size} processes that share this work was killed: see whether the memory was enough, "
                f"and run it again"
            ) from e

    def run_on_main(self, work: Callable[[], object]) -> None:
        """Runs `work` on the first worker, while the others wait."""
        self.run(lambda: work() if self.is_main else None)


def _run_in_thread(work: Callable[[], T]) -> T:
    """Runs `work` in a thread, so that a signal can interrupt the wait, which it cannot inside a collective."""
    pool = ThreadPoolExecutor(1)
    try:
        return pool.submit(work).result()
    finally:
        pool.shutdown(wait=False)


ALONE = Workers()
"""This process without other workers."""


@contextmanager
def join_workers() -> Iterator[Workers]:
    """Joins the ranks that torchrun or srun started while the block runs. Without any, yields `ALONE`."""
    owns_world = not dist.is_initialized()
    if owns_world and int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield ALONE
        return
    if owns_world:
        raise_if_any(meeting_problems(os.environ))
        dist.init_process_group("gloo")
    try:
        # A group of its own, since a training run's NCCL group cannot gather objects on the CPU. Fast workers wait for
        # slow ones without a practical limit.
        group = dist.new_group(backend="gloo", timeout=timedelta(days=1))
        yield Workers(dist.get_rank(), dist.get_world_size(), group)
    finally:
        if owns_world:
            dist.destroy_process_group()
