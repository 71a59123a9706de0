"""Runs Megatron-LM's `pretrain_gpt.py`, which the first argument names, on the CPU, and keeps what its model says.

What the CPU backend has no stand-in for, since Megatron-Core does not ask for it: devices and their memory, the
compiler of the data's index, Triton, and zero-centred norms. `BATCHES` is the folder where every rank leaves the
tokens, labels and losses of each micro-batch that it sees.
"""

import collections
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch

from minitron_megatron.parallel.cpu import install_cpu_backend

if __name__ == "__main__":
    script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    # Behind what is installed, so that `megatron.core` is that one.
    sys.path.append(str(Path(script).parent))
    install_cpu_backend()
    torch.cuda.device_count = lambda: int(os.environ["WORLD_SIZE"])
    torch.cuda.memory_stats = lambda device=None: collections.defaultdict(int)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(torch.cuda, name, lambda device=None: 0)
    torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(major=9, minor=0)
    torch.cuda.device_memory_used = lambda device=None: 0
    for name, dtype in {"Float": torch.float32, "Int": torch.int32, "Long": torch.int64}.items():
        setattr(torch.cuda, f"{name}Tensor", lambda values, dtype=dtype: torch.tensor(values, dtype=dtype))
    sys.modules["megatron.core.transformer.custom_layers.batch_invariant_kernels"] = MagicMock()

    import megatron.training.initialize as initialize
    import megatron.training.training as training
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from minitron_megatron.model.torch_modules import Norm

    start = initialize.initialize_megatron
    training.initialize_megatron = lambda *args, **kwargs: start(*args, **{**kwargs, "allow_no_cuda": True})
    initialize._compile_dependencies = lambda: None
    theirs, forward, seen = WrappedTorchNorm.__new__, GPTModel.forward, []

    def norm(cls, config, hidden_size, eps=1e-5, **kwargs):
        kind = Norm if config.layernorm_zero_centered_gamma else theirs
        return kind(*((cls,) if kind is theirs else ()), config, hidden_size, eps)

    def forward_and_keep(self, input_ids, *args, labels=None, **kwargs):
        losses = forward(self, input_ids, *args, labels=labels, **kwargs)
        seen.append({"tokens": input_ids, "labels": labels, "losses": losses.detach() if self.post_process else None})
        torch.save(seen, Path(os.environ["BATCHES"]) / f"{os.environ['RANK']}.pt")
        return losses

    WrappedTorchNorm.__new__, GPTModel.forward = norm, forward_and_keep
    # Here and not as a module of its own, since the processes that write checkpoints begin by importing `__main__`.
    exec(compile(Path(script).read_text(), script, "exec"))
