"""Keeps what is zero in a sparse student zero while it trains, and makes it sparser on request.

A masked gradient is enough to keep zeros: a weight that is zero, whose gradients and moments are zero, gets no update,
and its decay is zero too. So gradients are masked before they are measured and clipped, and nothing else is changed.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from minitron_megatron.checkpoint.companions import mask_of, matrices, norm_of, pack_mask, read_mask
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.load import local_parameters
from minitron_megatron.config.distill import MasksConfig, MaskScore
from minitron_megatron.errors import CheckpointError, TrainingError
from minitron_megatron.model.axes import Param
from minitron_megatron.model.parameters import layer_key
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.sparsity.patterns import Unstructured
from minitron_megatron.training.companion_shards import require_whole_groups, sharded_companion


@dataclass
class _Masked:
    """A matrix on this rank.

    Attributes:
        parameter: the weights.
        param: of the network.
        index: for each dimension, the positions of the network's parameter that this rank holds.
        dropped: bool, true where a weight is zero.
        norms: of the inputs of all columns of the network's matrix; None if weights are dropped by magnitude.
    """

    parameter: torch.nn.Parameter
    param: Param
    index: list[np.ndarray]
    dropped: Tensor
    norms: Tensor | None


class Masks:
    """Masks of the matrices on this rank.

    Args:
        model_chunks: this rank's model.
        student: checkpoint that it starts from.
        ctx: this rank's place.
        config: with a share of zeros to reach, every matrix of the layers has a mask, and not only those that have one
            in the checkpoint.

    Raises:
        ConfigError: the layout splits a byte of a mask.
    """

    def __init__(
        self, model_chunks: Sequence[MegatronModule], student: Checkpoint, ctx: ParallelContext, config: MasksConfig
    ):
        self.ctx = ctx
        self._sparsity: float | None = None
        self._masked: list[_Masked] = []
        for chunk in model_chunks:
            for parameter, param, index in local_parameters(chunk, student.network, ctx):
                if not param.matmul or param.position is None:
                    continue
                if config.sparsity is not None or layer_key(mask_of(param)) in student.companions:
                    require_whole_groups(mask_of(param), ctx)
                    dropped = torch.zeros_like(parameter, dtype=torch.bool)
                    norms = None
                    if config.by is MaskScore.ACTIVATION:
                        norms = student.read(norm_of(param), [np.arange(param.shape[1])]).to(parameter.device)
                    self._masked.append(_Masked(parameter, param, index, dropped, norms))
        self.read(student)

    def read(self, checkpoint: Checkpoint) -> None:
        """Takes the masks of a checkpoint; a matrix without one has no zeros to keep."""
        for own in self._masked:
            if layer_key(mask_of(own.param)) in checkpoint.companions:
                own.dropped = ~read_mask(checkpoint, own.param, own.index).to(own.parameter.device)
        self._sparsity = None

    def zero_weights(self) -> None:
        """Zeroes the weights that the masks drop, before an optimiser copies them."""
        with torch.no_grad():
            for own in self._masked:
                own.parameter.masked_fill_(own.dropped, 0)

    def require_zeros(self) -> None:
        """Checks that the weights are zero where the masks say so.

        Raises:
            CheckpointError: some are not.
        """
        if wrong := self._broken():
            raise CheckpointError(
                f"the student's weights are not zero where its masks say so, in {', '.join(wrong)}: sparsify it again, "
                f"or train every weight with masks.mode=ignore"
            )

    def mask_gradients(self) -> None:
        """Zeroes the gradients of weights that stay zero, after they are reduced and before they are clipped."""
        for own in self._masked:
            gradient: Tensor = own.parameter.main_grad  # type: ignore[attr-defined]  # Megatron's, in float32
            gradient.masked_fill_(own.dropped, 0)

    def drop_smallest(self, sparsity: float) -> Iterator[tuple[torch.nn.Parameter, Tensor]]:
        """Drops weights of every matrix, until this share of it is zero. Collective over tensor ranks.

        They are the smallest of the matrix, or in each row the smallest products with the norms of their inputs.

        Yields:
            each weight on this rank, and a bool tensor of its shape: the entries to zero.
        """
        pattern = Unstructured(sparsity)
        for own in self._masked:
            # Of weights that are zero anyway, those that are dropped already come first.
            size = own.parameter.detach().float().abs().masked_fill(own.dropped, -1)
            whole = self._whole(own, size)
            if own.norms is None:
                keep = pattern.mask_of_matrices(whole, own.param.rows_of_parts())
            else:
                keep = pattern.mask(whole * own.norms)
            here = keep[np.ix_(*own.index)] if self.ctx.layout.tensor > 1 else keep
            own.dropped = own.dropped | ~here
            yield own.parameter, own.dropped
        self._sparsity = None

    def sparsity(self) -> float:
        """Returns the share of zeros in all masked matrices of the network. Collective where it has changed."""
        if self._sparsity is not None:
            return self._sparsity
        counts = torch.zeros(2, dtype=torch.float64, device=self.ctx.device)
        for own in self._masked:
            counts += torch.tensor([int(own.dropped.sum()), own.dropped.numel()], device=counts.device)
        for group in (self.ctx.collection.tp, self.ctx.collection.pp):
            dist.all_reduce(counts, group=group)
        self._sparsity = float(counts[0] / counts[1])
        return self._sparsity

    def check(self) -> None:
        """Checks that what is zero has stayed zero. Collective.

        Raises:
            TrainingError: it has not.
        """
        wrong = torch.tensor(len(self._broken()), device=self.ctx.device)
        dist.all_reduce(wrong)
        if wrong:
            raise TrainingError(f"weights of {int(wrong)} sparse matrices are no longer zero; nothing was saved")

    def sharded_state(self) -> dict[str, ShardedTensor]:
        """Returns this rank's masks for Megatron-Core's distributed checkpoints."""
        state: dict[str, ShardedTensor] = {}
        for own in self._masked:
            state |= sharded_companion(mask_of(own.param), pack_mask(~own.dropped), self.ctx)
        return state

    def _whole(self, own: _Masked, local: Tensor) -> Tensor:
        """Returns the whole matrix of which every tensor rank holds a part."""
        if self.ctx.layout.tensor == 1:
            return local
        group = self.ctx.collection.tp
        parts = [torch.empty_like(local) for _ in range(group.size())]
        dist.all_gather(parts, local.contiguous(), group=group)
        whole = torch.empty(own.param.shape, dtype=local.dtype, device=local.device)
        for rank, part in enumerate(parts):
            whole[np.ix_(*own.param.shard(rank, group.size()))] = part
        return whole

    def _broken(self) -> list[str]:
        return [layer_key(own.param) for own in self._masked if (own.parameter.detach()[own.dropped] != 0).any()]


def masks_problems(student: Checkpoint, config: MasksConfig) -> list[str]:
    """Returns what a student lacks for the settings, one sentence each."""
    missing = [p for p in matrices(student.network) if layer_key(norm_of(p)) not in student.companions]
    if config.by is MaskScore.MAGNITUDE or not missing:
        return []
    return [
        f"masks.by = activation needs the norms of inputs that `minitron sparsify` saves, and student = {student.root} "
        f"has none of {layer_key(missing[0])}: make some of its weights zero with method=wanda, or set "
        f"masks.by=magnitude"
    ]


def share_of_zeros(config: MasksConfig, step: int, before: float = 0.0) -> float | None:
    """Returns the share of zeros that a step is to reach; None if it drops nothing.

    The cubic schedule of Zhu and Gupta (1710.01878, equation 1).

    Args:
        config: its schedule.
        step: number of the step, from 1.
        before: share of zeros before the first one.
    """
    if config.sparsity is None or config.last_step is None or not config.first_step <= step <= config.last_step:
        return None
    if (step - config.first_step) % config.every and step != config.last_step:
        return None
    span = config.last_step - config.first_step
    left = 1 - (step - config.first_step) / span if span else 0.0
    return config.sparsity + (before - config.sparsity) * left**3
