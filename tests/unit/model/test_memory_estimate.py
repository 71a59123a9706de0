"""Parameters and activations of a rank against counts of whole networks, and against published formulas."""

import subprocess
import sys

import pytest

from minitron_megatron.config.parallel import ParallelConfig
from minitron_megatron.config.schema import DType
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP, Activation
from minitron_megatron.model.memory_estimate import rank_parameters, sublayer_activations
from minitron_megatron.model.network import Network, transformer
from minitron_megatron.model.norms import NormKind
from tests.tiny import changed

SMALL = Network(
    transformer(5, [Attention(num_heads=8, num_query_groups=4, head_dim=24), MLP(ffn_hidden_size=448)]),
    hidden_size=256,
    vocab_size=1000,
    padded_vocab_size=1024,
)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("norm", NormKind)
@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(),
        ParallelConfig(tensor=2),
        ParallelConfig(tensor=8),
        ParallelConfig(pipeline=3),
        ParallelConfig(tensor=4, pipeline=2, virtual_pipeline=2),
    ],
    ids=str,
)
def test_the_ranks_hold_all_weights_once_but_for_those_that_each_must_have(layout, norm, tied):
    network = changed(SMALL, tie_embeddings=tied, norm=norm, bias=True)
    held = layout.tensor * sum(rank_parameters(network, layout, stage) for stage in range(layout.pipeline))
    tensors = 2 if norm is NormKind.LAYERNORM else 1
    norms = (2 * len(network.layers) + 1) * tensors * network.hidden_size
    biases = (
        2 * len(network.layers) * network.hidden_size
    )  # of the two matrices whose outputs are summed over the ranks
    padding = (1 if tied else 2) * 24 * network.hidden_size
    expected = num_parameters(network) + padding + (layout.tensor - 1) * (norms + biases)
    if tied and layout.pipeline > 1:
        expected += 1024 * network.hidden_size
    assert held == expected


@pytest.mark.parametrize("layout", [ParallelConfig(), ParallelConfig(tensor=4, sequence=True)], ids=str)
def test_a_gpt_layer_keeps_what_korthikanti_et_al_count(layout):
    """2205.05198, table 2, tensor and sequence parallelism with selective recomputation: sbh * 34 / t."""
    s, b, h, a, t = 2048, 4, 6144, 64, layout.tensor
    gpt = changed(
        SMALL, hidden_size=h, ffn_hidden_size=4 * h, num_heads=a, num_query_groups=a, head_dim=h // a, gated=False,
        norm=NormKind.LAYERNORM, activation=Activation.GELU,
    )  # fmt: skip
    found = sum(sublayer_activations(gpt, sublayer, b, s, layout, DType.BF16) for sublayer in gpt.sublayers[:2])
    masks = 2 * s * b * h  # a byte each for the dropouts behind attention and MLP; no model here has dropout
    log_sums = 4 * s * b * a  # what flash attention keeps beside its output, which the paper counts already
    statistics = 2 * 8 * s * b  # means and variances of the norms, which the paper neglects
    rotary = 4 * s * (h // a) * 2  # cosines and sines, on every rank; the paper's GPT has learned positions
    assert found == (34 * s * b * h - masks + log_sums + statistics) // t + rotary


def test_no_torch_is_needed():
    code = (
        "import sys, minitron_megatron.model.memory_estimate; sys.exit(bool({'torch', 'megatron'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
