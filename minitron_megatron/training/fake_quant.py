"""Trains a student whose weights are rounded in the forward pass (quantisation-aware distillation).

The optimiser keeps and updates weights as they are, in float32; the model computes with their rounded values, and so do
its gradients (the straight-through estimator, 1308.3432). Scales are fixed at the start: those of rounded weights would
be others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from minitron_megatron.checkpoint.companions import matrices, scale_of
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.load import local_parameters
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.config.calibration import Scheme
from minitron_megatron.config.distill import FakeQuantConfig
from minitron_megatron.model.axes import Param
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import layer_key
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.sparsity.grids import Grid, group_problems
from minitron_megatron.training.companion_shards import require_whole_groups, sharded_companion


@dataclass
class _Rounded:
    """A matrix on this rank.

    Attributes:
        parameter: the weights.
        grid: that they are rounded to.
        scale: the scales, as a parameter of the network.
        scales: this rank's part of them, `[rows, groups]`.
        groups: for each column on this rank, its place in `scales`.
    """

    parameter: torch.nn.Parameter
    grid: Grid
    scale: Param
    scales: Tensor
    groups: Tensor


class FakeQuant:
    """Rounds the weights of all matrices of the layers, in place.

    Args:
        model_chunks: this rank's model.
        source: of the weights that the model was loaded from.
        student: checkpoint whose scales are taken, if it has any of this scheme and group size.
        config: the scheme.
        ctx: this rank's place.

    Raises:
        ConfigError: the layout splits a group of columns.
    """

    def __init__(
        self,
        model_chunks: Sequence[MegatronModule],
        source: TensorSource,
        student: Checkpoint,
        config: FakeQuantConfig,
        ctx: ParallelContext,
    ):
        assert config.scheme is not None
        self.ctx = ctx
        self._rounded: list[_Rounded] = []
        known = student.companions if _has_scales(student, config.scheme) and source is student else {}
        for chunk in model_chunks:
            for parameter, param, (rows, columns) in _matrices(chunk, student, ctx):
                grid = Grid.of(config.scheme, param.shape[1], config.group_size)
                scale = scale_of(param, grid.group)
                require_whole_groups(scale, ctx)
                held, groups = np.unique(columns // grid.group, return_inverse=True)
                if layer_key(scale) in known and known[layer_key(scale)].shape == scale.shape:
                    scales = student.read(scale, [rows, held])
                else:
                    whole = source.read(param, [rows, np.arange(param.shape[1])]).float()
                    scales = grid.scales(whole, torch.bfloat16)[:, held]  # the number format of training
                device = parameter.device
                self._rounded.append(
                    _Rounded(parameter, grid, scale, scales.to(device), torch.from_numpy(groups).to(device))
                )

    @torch.no_grad()
    def round_weights(self) -> None:
        """Rounds the model's weights, which the optimiser has just set from its own."""
        for own in self._rounded:
            own.parameter.copy_(own.grid.round(own.parameter.float(), own.scales[:, own.groups]))

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """Returns this rank's scales for Megatron-Core's distributed checkpoints."""
        state: dict[str, ShardedTensor] = {}
        for own in self._rounded:
            state |= sharded_companion(own.scale, own.scales, self.ctx)
        return state


def _has_scales(student: Checkpoint, scheme: Scheme) -> bool:
    return bool(student.scales) and student.manifest.details.get("scheme") == scheme.value


def fake_quant_problems(network: Network, config: FakeQuantConfig) -> list[str]:
    """Returns which matrices of a network a group size does not divide, one sentence for each name."""
    return group_problems(list(matrices(network)), config.group_size)


def _matrices(
    chunk: MegatronModule, student: Checkpoint, ctx: ParallelContext
) -> list[tuple[torch.nn.Parameter, Param, list[np.ndarray]]]:
    return [
        (parameter, param, index)
        for parameter, param, index in local_parameters(chunk, student.network, ctx)
        if param.matmul and param.position is not None
    ]
