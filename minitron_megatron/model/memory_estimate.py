"""Estimates a rank's share of a network: parameters, and the activation bytes kept for the backward pass.

Needs no torch. Counts what Megatron-Core keeps on CUDA with Transformer Engine: no score matrix, thanks to flash
attention, and one copy of each matrix's input, as in Korthikanti et al. (2205.05198, section 4).
"""

import math
from collections.abc import Iterator
from itertools import accumulate

from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.config.schema import DType
from minitron_megatron.model.axes import Param
from minitron_megatron.model.layers import Sublayer
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import parameters
from minitron_megatron.parallel.layout import layers_per_stage

DTYPE_BYTES = {DType.BF16: 2, DType.FP16: 2, DType.FP32: 4}
FLOAT32_BYTES = 4


def rank_parameters(network: Network, layout: ParallelConfig, stage: int) -> int:
    """Returns the parameters on a rank of one pipeline stage, including the vocabulary's padding."""
    return sum(_elements_on_rank(network, layout, stage))


def largest_weight(network: Network, layout: ParallelConfig, stage: int) -> int:
    """Returns the size of the largest weight on a rank of one pipeline stage, without the output projection."""
    return max(_elements_on_rank(network, layout, stage, outputs=False))


def stage_layers(network: Network, layout: ParallelConfig, stage: int) -> list[range]:
    """Returns the numbers of the transformer layers on a pipeline rank, one range per model chunk."""
    ends = list(accumulate(layers_per_stage(len(network.layers), layout.stages), initial=0))
    return [range(ends[part], ends[part + 1]) for part in range(stage, layout.stages, layout.pipeline)]


def residual_stream_bytes(
    network: Network, micro_batch: int, sequence_length: int, layout: ParallelConfig, dtype: DType
) -> int:
    """Returns the bytes of one micro-batch's residual stream on a rank; see `sublayer_activations`."""
    return micro_batch * sequence_length * network.hidden_size * DTYPE_BYTES[dtype] // _stream_ranks(layout)


def layer_activations(
    network: Network, number: int, micro_batch: int, sequence_length: int, layout: ParallelConfig, dtype: DType
) -> int:
    """Returns the bytes that a transformer layer keeps of one micro-batch; see `sublayer_activations`."""
    own = [network.sublayers[position] for position in network.layers[number]]
    size = micro_batch, sequence_length
    return sum(sublayer_activations(network, sublayer, *size, layout, dtype) for sublayer in own)


def largest_layer_activations(
    network: Network, micro_batch: int, sequence_length: int, layout: ParallelConfig, dtype: DType
) -> int:
    """Returns the largest `layer_activations` of any layer."""
    size = micro_batch, sequence_length
    return max(layer_activations(network, number, *size, layout, dtype) for number in range(len(network.layers)))


def sublayer_activations(
    network: Network, sublayer: Sublayer, micro_batch: int, sequence_length: int, layout: ParallelConfig, dtype: DType
) -> int:
    """Returns the bytes that a sublayer keeps of one micro-batch for its backward pass, on a rank.

    Per token: input and output of the norm in `dtype`, its statistics in float32, and `Sublayer.activation_bytes`. No
    dropout, so no masks.

    Args:
        network: the whole network.
        sublayer: one of the network's.
        micro_batch: sequences.
        sequence_length: tokens of each.
        layout: tensor parallelism splits all but norms and residual stream; sequence parallelism splits these too.
        dtype: of computation.
    """
    tokens, size = micro_batch * sequence_length, DTYPE_BYTES[dtype]
    statistics = FLOAT32_BYTES * len(network.norm.tensors)
    norm = tokens * (2 * network.hidden_size * size + statistics) // _stream_ranks(layout)
    return norm + sublayer.activation_bytes(network, micro_batch, sequence_length, layout.tensor, size)


def _elements_on_rank(network: Network, layout: ParallelConfig, stage: int, outputs: bool = True) -> Iterator[int]:
    """Yields the number of elements of each parameter on a rank of a stage."""
    layers = {number for chunk in stage_layers(network, layout, stage) for number in chunk}
    for param in parameters(network):
        if param.layer not in layers if param.layer is not None else not _is_on_stage(param, network, layout, stage):
            continue
        if outputs or param.layer is not None or not param.matmul:
            yield math.prod(param.shape) // (layout.tensor if param.split else 1)


def _is_on_stage(param: Param, network: Network, layout: ParallelConfig, stage: int) -> bool:
    """Returns whether a stage has a parameter outside of the layers. A tied embedding is on the first and the last."""
    is_last = stage == layout.pipeline - 1
    return (stage == 0 or (is_last and network.tie_embeddings)) if param.is_embedding else is_last


def _stream_ranks(layout: ParallelConfig) -> int:
    """Returns the number of ranks that share the residual stream."""
    return layout.tensor if layout.sequence else 1
