"""Megatron-LM's args follow the network of a pruned network, and only plain values are loaded."""

import argparse
import copy
import logging
import os
import signal
from dataclasses import replace
from enum import Enum

import pytest
import torch
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import RerunMode
from megatron.core.transformer.enums import AttnBackend

from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.saved_args import read_args
from minitron_megatron.config.schema import PruneConfig, TargetConfig
from minitron_megatron.errors import UnsupportedModelError
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.layers.mlp import Activation
from minitron_megatron.model.megatron_args import args_of_network, network_of_args
from minitron_megatron.pruning.prune import prune
from tests.tiny import LLAMA, changed, hf_model, import_hf, random_scores, without_sublayers
from tests.unit.model.configs import CONFIGS

ARGS = argparse.Namespace(
    num_layers=4,
    encoder_num_layers=4,
    hidden_size=48,
    ffn_hidden_size=44,
    num_attention_heads=6,
    group_query_attention=True,
    num_query_groups=2,
    kv_channels=12,
    padded_vocab_size=128,
    max_position_embeddings=64,
    seq_length=32,
    swiglu=True,
    rotary_base=500,
    model_type=ModelType.encoder_or_decoder,
    attention_backend=AttnBackend.auto,
    rerun_mode=RerunMode.VALIDATE_RESULTS,
    exit_signal=signal.SIGTERM,
    params_dtype=torch.bfloat16,
    data_path=["a", "b"],
    iteration=1000,
    consumed_train_samples=64000,
    consumed_valid_samples=640,
    skipped_train_samples=3,
    no_save_optim=None,
    decoder_first_pipeline_num_layers=1,
    virtual_pipeline_model_parallel_size=2,
    pipeline_model_parallel_layout=None,
)


# In `load_args_from_checkpoint` and `check_checkpoint_args` of megatron/training/checkpointing.py.
READ_BY_MEGATRON_LM = """
    num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups group_query_attention
    kv_channels max_position_embeddings position_embedding_type add_position_embedding
    use_rotary_position_embeddings rotary_base rotary_percent rotary_interleaved add_bias_linear add_qkv_bias
    squared_relu swiglu untie_embeddings_and_output_weights apply_layernorm_1p normalization
    apply_query_key_layer_scaling attention_dropout hidden_dropout mtp_hybrid_override_pattern mtp_num_layers
    mtp_use_repeated_layer spec num_experts moe_layer_freq moe_ffn_hidden_size moe_router_topk
    moe_token_dispatcher_type moe_router_pre_softmax moe_grouped_gemm moe_single_grouped_weight
    moe_single_grouped_bias moe_shared_expert_intermediate_size moe_router_score_function
    moe_router_enable_expert_bias moe_router_topk_scaling_factor mamba_state_dim mamba_head_dim mamba_num_groups
    mamba_num_heads gdp_num_householder hybrid_layer_pattern heterogeneous_layers_config_path
    heterogeneous_layers_config_encoded_json moe_latent_size tokenizer_model tokenizer_type tiktoken_pattern
    padded_vocab_size ckpt_format tensor_model_parallel_size pipeline_model_parallel_size
    virtual_pipeline_model_parallel_size num_layers_per_virtual_pipeline_stage expert_model_parallel_size
    make_vocab_size_divisible_by
"""


class Unknown:
    pass


told = []


class Tells:
    """Tells when it is loaded."""

    def __init__(self, what):
        self.what = what

    def __setstate__(self, state):
        told.append(state)


class Later(Enum):
    ALL = "all"


