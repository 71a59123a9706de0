"""Loads weights into a model on this rank, in any layout."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.transformer.module import MegatronModule

from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.errors import CheckpointError, UnsupportedModelError
from minitron_megatron.model.axes import Param
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import PROJECTIONS, by_key, parameters
from minitron_megatron.parallel.context import ParallelContext


def local_parameters(
    model: MegatronModule, network: Network, ctx: ParallelContext
) -> Iterator[tuple[torch.nn.Parameter, Param, list[np.ndarray]]]:
    """Yields the parameters of a model on this rank, with their places in the network.

    A tensor-parallel shard is a range of one axis, or of a query group's rows, so sharding is indexing, like pruning.

    Yields:
        every parameter of `model` except distillation's projections, the network's parameter, and the positions of it
        that this rank holds.

    Raises:
        UnsupportedModelError: it has parameters that the network does not have.
    """
    table = by_key(parameters(network))
    # Megatron's own sharded state dict gives the checkpoint key of each parameter, whatever the layer spec.
    keys = {
        entry.data.data_ptr(): entry.key
        for entry in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    named = [(parameter, keys.get(parameter.data_ptr(), name)) for name, parameter in model.named_parameters()]
    own = [(parameter, key) for parameter, key in named if not key.startswith(PROJECTIONS)]
    if unknown := sorted({key for _, key in own} - table.keys()):
        raise UnsupportedModelError(f"the model has parameters that its network does not have: {', '.join(unknown)}")
    for parameter, key in own:
        param = table[key]
        yield parameter, param, param.shard(ctx.tensor_rank, ctx.layout.tensor)


def load_weights(model_chunks: Sequence[MegatronModule], source: TensorSource, ctx: ParallelContext) -> None:
    """Loads all parameters of this rank's model from a source, reading only what this rank holds.

    Converts weights to the model's dtype, and checks that each was filled.

    Raises:
        CheckpointError: a weight was not filled, or the source has NaN in it.
    """
    with torch.no_grad():
        for model in model_chunks:
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
            for parameter, param, index in local_parameters(model, source.network, ctx):
                weight = source.read(param, index)
                assert weight.shape == parameter.shape  # copy_ would broadcast
                parameter.copy_(weight)
            if wrong := [name for name, parameter in model.named_parameters() if parameter.isnan().any()]:
                raise CheckpointError(
                    f"{getattr(source, 'root', 'the source')} leaves NaN in weights: {', '.join(wrong)}"
                )
