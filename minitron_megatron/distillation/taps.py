"""Locates hidden states: the module that outputs one, and its pipeline rank."""

from collections.abc import Sequence
from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from minitron_megatron.config.loss import EMBEDDING, LAYER
from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.distillation.pairs import Tap
from minitron_megatron.model.build import layers_of
from minitron_megatron.model.layers import KINDS
from minitron_megatron.parallel.collectives import gather_objects
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.layout import layers_per_stage

ModuleOutput = Tensor | tuple[Tensor, Tensor | None]
"""A state, or a state and a bias that is not added to it yet."""


def module_at(model_chunks: Sequence[GPTModel], tap: Tap) -> torch.nn.Module | None:
    """Returns the module whose output is a state, if this rank has it."""
    point, layer = tap
    for chunk in model_chunks:
        if point == EMBEDDING and chunk.pre_process:
            return chunk.embedding
        modules = layers_of(chunk).get(layer) if point != EMBEDDING else None
        if modules:
            return modules[-1] if point == LAYER else _sublayer_module(modules, point)
    return None


def _sublayer_module(modules: Sequence[torch.nn.Module], kind: str) -> torch.nn.Module:
    """Returns the module of a kind of sublayer in a transformer layer."""
    slot = next(sublayer.slot for sublayer in KINDS.values() if sublayer.name == kind)
    own = (getattr(module, slot.module) for module in modules)
    return next(module for module in own if not isinstance(module, IdentityOp))


def state_of(output: ModuleOutput) -> Tensor:
    """Returns the hidden state in a module's output, with the bias that an attention or MLP returns separately."""
    state, bias = output if isinstance(output, tuple) else (output, None)
    return state if bias is None else state + bias


def pipeline_rank_of(tap: Tap, num_layers: int, layout: ParallelConfig) -> int:
    """Returns the pipeline rank that has a state, in a network of `num_layers` transformer layers."""
    point, layer = tap
    if point == EMBEDDING:
        return 0
    ends = accumulate(layers_per_stage(num_layers, layout.stages))
    return next(stage for stage, end in enumerate(ends) if layer < end) % layout.pipeline


def stages_group(stages: Sequence[int], ctx: ParallelContext) -> dist.ProcessGroup | None:
    """Makes a process group of some stages of this rank's pipeline. Collective on the world.

    Its messages do not mix with those of the schedules.

    Returns:
        the group; None on other stages.
    """
    pipeline = dist.get_process_group_ranks(ctx.collection.pp)
    own, own_group = [pipeline[stage] for stage in stages], None
    for ranks in sorted(set(map(tuple, gather_objects(own)))):
        group = dist.new_group(list(ranks))
        if dist.get_rank() in ranks:
            own_group = group
    if own_group:
        # NCCL connects a group at its first operation, in which all of its ranks must take part.
        dist.all_reduce(torch.zeros(1, device=ctx.device), group=own_group)
    return own_group
