"""Counts against the papers' tables, transformers and torch's own counter of operations."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from minitron_megatron.model.count import forward_flops_per_token, num_parameters
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP, Activation
from minitron_megatron.model.network import Network, pad_vocab, transformer
from minitron_megatron.model.norms import NormKind
from tests.tiny import hf_model
from tests.unit.model.configs import CONFIGS


def published(layers, hidden, heads, ffn, vocab, norm=NormKind.RMSNORM, **switches):
    layer = [Attention(heads, num_query_groups=8, head_dim=128), MLP(ffn, **switches)]
    return Network(transformer(layers, layer), hidden, vocab, pad_vocab(vocab), norm=norm)


NEMOTRON_SWITCHES = dict(norm=NormKind.LAYERNORM, activation=Activation.SQUARED_RELU, gated=False)


@pytest.mark.parametrize(
    "network, expected",
    [
        (published(32, 4096, 32, 14336, 128256), 8_030_261_248),
        (published(32, 3072, 32, 9216, 128256), 4_512_746_496),
        (published(16, 4096, 32, 14336, 128256), 4_540_469_248),
    ],
    ids=["Llama-3.1 8B", "Llama-3.1-Minitron 4B Width", "Llama-3.1-Minitron 4B Depth"],
)
def test_parameters_of_the_llama_models_to_the_unit(network, expected):
    assert num_parameters(network) == expected


@pytest.mark.parametrize(
    "network, total, body",
    [
        (published(32, 6144, 48, 24576, 256000, **NEMOTRON_SWITCHES), "15.6", "12.5"),
        (published(32, 4096, 48, 16384, 256000, **NEMOTRON_SWITCHES), "8.27", "6.2"),
        (published(32, 3072, 24, 9216, 256000, **NEMOTRON_SWITCHES), "4.19", "2.6"),
        (published(40, 4096, 32, 11520, 131072), "8.41", "7.34"),
    ],
    ids=["Nemotron-4 15B", "Minitron 8B", "Minitron 4B", "Mistral-NeMo-Minitron 8B"],
)
def test_parameters_of_the_other_models_to_the_precision_of_the_papers(network, total, body):
    for printed, count in ((total, num_parameters(network)), (body, num_parameters(network, embeddings=False))):
        assert f"{count / 1e9:.{len(printed.partition('.')[2])}f}" == printed


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "mistral", "nemotron"])
def test_parameters_are_those_that_transformers_counts(family, tied):
    config = {**CONFIGS[family], "tie_word_embeddings": tied}
    model = hf_model(**config)
    network = network_from_config(config)
    assert network.padded_vocab_size > network.vocab_size  # so that counting the padding would show
    assert num_parameters(network) == model.num_parameters()
    ends = {id(e.weight): e.weight.numel() for e in (model.get_input_embeddings(), model.get_output_embeddings())}
    assert num_parameters(network, embeddings=False) == model.num_parameters() - sum(ends.values())


@pytest.mark.parametrize("family", ["llama", "tied", "nemotron"])
def test_forward_flops_are_those_that_torch_counts(family):
    """Two differences are on purpose: the padding rows of the vocabulary are multiplied here, and of the score
    matrix the causal half alone is counted, (S + 1) / 2 positions per token where eager attention takes S."""
    config = CONFIGS[family]
    model = hf_model(**config, attn_implementation="eager")
    network, (batch, sequence) = network_from_config(config), (2, 24)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(batch, sequence, dtype=torch.long))
    counted = counter.get_total_flops() / (batch * sequence)

    attention = network.sublayers[0]
    heads_and_layers = attention.num_heads * attention.head_dim * len(network.layers)
    unused_half = 4 * heads_and_layers * (sequence - (sequence + 1) / 2)
    padding = 2 * (network.padded_vocab_size - network.vocab_size) * network.hidden_size
    assert forward_flops_per_token(network, sequence) == counted - unused_half + padding
