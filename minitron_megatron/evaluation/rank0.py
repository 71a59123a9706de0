"""Work of rank 0 alone whose calls of a model are made by every rank."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from minitron_megatron.errors import UserError
from minitron_megatron.evaluation.inference import Inference
from minitron_megatron.parallel.watchdog import watchdog

T = TypeVar("T")
Call = Callable[..., Any]
_Request = tuple[str, tuple[Any, ...]]
"""Name and arguments of a method."""


@watchdog(None)  # calls have their limit, and what rank 0 does between them takes its time
def run_on_rank0(inference: Inference, work: Callable[[Call], T]) -> T | None:
    """Run `work` on rank 0. It gets a function `call(method, *arguments)`, which calls a method of `inference` on every
    rank, so that all take the same calls in the same order, whatever `work` reads, draws or decides.

    Returns:
        what `work` returned, on rank 0; None elsewhere.

    Raises:
        UserError: of `work`, on every rank. (A rank that fails otherwise ends, and the launcher ends the others.)
    """
    if not inference.ctx.is_main:
        while (request := _share(None)) is not None:
            if isinstance(request, UserError):
                raise request
            method, arguments = request
            getattr(inference, method)(*arguments)
        return None

    def call(method: str, *arguments: Any) -> Any:
        _share((method, arguments))
        return getattr(inference, method)(*arguments)

    try:
        result = work(call)
    except UserError as error:
        _share(error)
        raise
    _share(None)
    return result


def _share(value: _Request | UserError | None) -> _Request | UserError | None:
    """Returns rank 0's value on every rank."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
