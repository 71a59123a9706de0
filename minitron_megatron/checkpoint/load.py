"""From a checkpoint on disk into a model on this rank, in any layout."""

from collections.abc import Iterator

import numpy as np
import torch
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.models.gpt import GPTModel

from minitron_megatron.checkpoint.source import TensorSource, instances
from minitron_megatron.errors import CheckpointError, UnsupportedModelError
from minitron_megatron.model.axes import PROJECTIONS, Param, axis_sizes, parameters
from minitron_megatron.model.shape import ModelShape
from minitron_megatron.parallel.groups import Groups


def local_parameters(
    model: GPTModel, shape: ModelShape, groups: Groups
) -> Iterator[tuple[torch.nn.Parameter, Param, int | None, list[np.ndarray]]]:
    """What of the network a model on this rank holds.

    A tensor-parallel shard is a range of one axis, or of a query group's rows, so that sharding is indexing, as pruning
    is.

    Yields:
        every parameter of `model` but what distillation has added, its row of the axis table, the number of its
        sublayer among those of its kind, and the positions it holds.

    Raises:
        UnsupportedModelError: it has parameters that a network of that shape does not have.
    """
    table = {
        param.name if layer is None else param.layer_key(layer, shape): (param, layer)
        for param in parameters(shape)
        for layer in instances(param, shape)
    }
    sizes = axis_sizes(shape)
    # Megatron's own sharded state dict knows the checkpoint key of each parameter, whatever the layer spec.
    keys = {
        entry.data.data_ptr(): entry.key
        for entry in model.sharded_state_dict(metadata={"non_homogeneous_layers": True}).values()
        if isinstance(entry, ShardedTensor | ShardedTensorFactory)
    }
    named = [(parameter, keys.get(parameter.data_ptr(), name)) for name, parameter in model.named_parameters()]
    own = [(parameter, key) for parameter, key in named if not key.startswith(PROJECTIONS)]
    if unknown := sorted({key for _, key in own} - table.keys()):
        raise UnsupportedModelError(
            f"the model has parameters that a network of its shape does not have: {', '.join(unknown)}"
        )
    for parameter, key in own:
        param, layer = table[key]
        yield parameter, param, layer, param.shard(groups.tensor_rank, groups.layout.tensor, sizes)


def load_weights(chunks: list[GPTModel], source: TensorSource, groups: Groups) -> None:
    """Fill all parameters of this rank's model from a source, reading only what this rank holds.

    Weights are converted to the model's number format. That each of them was really filled is checked.

    Raises:
        CheckpointError: a weight was not filled, or the source has NaN in it.
    """
    with torch.no_grad():
        for model in chunks:
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
            for parameter, param, layer, index in local_parameters(model, source.shape, groups):
                weight = source.read(param, layer, index)
                assert weight.shape == parameter.shape  # or it would be repeated to fill the parameter
                parameter.copy_(weight)
            if wrong := [name for name, parameter in model.named_parameters() if parameter.isnan().any()]:
                raise CheckpointError(
                    f"{getattr(source, 'root', 'the source')} leaves weights that are no numbers: {', '.join(wrong)}"
                )
