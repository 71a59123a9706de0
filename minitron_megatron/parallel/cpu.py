"""The CPU backend: lets Megatron-Core, which assumes CUDA, run on the CPU over gloo.

The entry point calls `install_cpu_backend()` once. Where CUDA exists it does nothing. Elsewhere it replaces the
functions of `torch.cuda` that Megatron-Core calls without checking for a device, and redirects literals such as
`device="cuda"`. This is the only module that patches anything for longer than an import.
"""

import contextlib
import ctypes
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

_CACHE_ELEMENTS = 2**18


def in_blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Splits tensors of one length along their first dimension: on the CPU into blocks that fit into a core's cache.

    A chain of memory-bound operations is several times as fast on such blocks as on whole tensors. Elsewhere there is
    one block.
    """
    first = tensors[0]
    if first.numel() <= _CACHE_ELEMENTS or first.device.type != "cpu":
        return iter([tensors])
    step = max(1, _CACHE_ELEMENTS // math.prod(first.shape[1:]))
    return zip(*(tensor.split(step) for tensor in tensors), strict=True)


_PRODUCTS = {
    *(torch.matmul, torch.mm, torch.bmm, torch.addmm, torch.baddbmm, F.linear, F.scaled_dot_product_attention),
    *(Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm, Tensor.addmm, Tensor.baddbmm),
}


class _OnCPU(TorchFunctionMode):
    """Redirects calls that name a CUDA device to the CPU, and makes `Tensor.type()` answer as on CUDA.

    Megatron's optimisers sort parameters by `param.type() == "torch.cuda.FloatTensor"`.

    Args:
        widen: multiply bf16 matrices in float32. The result is rounded to bf16 either way, but where oneDNN has no bf16
            kernel for the processor, torch falls back on plain loops, tens of times as slow.
    """

    def __init__(self, widen: bool):
        super().__init__()
        self.widen = widen

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        # Called before every operation, and a new token takes thousands of them.
        kwargs = kwargs or {}
        if self.widen and func in _PRODUCTS and any(map(_is_bf16, args)):
            out = kwargs.pop("out", None)
            wide = (arg.float() if _is_bf16(arg) else arg for arg in args)
            product = func(*wide, **kwargs).bfloat16()
            return product if out is None else out.copy_(product)
        if func is Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.", 1)
        if func is Tensor.cuda:
            return args[0]
        if func is Tensor.to:
            args = tuple("cpu" if _names_cuda(arg) else arg for arg in args)
        if kwargs and _names_cuda(kwargs.get("device")):
            kwargs = {**kwargs, "device": torch.device("cpu")}
        return func(*args, **kwargs)


def _is_bf16(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype is torch.bfloat16


def _names_cuda(device: object) -> bool:
    return (isinstance(device, str) and device.split(":")[0] == "cuda") or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class _Stream:
    """A CUDA stream's interface, for a device that runs everything in order."""

    def __init__(self, *args: object, **kwargs: object):
        pass

    def wait_stream(self, stream: object) -> None:
        pass

    def wait_event(self, event: object) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def record_event(self, event: Any = None) -> Any:
        return event


def _cuda_stubs() -> dict[str, Callable[..., Any]]:
    # Each name gets a function object of its own: torch._dynamo, which Megatron's jit fusions import, refuses to trace
    # one object under two names.
    return {
        "current_device": lambda: torch.device("cpu"),
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "synchronize": lambda device=None: None,
        "set_device": lambda device: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda device=None: torch.random.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.random.set_rng_state(state),
        "manual_seed": lambda seed: torch.random.manual_seed(seed),
        "initial_seed": lambda: torch.random.initial_seed(),
        "stream": lambda stream: contextlib.nullcontext(),
        "Stream": _Stream,
    }


# Two settings of glibc's allocator (malloc.h), and the largest mmap threshold that it accepts (mallopt(3)).
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX = -1, -3, 2**25


def _keep_freed_memory() -> None:
    """Makes glibc keep freed memory for the next allocation, as CUDA's caching allocator does.

    By default it returns the activations of a step to the kernel, which then clears as many new pages for the next
    step: an eighth of a small model's step time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:  # another C library has none
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_MAX)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Makes glibc return unused pages between used ones to the kernel.

    Call it before a step's peak memory. A no-op where CUDA exists.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and not torch.cuda.is_available():
        trim(0)


def _install_mode(mode: _OnCPU) -> None:
    """Enters a mode permanently, and again for backward passes, which torch runs with modes switched off."""
    run_backward = torch.autograd._engine_run_backward

    def run_in_mode(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_in_mode
    mode.__enter__()


def bypass_cpu_mode() -> contextlib.AbstractContextManager:
    """Returns a context that bypasses the CPU backend's mode, for operations that name no device.

    The mode's overhead in the thousands of operations of one new token equals the time of its matrix products.
    """
    if torch.cuda.is_available() or _lacks_bf16_products():
        return contextlib.nullcontext()
    return torch._C.DisableTorchFunction()


def _lacks_bf16_products() -> bool:
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def install_cpu_backend() -> None:
    """Makes Megatron-Core run on this process's CPU. A no-op where CUDA exists; safe to call twice."""
    if torch.cuda.is_available() or getattr(torch.cuda, "Stream", None) is _Stream:
        return
    _keep_freed_memory()
    # Megatron's jit fusions, such as squared ReLU, would need a C++ compiler, and seconds of compilation.
    torch.compiler.set_stance("force_eager")
    for name, stand_in in _cuda_stubs().items():
        setattr(torch.cuda, name, stand_in)
    _install_mode(_OnCPU(_lacks_bf16_products()))

    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.tensor_parallel import random

    # Megatron's RNG tracker reads and sets the CUDA generator through these two.
    random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.random.get_rng_state()
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.random.set_rng_state(state)

    # torch's AdamW, which runs on the CPU, keeps the step as a tensor per parameter. Loading the distributed
    # optimizer's state gives all parameters the same step tensor, which then counts all of their updates
    # (DistributedOptimizer.load_state_dict and the method below, in 0.16 and 0.19).
    load = DistributedOptimizer._set_main_param_and_optimizer_states

    def load_with_step(self: DistributedOptimizer, model_param: torch.nn.Parameter, tensors: dict[str, Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {**tensors, "step": state["step"]}
        load(self, model_param, tensors)

    DistributedOptimizer._set_main_param_and_optimizer_states = load_with_step