class Evil:
    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def save(path, **common):
    """As Megatron-Core's `save_common` does."""
    torch.save({"iteration": 1000, "checkpoint_version": 3.0, **common}, path)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A checkpoint and scores of it."""
    folder = tmp_path_factory.mktemp("llama")
    checkpoint = Checkpoint(import_hf(folder, hf_model(**LLAMA)))
    random_scores(folder / "scores", checkpoint.network)
    return folder


def pruned(folder, output):
    target = TargetConfig(layers=3, hidden=40, ffn=30, heads=4)
    prune(PruneConfig(str(folder / "checkpoint"), str(output), str(folder / "scores"), target=target))
    return torch.load(output / "release/common.pt", weights_only=False)


def test_args_follow_the_network(llama, tmp_path):
    save(llama / "checkpoint/release/common.pt", args=copy.deepcopy(ARGS), optimizer={"step": 1000})
    common = pruned(llama, tmp_path / "pruned")
    assert common.keys() == {"iteration", "checkpoint_version", "args"} and common["iteration"] == 0
    before, after = vars(ARGS), vars(common["args"])
    changes = {name: after[name] for name in before if after[name] != before[name]}
    assert changes == {
        "num_layers": 3,
        "encoder_num_layers": 3,
        "hidden_size": 40,
        "ffn_hidden_size": 30,
        "num_attention_heads": 4,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "no_save_optim": True,
        "decoder_first_pipeline_num_layers": None,
        "virtual_pipeline_model_parallel_size": None,
    }
    assert after["no_save_rng"] is True


def test_what_the_args_did_not_say_is_added():
    """They become those of the network, as if Megatron-LM had been told all of it."""
    network = network_from_config(LLAMA)
    assert network_of_args(args_of_network(ARGS, network)) == network_of_args(args_of_network(None, network)) == network


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_args_tell_all_of_a_network(config):
    network = network_from_config(config)
    assert network_of_args(args_of_network(None, network)) == network
    biased = changed(network, bias=True, qkv_bias=False, gated=False, activation=Activation.GELU)
    assert network_of_args(args_of_network(None, biased)) == biased


@pytest.mark.parametrize(
    "config, changes",
    [
        ("llama", dict(activation=Activation.GELU)),  # gated, and Megatron-LM's gate is SiLU's
        ("nemotron", dict(activation=Activation.SILU)),
        ("nemotron", dict(gated=True)),
    ],
)
def test_a_network_that_no_args_describe_has_none(config, changes, caplog):
    """Megatron-LM would build another one from them, and load the weights."""
    network = changed(network_from_config(CONFIGS[config]), **changes)
    assert args_of_network(ARGS, network) is None
    assert "none describe this MLP" in caplog.text


def test_sublayers_of_unlike_biases_have_no_args(caplog):
    network = network_from_config(LLAMA)
    sublayers = tuple(s if type(s).symbol == "*" else replace(s, bias=True) for s in network.sublayers)
    assert args_of_network(None, replace(network, sublayers=sublayers)) is None


def test_a_scaling_that_a_hybrid_model_would_not_apply_is_refused():
    args = argparse.Namespace(**vars(ARGS), hybrid_layer_pattern="*-*-", use_rope_scaling=True)
    with pytest.raises(UnsupportedModelError, match="use_rope_scaling = True is not supported with a pattern"):
        network_of_args(args)


def test_a_tokenizer_of_a_number_of_tokens_alone_adds_one():
    network = network_from_config(LLAMA)
    args = argparse.Namespace(**vars(ARGS), tokenizer_type="NullTokenizer", vocab_size=99)
    assert args_of_network(args, network).vocab_size == 100
    assert network_of_args(args_of_network(args, network)).vocab_size == 101


def test_args_hold_all_that_use_checkpoint_args_reads():
    """Of what `load_args_from_checkpoint` sets whatever the command line says, nothing is left to chance."""
    args = args_of_network(None, network_from_config(LLAMA))
    missing = [name for name in READ_BY_MEGATRON_LM.split() if not hasattr(args, name)]
    assert not missing


def test_args_of_sublayers_in_another_order_name_it(llama):
    whole = Checkpoint(llama / "checkpoint").network
    network = without_sublayers(whole, 4, 6, 7)
    args = args_of_network(ARGS, network)
    assert (args.num_layers, args.hybrid_layer_pattern) == (3, "*-*--") and "hybrid_layer_pattern" not in ARGS
    # A Megatron-LM that has the former name alone reads that, and neither name may keep what was.
    former = dict(hybrid_override_pattern="*-*-*-*-")
    for before in (former, {**former, "hybrid_layer_pattern": "*-*-*-*-"}):
        args = args_of_network(argparse.Namespace(**vars(ARGS), **before), network)
        assert {getattr(args, name, "*-*--") for name in before} == {"*-*--"}
        args = args_of_network(argparse.Namespace(**vars(ARGS), **before), without_sublayers(whole, 4, 5, 6, 7))
        assert network_of_args(args).pattern == "*-*-"


@pytest.mark.parametrize("place", ["in the args", "beside them"])
def test_what_may_run_is_named_and_not_run(place, llama, tmp_path, caplog):
    marker = tmp_path / "was-run"
    evil = Evil(f"touch {marker}")
    args = argparse.Namespace(**vars(ARGS), tokenizer=evil) if place == "in the args" else ARGS
    path = llama / "checkpoint/release/common.pt"
    save(path, args=args, **({"other": evil} if place == "beside them" else {}))
    with caplog.at_level(logging.WARNING):
        common = pruned(llama, tmp_path / "pruned")
    assert common["args"] == args_of_network(None, Checkpoint(tmp_path / "pruned").network)
    [message] = {record.getMessage() for record in caplog.records if "common.pt" in record.getMessage()}
    assert message.startswith(f"{path} holds ") and "system" in message and "Megatron's args are left out" in message
    assert not marker.exists()


@pytest.mark.parametrize(
    "value",
    [Unknown(), Tells("it"), Later.ALL, [Later.ALL], {"a": (1, Unknown())}],
    ids=["object", "object that is told its state", "choice", "list of choices", "deep inside"],
)
def test_an_arg_that_is_no_plain_value_is_left_out(value, tmp_path, caplog, monkeypatch):
    """As a choice of a newer Megatron-Core is, which Megatron-LM may have among all its args."""
    save(tmp_path / "common.pt", args=argparse.Namespace(**vars(ARGS), other=value), beside=Unknown())
    monkeypatch.setattr(f"{__name__}.told", told := [])
    with caplog.at_level(logging.WARNING):
        assert read_args(tmp_path, {}) == ARGS
    [message] = [record.getMessage() for record in caplog.records]
    assert "of Megatron's args, other is left out: it holds " in message and __name__ in message
    assert not told


def test_a_checkpoint_without_args_has_none(tmp_path, caplog):
    save(tmp_path / "common.pt")
    assert read_args(tmp_path, {}) is None
    assert read_args(tmp_path / "missing", {}) is None
    assert not caplog.records
