"""Exact parameter and FLOP counts, computed from the axis table."""

import math

from minitron_megatron.model.axes import VOCAB
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import parameters


def num_parameters(network: Network, embeddings: bool = True) -> int:
    """Counts the parameters of a network, without the rows that pad the vocabulary.

    Args:
        network: the network.
        embeddings: count the embedding table and an untied output projection too.
    """
    return sum(
        math.prod(dim.size({**param.sizes, VOCAB.name: network.vocab_size}) for dim in param.dims)
        for param in parameters(network)
        if embeddings or param.split != VOCAB.name
    )


def forward_flops_per_token(network: Network, sequence_length: int) -> float:
    """Counts the floating-point operations of a forward pass, per token, at a given sequence length.

    Matrix products count two operations per multiply-add; `Sublayer.flops_per_token` adds a kind's other operations.
    Norms, activations and softmaxes are left out, as is usual. A backward pass costs twice a forward pass.
    """
    matrices = sum(
        2 * math.prod(param.shape) for param in parameters(network) if param.matmul and param.position is not None
    )
    others = sum(sublayer.flops_per_token(sequence_length) for sublayer in network.sublayers)
    return matrices + others + 2 * network.padded_vocab_size * network.hidden_size


def cache_bytes_per_token(network: Network, number_bytes: int) -> int:
    """Returns the bytes that generation caches per token, over all layers."""
    return sum(sublayer.cache_bytes_per_token(number_bytes) for sublayer in network.sublayers)
