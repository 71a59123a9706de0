"""Exact parameter and FLOP counts, read off the axis table."""

import math

from minitron_megatron.model.axes import VOCAB
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import parameters


def num_parameters(network: Network, embeddings: bool = True) -> int:
    """Parameters of the network. Rows that only pad the vocabulary do not count.

    Args:
        network: to count.
        embeddings: whether the embedding table and an untied output projection count.
    """
    return sum(
        math.prod(dim.size({**param.sizes, VOCAB.name: network.vocab_size}) for dim in param.dims)
        for param in parameters(network)
        if embeddings or param.split != VOCAB.name
    )


def forward_flops_per_token(network: Network, sequence_length: int) -> float:
    """Floating-point operations of one forward pass, per token, at a given sequence length.

    Matrix products count two operations per multiply-add; what a kind of layer has beside them, it says itself. Norms,
    activations and the softmaxes are left out, as is usual in the field. A backward pass costs twice a forward pass.
    """
    matrices = sum(
        2 * math.prod(param.shape) for param in parameters(network) if param.matmul and param.position is not None
    )
    others = sum(sublayer.flops_per_token(sequence_length) for sublayer in network.sublayers)
    return matrices + others + 2 * network.padded_vocab_size * network.hidden_size


def cache_bytes_per_token(network: Network, number_bytes: int) -> int:
    """Bytes that generation keeps of every token of a sequence, over all layers."""
    return sum(sublayer.cache_bytes_per_token(number_bytes) for sublayer in network.sublayers)
