"""Exact parameter and FLOP counts, read off the axis table."""

import math

from minitron_megatron.model.axes import axis_sizes, parameters
from minitron_megatron.model.shape import ATTENTION, ModelShape


def num_parameters(shape: ModelShape, embeddings: bool = True) -> int:
    """Parameters of the network. Rows that only pad the vocabulary do not count.

    Args:
        shape: the network.
        embeddings: whether the embedding table and an untied output projection count.
    """
    sizes = axis_sizes(shape) | {"vocab": shape.vocab}
    return sum(
        math.prod(param.size(sizes)) * (len(shape.sublayers(param.sublayer)) if param.sublayer else 1)
        for param in parameters(shape)
        if embeddings or param.split != "vocab"
    )


def forward_flops_per_token(shape: ModelShape, sequence_length: int) -> float:
    """Floating-point operations of one forward pass, per token, at a given sequence length.

    Matrix products count two operations per multiply-add. Causal attention counts the half of the
    score matrix that is used: a token attends to `(sequence_length + 1) / 2` positions on average.
    Norms, activations and the softmaxes are left out, as is usual in the field. A backward pass costs
    twice a forward pass.
    """
    sizes = axis_sizes(shape)
    per_layer = sum(
        2 * math.prod(param.size(sizes)) * len(shape.sublayers(param.sublayer))
        for param in parameters(shape)
        if param.matmul and param.sublayer
    )
    scores_and_values = 2 * 2 * shape.num_heads * shape.head_dim * (sequence_length + 1) / 2
    attention = scores_and_values * len(shape.sublayers(ATTENTION))
    return per_layer + attention + 2 * shape.padded_vocab * shape.hidden
