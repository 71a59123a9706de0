"""Hugging Face names of a network's tensors, and how those in a folder match them: prefixes, and tied embeddings."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from minitron_megatron.checkpoint.stored_tensors import StoredTensor
from minitron_megatron.model.axes import Param, Part
from minitron_megatron.model.network import Network
from minitron_megatron.model.parameters import parameters

logger = logging.getLogger(__name__)

_ROWS = 4096  # compared at once

Tensors = Mapping[str, StoredTensor]


def hf_tensors(network: Network) -> Iterator[tuple[str, list[int], Param, Part]]:
    """Yields every tensor of the Hugging Face layout: name, size, and the parameter and part that it is."""
    for param in parameters(network):
        for part in param.parts:
            yield param.hf_name(part), param.hf_shape(part, network.vocab_size), param, part


def embedding_name(network: Network) -> str:
    """Returns the name of the embedding table."""
    return next(hf_tensors(network))[0]


def output_name(network: Network) -> str | None:
    """Returns the name of the output projection that a network has if it is not tied; None if there is none."""
    tied, untied = ([n for n, *_ in hf_tensors(network.replace(tie_embeddings=tie))] for tie in (True, False))
    return next((name for name in untied if name not in tied), None)


def with_family_prefix(network: Network, tensors: Tensors) -> tuple[Tensors, str | None]:
    """Renames tensors whose names begin in another way than the family's, such as `language_model.` or `module.`.

    Returns:
        the tensors, and a phrase that says both prefixes; None if nothing was renamed.
    """
    embedding, output = embedding_name(network), output_name(network)
    family, _, stem = embedding.partition(".")
    found = [name for name in tensors if name == stem or name.endswith(f".{stem}")]
    if not stem or embedding in tensors or len(found) != 1:
        return tensors, None
    prefix = found[0].removesuffix(stem)
    outer = prefix.removesuffix(f"{family}.")
    renamed = {}
    for name, tensor in tensors.items():
        if output and name in (output, outer + output, prefix + output):
            name = output
        elif name.startswith(prefix):
            name = f"{family}.{name.removeprefix(prefix)}"
        renamed[name] = tensor
    shown = repr(prefix) if prefix else "no prefix"
    return renamed, f"its keys begin with {shown}, where the family's begin with {family + '.'!r}"


def with_tie(path: Path, network: Network, tensors: Tensors) -> tuple[Network, Tensors]:
    """Returns a network as transformers ties it, and its tensors.

    Embeddings that should be tied are so only if no output projection is there, or one with equal values. If it alone
    is there, it is the embedding table as well.
    """
    embedding, output = embedding_name(network), output_name(network)
    if not network.tie_embeddings or output is None or output not in tensors:
        return network, tensors
    if embedding not in tensors:
        return network, {**tensors, embedding: tensors[output]}
    if equal(tensors[embedding], tensors[output]):
        return network, tensors
    logger.warning(
        "%s: config.json says tie_word_embeddings = true, and %s differs from %s: both are kept, as transformers keeps "
        "them, and the network is untied",
        path,
        output,
        embedding,
    )
    return network.replace(tie_embeddings=False), tensors


def equal(first: StoredTensor, second: StoredTensor) -> bool:
    """Returns whether two matrices have the same values, some rows at a time."""
    if first.size != second.size or len(first.size) != 2:
        return False
    if first.dtype is None or second.dtype is None:
        return first.kind == second.kind  # neither can be read
    dtype = torch.promote_types(first.dtype, second.dtype)
    columns = [np.arange(size) for size in first.size[1:]]
    for low in range(0, first.size[0], _ROWS):
        index = [np.arange(low, min(low + _ROWS, first.size[0])), *columns]
        if not torch.equal(first.read(index).to(dtype), second.read(index).to(dtype)):
            return False
    return True
