"""Saves what a model has beside its matrices, masks and scales, in Megatron-Core's distributed checkpoints."""

import math

import numpy as np
from megatron.core.dist_checkpointing import ShardedTensor
from torch import Tensor

from minitron_megatron.errors import ConfigError
from minitron_megatron.model.axes import Grouped, Param
from minitron_megatron.model.parameters import layer_key
from minitron_megatron.parallel.context import ParallelContext


def sharded_companion(companion: Param, local: Tensor, ctx: ParallelContext) -> dict[str, ShardedTensor]:
    """Returns this rank's part of a companion as sharded tensors: one for each run of rows that lie together.

    Args:
        companion: see `companions`.
        local: this rank's part of it.
        ctx: this rank's place.
    """
    key, (rows, columns) = layer_key(companion), companion.shard(ctx.tensor_rank, ctx.layout.tensor)
    num_rows, num_columns = companion.shape
    is_whole = len(rows) * len(columns) == num_rows * num_columns
    replica = (ctx.tensor_rank if is_whole else 0, ctx.data_rank)
    across = (1, int(columns[0]) // len(columns), num_columns // len(columns))
    state = {}
    starts = np.flatnonzero(np.diff(rows, prepend=-2) != 1).tolist()
    for start, end in zip(starts, [*starts[1:], len(rows)], strict=True):
        # Fragments of equal size, which both where they begin and the whole length are multiples of.
        step = math.gcd(int(rows[start]), end - start, num_rows)
        for first in range(start, end, step):
            down = (0, int(rows[first]) // step, num_rows // step)
            part = local[first : first + step]
            state[f"{key}.{first}"] = ShardedTensor.from_rank_offsets(key, part, down, across, replica_id=replica)
    return state


def require_whole_groups(companion: Param, ctx: ParallelContext) -> None:
    """Checks that no group of columns is split between tensor ranks.

    Raises:
        ConfigError: one is.
    """
    ranks = ctx.layout.tensor
    [_, columns] = companion.dims
    assert isinstance(columns, Grouped)
    of_rank = len(companion.shard(ctx.tensor_rank, ranks)[1])
    if of_rank not in (companion.shape[1], companion.shape[1] / ranks):
        own = columns.inner.size(companion.sizes) / ranks
        raise ConfigError(
            [
                f"parallel.tensor = {ranks} gives every rank {own:g} columns of the matrix of {layer_key(companion)}, "
                f"which belong together in groups of {columns.group}: choose another tensor size"
            ]
        )
