"""The few collectives that verbs need beside those inside Megatron-Core."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def main_first(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and then on the others, which find what rank 0 left on disk.

    An error on rank 0 reaches every rank, so that none waits for ever.
    """
    error: list = [None]
    result = None
    if dist.get_rank() == 0:
        try:
            result = work()
        except Exception as e:  # handed to every rank below
            error = [e]
    dist.broadcast_object_list(error, src=0)
    if error[0] is not None:
        raise error[0]
    return result if dist.get_rank() == 0 else work()


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


def gather_objects(value: T, group: dist.ProcessGroup) -> list[T]:
    """The `value` of every rank of `group`, in rank order, on every rank."""
    values: list = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values
