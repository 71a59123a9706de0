"""The few collectives that verbs need beside those inside Megatron-Core."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from minitron_megatron.errors import UserError
from minitron_megatron.parallel.watchdog import watchdog

T = TypeVar("T")


@contextmanager
def raise_on_all_ranks(gather: Callable[[Any], list] | None = None) -> Iterator[None]:
    """A block that every rank enters, and that fails on all of them if it fails on one, so that none waits for it.

    Args:
        gather: gives what every rank hands over, by rank; over the world by default.

    Raises:
        UserError: of the first rank that has one.
        RuntimeError: another rank found a defect; that rank raises the defect itself.
    """
    own: Exception | None = None
    try:
        yield
    except Exception as error:  # raised below, when all ranks know of it
        own = error
    # Any other error may not survive the way to another process.
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
    """Runs `work` on rank 0 alone, which may take long, as tokenising does. Its result, which must be small, reaches
    every rank, and so does its error."""
    result: list[Any] = [None]
    with watchdog(None), raise_on_all_ranks():
        if dist.get_rank() == 0:
            result = [work()]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def sum_over(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Sum `tensor` over `group`, in place; every rank gets the sum."""
    if group.size() > 1:
        dist.all_reduce(tensor, group=group)
    return tensor


def gather_dim(tensor: torch.Tensor, group: dist.ProcessGroup, dim: int) -> torch.Tensor:
    """Concatenate the equal-sized `tensor` of every rank of `group` along `dim`; every rank gets the whole."""
    if group.size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    dist.all_gather(parts, tensor.contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def broadcast_from_last(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Fill `tensor` with that of the last rank of `group`, in place."""
    if group.size() > 1:
        dist.broadcast(tensor, dist.get_global_rank(group, group.size() - 1), group=group)
    return tensor


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Gathers the `value` of every rank of `group`, by default the world, in rank order, on every rank."""
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values
