"""The axis table of a network: all of its parameters, the meaning of their dimensions, and their checkpoint keys."""

from collections.abc import Iterable
from functools import lru_cache

from minitron_megatron.model.axes import HIDDEN, VOCAB, Param, Part, Row
from minitron_megatron.model.layers import Sublayer
from minitron_megatron.model.network import Network
from minitron_megatron.model.norms import norm_rows

PROJECTIONS = "distillation_projections"
"""Prefix of parameters that distillation trains beside the student; they belong to no network."""

_EMBEDDING = Row("embedding.word_embeddings.weight", (VOCAB, HIDDEN), VOCAB.name, (Part("model.embed_tokens.weight"),))
_OUTPUT = Row("output_layer.weight", (VOCAB, HIDDEN), VOCAB.name, (Part("lm_head.weight"),), matmul=True)


@lru_cache(maxsize=64)
def parameters(network: Network) -> tuple[Param, ...]:
    """Returns all parameters of a network, in the order of the forward pass."""
    own, outside = [], network.axis_sizes()
    rows_of: dict[Sublayer, list[Row]] = {sublayer: sublayer.rows(network) for sublayer, _ in network.alike()}
    for position, sublayer in enumerate(network.sublayers):
        sizes = network.axis_sizes(position)
        own += [_param(row, sizes, position, network.layer_of(position)) for row in rows_of[sublayer]]
    norm = norm_rows(network.norm, HIDDEN, "decoder.final_layernorm.", "model.norm.")
    last = [*norm, *([] if network.tie_embeddings else [_OUTPUT])]
    return (_param(_EMBEDDING, outside), *own, *(_param(row, outside) for row in last))


@lru_cache(maxsize=64)
def cache_scales(network: Network) -> tuple[Param, ...]:
    """Returns the scales of all that generation caches, which a checkpoint may have beside its weights."""
    return tuple(
        _param(cached.scale, network.axis_sizes(position), position, network.layer_of(position))
        for position, sublayer in enumerate(network.sublayers)
        for cached in sublayer.cached
    )


def _param(row: Row, sizes: dict[str, int], position: int | None = None, layer: int | None = None) -> Param:
    return Param(**vars(row), position=position, layer=layer, sizes=sizes)


def by_key(params: Iterable[Param]) -> dict[str, Param]:
    """Returns parameters by `layer_key`."""
    return {layer_key(param): param for param in params}


def layer_key(param: Param) -> str:
    """Returns the checkpoint key where each transformer layer is stored by itself."""
    return param.name if param.layer is None else f"decoder.layers.{param.layer}.{param.name}"


def stacked_key(param: Param) -> str:
    """Returns the checkpoint key where all layers, which must be equal, are stacked in a leading dimension."""
    return param.name if param.layer is None else f"decoder.layers.{param.name}"
