"""From a checkpoint on disk into a model on this rank, in any layout."""

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
    """What of the network a model on this rank holds.

    A tensor-parallel shard is a range of one axis, or of a query group's rows, so that sharding is indexing, as pruning
    is.

    Yields:
        every parameter of `model` but what distillation has added, what it is of the network, and the positions of it
        that this rank holds.

    Raises:
        UnsupportedModelError: it has parameters that the network does not have.
    """
    table = by_key(parameters(network))
    # Megatron's own sharded state dict knows the checkpoint key of each parameter, whatever the layer spec.
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
    """Fill all parameters of this rank's model from a source, reading only what this rank holds.

    Weights are converted to the model's number format. That each of them was really filled is checked.

    Raises:
        CheckpointError: a weight was not filled, or the source has NaN in it.
    """
    with torch.no_grad():
        for model in model_chunks:
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
            for parameter, param, index in local_parameters(model, source.network, ctx):
                weight = source.read(param, index)
                assert weight.shape == parameter.shape  # or it would be repeated to fill the parameter
                parameter.copy_(weight)
            if wrong := [name for name, parameter in model.named_parameters() if parameter.isnan().any()]:
                raise CheckpointError(
                    f"{getattr(source, 'root', 'the source')} leaves weights that are no numbers: {', '.join(wrong)}"
                )
