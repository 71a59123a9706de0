"""The network that Megatron-LM's args describe, wherever a checkpoint has them, and what none can be."""

import argparse
import shutil

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject

from minitron_megatron.checkpoint.dist_reader import TRACKER, Checkpoint
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.errors import UnsupportedModelError
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.layers.mlp import Activation
from minitron_megatron.model.megatron_args import network_of_args
from minitron_megatron.model.network import Llama3RopeScaling
from minitron_megatron.model.norms import NormKind
from minitron_megatron.parallel.context import parallel_context
from tests.tiny import LLAMA
from tests.unit.checkpoint.megatron_lm import ARGS, copy_of
from tests.unit.checkpoint.plain import plain_model


def test_the_network_is_read_from_the_args(trained):
    checkpoint = Checkpoint(trained[0])
    assert checkpoint.iteration == 100
    # Nobody has told how many tokens the tokenizer has.
    assert checkpoint.network == network_from_config(LLAMA).replace(vocab_size=128)
    assert any(key.startswith("optimizer.") for key in checkpoint.tensors)


def test_its_args_may_lie_among_the_tensors(trained, tmp_path):
    """As newer releases of Megatron-Core write them, without a `common.pt`."""
    root = tmp_path / "run"
    (root / "iter_0000100").mkdir(parents=True)
    (root / TRACKER).write_text("100")
    with parallel_context(ParallelConfig()):
        common = {"args": argparse.Namespace(**ARGS), "iteration": 100}
        state = {"model": plain_model(1, torch.float32).sharded_state_dict(), **common}
        if not hasattr(dist_checkpointing.serialization, "_legacy_common_state_exists"):  # an older release
            state["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=0)
        dist_checkpointing.save(state, str(root / "iter_0000100"))
    (root / "iter_0000100/common.pt").unlink(missing_ok=True)
    assert Checkpoint(root).network == Checkpoint(trained[0]).network
    assert vars(Checkpoint(root).megatron_args()) == ARGS


def test_args_that_tell_the_tokens_go_before_a_tokenizer(trained, tokenizer, tmp_path):
    """A tokenizer may have fewer than its model has rows for."""
    root = copy_of(trained[0], tmp_path / "run")
    path = root / "iter_0000100/common.pt"
    common = torch.load(path, weights_only=False)
    common["args"].vocab_size = 120
    torch.save(common, path)
    (root / "huggingface").mkdir()
    shutil.copy(tokenizer / "tokenizer.json", root / "huggingface")
    assert Checkpoint(root).network.vocab_size == 120
    shutil.copy(tokenizer / "config.json", root / "huggingface")
    assert Checkpoint(root).network.vocab_size == 101


UNSUPPORTED = {
    "num_experts": (8, "num_experts = 8 is not supported (mixtures of experts ('E'))"),
    "multi_latent_attention": (True, "multi_latent_attention = True is not supported (multi-latent attention)"),
    "position_embedding_type": ("learned_absolute", "position_embedding_type = 'learned_absolute' is not supported"),
    "normalization": ("L2Norm", "normalization = 'L2Norm' is not supported"),
    "window_size": ((127, 0), "window_size = (127, 0) is not supported (sliding windows)"),
    "rotary_interleaved": (True, "rotary_interleaved = True is not supported"),
    "hybrid_override_pattern": ("M-*E", "(layers of mixtures of experts ('E'), Mamba ('M'))"),
    "spec": (["my.module", "layer"], "spec = ['my.module', 'layer'] is not supported"),
    "padded_vocab_size": (None, "padded_vocab_size is missing"),
    "num_query_groups": (4, "attention.num_heads = 6 is not a multiple of attention.num_query_groups = 4"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_what_a_network_cannot_be_is_named(name, trained, tmp_path):
    value, message = UNSUPPORTED[name]
    root = copy_of(trained[0], tmp_path / "run")
    path = root / "iter_0000100/common.pt"
    common = torch.load(path, weights_only=False)
    setattr(common["args"], name, value)
    torch.save(common, path)
    with pytest.raises(UnsupportedModelError) as caught:
        Checkpoint(root)
    assert message in str(caught.value) and "iter_0000100" in str(caught.value) and "network.json" in str(caught.value)


def test_args_of_other_networks():
    def network(**changes):
        return network_of_args(argparse.Namespace(**ARGS | changes))

    def layer(**changes):
        return network(**changes).sublayers[:2]

    nemotron = network(swiglu=False, squared_relu=True, normalization="LayerNorm", apply_layernorm_1p=True)
    mlp = nemotron.sublayers[1]
    assert (mlp.gated, mlp.activation) == (False, Activation.SQUARED_RELU)
    assert (nemotron.norm, nemotron.norm_zero_centered) == (NormKind.LAYERNORM, True)
    assert network(layernorm_epsilon=1e-6).norm_eps == 1e-6  # the name that newer releases have
    scaled = network(use_rope_scaling=True, rope_scaling_factor=32.0).rotary_scaling
    assert scaled == Llama3RopeScaling(32.0, 1.0, 4.0, 8192)
    attention, _ = layer(group_query_attention=False, num_query_groups=1)
    assert attention.num_query_groups == 6
    _, mlp = layer(kv_channels=None, ffn_hidden_size=None)
    assert mlp.ffn_hidden_size == 128  # of 48 channels, as Megatron-LM chooses it
    null = network(vocab_size=99, tokenizer_type="NullTokenizer")
    assert (network(vocab_size=99).vocab_size, null.vocab_size) == (99, 100)
    assert layer(add_qkv_bias=True)[0].qkv_bias
    assert [sublayer.bias for sublayer in layer(add_bias_linear=True)] == [True, True]
    hybrid = network(num_layers=None, hybrid_layer_pattern="*-*-|*--")
    assert hybrid.pattern == "*-*-*--"
