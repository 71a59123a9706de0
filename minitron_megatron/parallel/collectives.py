"""Collectives that verbs need beside those inside Megatron-Core."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minitron_megatron.disk import user_error
from minitron_megatron.errors import UserError
from minitron_megatron.parallel.watchdog import watchdog

T = TypeVar("T")


@contextmanager
def raise_on_all_ranks(gather: Callable[[Any], list] | None = None) -> Iterator[None]:
    """Raises on every rank if the block fails on one, so that no rank hangs in a collective. Every rank enters it.

    Args:
        gather: gathers an object of every rank, in rank order; over the world by default.

    Raises:
        UserError: a rank raised one; the first rank's is raised on all others.
        RuntimeError: a rank raised another exception; that rank raises its own.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # raised below, when all ranks know of it
        own = error if isinstance(error, UserError) else user_error(error) or error
    # Other exceptions may not survive pickling.
    report = own if own is None or isinstance(own, UserError) else f"rank {dist.get_rank()} failed: {own!r}"
    try:
        reports = (gather or gather_objects)(report)
    except Exception:
        if own is None:
            raise
        raise own from None
    if own is not None:
        raise own
    for other in reports:
        if other is not None:
            raise other if isinstance(other, UserError) else RuntimeError(other)


def rank0_first(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0 while the others wait, for as long as it takes.

    Returns:
        its result on every rank; it should be small.

    Raises:
        UserError, RuntimeError: as of `raise_on_all_ranks`.
    """
    result: list[Any] = [None]
    with watchdog(None), raise_on_all_ranks():
        if dist.get_rank() == 0:
            result = [work()]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sums `tensor` over `group`, in place; every rank gets the sum."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def gather_dim(tensor: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Concatenates the equal-sized `tensor` of every rank of `group` along `dim`; every rank gets the whole."""
    if group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def broadcast_from_last(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Fills `tensor` with that of the last rank of `group`, in place."""
    if group.size() > 1:
        dist.broadcast(tensor, dist.get_global_rank(group, group.size() - 1), group=group)
    return tensor


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gathers the `value` of every rank of `group`, by default the world, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
