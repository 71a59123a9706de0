"""Runs code on rank 0 whose model calls are mirrored on all ranks."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from minitron_megatron.errors import UserError
from minitron_megatron.evaluation.inference import Inference
from minitron_megatron.parallel.watchdog import watchdog

T = TypeVar("T")
Call = Callable[..., Any]
_Request = tuple[str, tuple[Any, ...]]
"""Name and arguments of a method call."""


@watchdog(None)  # each call has a limit of its own; between them the other ranks wait for rank 0
def run_on_rank0(inference: Inference, work: Callable[[Call], T]) -> T | None:
    """Runs `work` on rank 0, with a function `call(method, *arguments)` that calls methods of `inference` on all ranks.

    All ranks make the same calls in the same order, whatever `work` reads, draws or decides.

    Returns:
        what `work` returned, on rank 0; None elsewhere.

    Raises:
        UserError: of `work`, on every rank. (After any other error the launcher ends the other ranks.)
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
