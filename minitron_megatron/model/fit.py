"""What a rank holds of a network: parameters, and the bytes that its layers keep for their backward pass.

From shapes alone and without torch. Counted is what Megatron-Core keeps on CUDA with Transformer Engine: flash
attention, so that no score matrix is kept, and of the matrices' inputs one copy each, as in Korthikanti et al.
(2205.05198, section 4).
"""

import math
from collections.abc import Iterator
from itertools import accumulate

from minitron_megatron.config.schema import DType
from minitron_megatron.model.axes import Param, axis_sizes, parameters
from minitron_megatron.model.shape import ATTENTION, ModelShape, NormKind
from minitron_megatron.parallel.layout import Layout, layers_per_stage

DTYPE_BYTES = {DType.BF16: 2, DType.FP16: 2, DType.FP32: 4}
FLOAT32_BYTES = 4


def rank_parameters(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Parameters on a rank of one pipeline stage, with the rows that pad the vocabulary."""
    return sum(numel for numel, _ in _held(shape, layout, stage))


def largest_weight(shape: ModelShape, layout: Layout, stage: int) -> int:
    """Parameters of the largest weight on a rank of one pipeline stage, the output projection's left out."""
    return max(numel for _, numel in _held(shape, layout, stage, outputs=False))


def stage_layers(shape: ModelShape, layout: Layout, stage: int) -> list[list[str]]:
    """The layers on a pipeline rank, model chunk by model chunk, each layer by its sublayers."""
    layers = shape.megatron_layers
    ends = list(accumulate(layers_per_stage(len(layers), layout.stages), initial=0))
    return [layers[ends[part] : ends[part + 1]] for part in range(stage, layout.stages, layout.pipeline)]


def residual_stream_bytes(
    shape: ModelShape, micro_batch: int, sequence_length: int, layout: Layout, dtype: DType
) -> int:
    """Bytes of the residual stream of one micro-batch on a rank; see `sublayer_activations`."""
    return micro_batch * sequence_length * shape.hidden * DTYPE_BYTES[dtype] // _stream_ranks(layout)


def layer_activations(
    shape: ModelShape, layer: str, micro_batch: int, sequence_length: int, layout: Layout, dtype: DType
) -> int:
    """Bytes that a layer keeps of one micro-batch, all of its sublayers together; see `sublayer_activations`."""
    return sum(sublayer_activations(shape, symbol, micro_batch, sequence_length, layout, dtype) for symbol in layer)


def largest_layer_activations(
    shape: ModelShape, micro_batch: int, sequence_length: int, layout: Layout, dtype: DType
) -> int:
    """Bytes that the layer which keeps the most keeps of one micro-batch; see `sublayer_activations`."""
    layers = set(shape.megatron_layers)
    return max(layer_activations(shape, layer, micro_batch, sequence_length, layout, dtype) for layer in layers)


def sublayer_activations(
    shape: ModelShape, symbol: str, micro_batch: int, sequence_length: int, layout: Layout, dtype: DType
) -> int:
    """Bytes that a sublayer keeps of one micro-batch for its backward pass, on a rank.

    Per token in the number format: input and output of the norm; queries, keys, values and the context, or the MLP's
    input of the activation and of the last matrix, and with a gate both factors. Beside it, in float32: the norms'
    statistics and the attention's log-sums. Norms of queries and keys keep the projection as well, and
    the queries by themselves. No dropout, so no masks.

    Args:
        shape: of the whole network.
        symbol: `*` for an attention sublayer, `-` for an MLP.
        micro_batch: sequences.
        sequence_length: tokens of each.
        layout: tensor parallelism splits all but norms and residual stream; with sequence parallelism these too.
        dtype: of computation.
    """
    tokens, size = micro_batch * sequence_length, DTYPE_BYTES[dtype]
    statistics = FLOAT32_BYTES * (2 if shape.norm is NormKind.LAYERNORM else 1)
    norm = tokens * (2 * shape.hidden * size + statistics) // _stream_ranks(layout)
    if symbol == ATTENTION:
        heads, groups = shape.num_heads // layout.tensor, max(1, shape.num_query_groups // layout.tensor)
        kept = tokens * ((2 * heads + 2 * groups) * shape.head_dim * size + heads * FLOAT32_BYTES)
        if layout.tensor > shape.num_query_groups:  # Megatron-Core gathers what all ranks project, and cuts views of it
            kept += tokens * (shape.num_heads + 2 * shape.num_query_groups) * shape.head_dim * size
        if shape.qk_norm:  # of queries where Megatron-Core reshapes them, which copies what a group has several of
            copied = heads if shape.heads_per_group > 1 else 0
            kept += tokens * ((heads + 2 * groups + copied) * shape.head_dim * size + (heads + groups) * statistics)
        # Cosines and sines, which Megatron-Core makes anew for queries and for keys; all sequences share them.
        rotary = 4 * sequence_length * int(shape.rotary_fraction * shape.head_dim) * size
        return norm + kept + rotary
    # fc1's output, both halves; the activated gate; the product, which is fc2's input. Nothing here is fused.
    return norm + tokens * (4 if shape.gated else 2) * shape.ffn // layout.tensor * size


def _held(shape: ModelShape, layout: Layout, stage: int, outputs: bool = True) -> Iterator[tuple[int, int]]:
    """Of each row of the axis table that a rank of a stage holds some of: its parameters there, and those of one
    layer."""
    sizes = axis_sizes(shape)
    pattern = "".join("".join(chunk) for chunk in stage_layers(shape, layout, stage))
    for param in parameters(shape):
        count = pattern.count(param.sublayer) if param.sublayer else int(_is_on(param, shape, layout, stage))
        if not count or (not outputs and param.sublayer is None and param.matmul):
            continue
        numel = math.prod(param.size(sizes)) // (layout.tensor if param.split else 1)
        yield numel * count, numel


def _is_on(param: Param, shape: ModelShape, layout: Layout, stage: int) -> bool:
    """Whether a stage has a parameter that is of no layer. A tied table is on both ends."""
    is_last = stage == layout.pipeline - 1
    return (stage == 0 or (is_last and shape.tied)) if param.is_embedding else is_last


def _stream_ranks(layout: Layout) -> int:
    """Ranks that share the residual stream."""
    return layout.tensor if layout.sequence else 1
