"""Checkpoints as a Megatron-LM run writes them are scored, pruned and exported, by the args that it saves beside them.

`megatron.training` is no part of Megatron-Core's wheel. What is written here follows its `generate_state_dict`: args,
model, optimiser, schedule and random states, through Megatron-Core's own `dist_checkpointing.save`.
"""

import argparse
import copy
import dataclasses
import json
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.activations import squared_relu
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.nn.functional import gelu, silu
from transformers import AutoModelForCausalLM

from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import TRACKER, Checkpoint
from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.schema import (
    DataConfig,
    DistillConfig,
    ExportConfig,
    ParallelConfig,
    PruneConfig,
    ScoreConfig,
    TargetConfig,
)
from minitron_megatron.errors import CheckpointError, UnsupportedModelError
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.layers.mlp import Activation
from minitron_megatron.model.megatron_args import network_of_args
from minitron_megatron.model.network import Llama3RopeScaling
from minitron_megatron.model.norms import NormKind
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.pruning.prune import prune
from minitron_megatron.pruning.score import score
from minitron_megatron.training.distill import distill
from tests.tiny import LLAMA, QWEN2, QWEN3, hf_model, import_hf, save_hf
from tests.unit.checkpoint.test_megatron import logits_of, plain_model

ARGS = dict(
    num_layers=4,
    encoder_num_layers=4,
    hidden_size=48,
    ffn_hidden_size=44,
    num_attention_heads=6,
    group_query_attention=True,
    num_query_groups=2,
    kv_channels=12,
    seq_length=32,
    max_position_embeddings=64,
    position_embedding_type="rope",
    add_position_embedding=True,
    use_rotary_position_embeddings=False,
    rotary_base=500,
    rotary_percent=1.0,
    rotary_interleaved=False,
    rotary_seq_len_interpolation_factor=None,
    use_rope_scaling=False,
    rope_scaling_factor=8.0,
    no_rope_freq=None,
    normalization="RMSNorm",
    norm_epsilon=1e-5,
    apply_layernorm_1p=False,
    swiglu=True,
    squared_relu=False,
    openai_gelu=False,
    quick_geglu=False,
    add_bias_linear=False,
    add_qkv_bias=False,
    qk_layernorm=False,
    untie_embeddings_and_output_weights=True,
    make_vocab_size_divisible_by=128,
    vocab_size=None,
    padded_vocab_size=128,
    tokenizer_type="HuggingFaceTokenizer",
    num_experts=None,
    moe_layer_freq=1,
    multi_latent_attention=False,
    mtp_num_layers=None,
    window_size=None,
    hybrid_override_pattern=None,
    heterogeneous_layers_config_path=None,
    spec=None,
    transformer_impl="transformer_engine",
    model_type=ModelType.encoder_or_decoder,
    attention_backend=AttnBackend.auto,
    exit_signal=signal.SIGTERM,
    params_dtype=torch.float32,
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    use_distributed_optimizer=True,
    ckpt_format="torch_dist",
    no_save_optim=None,
    no_save_rng=None,
    iteration=100,
    consumed_train_samples=800,
    consumed_valid_samples=0,
    skipped_train_samples=0,
)
TOKENS = torch.arange(60).view(2, 30)


def megatron_model(args: argparse.Namespace) -> GPTModel:
    """The model that Megatron-LM's `gpt_builder` builds of its args."""
    known = {field.name for field in dataclasses.fields(TransformerConfig)}
    on_cpu = dict(
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
    )
    values = {name: value for name, value in vars(args).items() if name in known and value is not None} | on_cpu
    values["activation_func"] = squared_relu if args.squared_relu else silu if args.swiglu else gelu
    values |= dict(gated_linear_unit=args.swiglu, num_moe_experts=args.num_experts)
    values["num_query_groups"] = args.num_query_groups if args.group_query_attention else None
    config = TransformerConfig(**values)
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(
            args.num_experts, qk_layernorm=args.qk_layernorm, normalization=args.normalization
        ),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
    )
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    return model


def rng_state() -> ShardedObject:
    """As `get_rng_state` gives it for `torch_dist`."""
    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    return ShardedObject("rng_state", [states], (1, 1), (0, 0), replica_id=0)


def train_and_save(root):
    """A step of a Megatron-LM run with the distributed optimiser, saved as iteration 100; its model."""
    torch.manual_seed(3)
    model = plain_model(1, torch.float32)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    wrapped = DistributedDataParallel(model.config, settings, model)
    settings = OptimizerConfig(optimizer="adam", lr=1e-2, params_dtype=torch.float32, use_distributed_optimizer=True)
    optimizer = get_megatron_optimizer(settings, [wrapped], use_gloo_process_groups=True)
    tokens = torch.arange(24).view(2, 12)
    future = torch.ones(12, 12, dtype=torch.bool).triu(1)[None, None]
    wrapped(tokens, torch.arange(12).expand(2, -1), future, labels=tokens).mean().backward()
    wrapped.finish_grad_sync()
    optimizer.step()
    state = {"args": argparse.Namespace(**ARGS), "checkpoint_version": 3.0, "iteration": 100}
    state["model"] = model.sharded_state_dict()
    metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
    state["optimizer"] = optimizer.sharded_state_dict(copy.copy(state), metadata=metadata)
    state["opt_param_scheduler"] = {"max_lr": 1e-2, "num_steps": 800, "lr_decay_style": "cosine"}
    state["rerun_state_machine"] = {"mode": "disabled"}
    state["rng_state"] = rng_state()
    state["num_floating_point_operations_so_far"] = 1e9
    folder = root / "iter_0000100"
    folder.mkdir(parents=True)
    dist_checkpointing.save(state, str(folder))
    (root / TRACKER).write_text("100")
    return model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of Megatron-LM, and what its model makes of `TOKENS`."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    with parallel_context(ParallelConfig()):
        model = train_and_save(root)
        folder = root / "iter_0000100"
        if not (folder / "common.pt").exists():  # where Megatron-Core 0.16 keeps the args, and 0.19 does not
            torch.save(dist_checkpointing.load_common_state_dict(str(folder)), folder / "common.pt")
        return root, logits_of(model, TOKENS)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """A Hugging Face folder of the model that the run began with."""
    return save_hf(tmp_path_factory.mktemp("hf"), hf_model(**LLAMA))


def copy_of(root, target):
    shutil.copytree(root, target)
    return target


def test_the_network_is_read_from_the_args(trained):
    checkpoint = Checkpoint(trained[0])
    assert checkpoint.iteration == 100
    # Nobody has told how many tokens the tokenizer has.
    assert checkpoint.network == network_from_config(LLAMA).replace(vocab_size=128)
    assert any(key.startswith("optimizer.") for key in checkpoint.tensors)


def logits_of_folder(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits


@pytest.mark.parametrize("marker", ["100", "release"])
@pytest.mark.parametrize("given", ["beside the weights", "by name"])
def test_a_run_of_megatron_lm_is_exported(given, marker, trained, tokenizer, tmp_path):
    root, expected = trained
    root = copy_of(root, tmp_path / "run")
    if marker == "release":
        (root / "iter_0000100").rename(root / "release")
        (root / TRACKER).write_text("release\n")
    if given == "beside the weights":
        shutil.copytree(tokenizer, root / "huggingface")
        assert Checkpoint(root).network == network_from_config(LLAMA)
    named = str(tokenizer) if given == "by name" else None
    folder = export(ExportConfig(str(root), str(tmp_path / "out"), huggingface=named))
    torch.testing.assert_close(logits_of_folder(folder), expected[..., :101], rtol=1e-4, atol=1e-4)


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


def test_from_megatron_lm_to_a_smaller_hugging_face_model(trained, tokenizer, tmp_path):
    """Scored, pruned and exported: as transformers prunes the same weights, by the plan; and without the manifest."""
    root = copy_of(trained[0], tmp_path / "run")
    shutil.copytree(tokenizer, root / "huggingface")
    text = tmp_path / "text.jsonl"
    choose = random.Random(0)
    lines = ["".join(choose.choice("abcdefgh") for _ in range(80)) for _ in range(60)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = DataConfig(text=[str(text)], cache_dir=str(tmp_path / "cache"), sequence_length=16, heldout_pct=20)
    score(ScoreConfig(str(root), str(tmp_path / "scores"), data=data, num_samples=4, micro_batch=2))
    target = TargetConfig(layers=3, hidden=40, ffn=30, heads=4)
    pruned = prune(PruneConfig(str(root), str(tmp_path / "pruned"), str(tmp_path / "scores"), target=target))
    network = Checkpoint(pruned).network
    expected = logits_of_folder(export(ExportConfig(str(pruned), str(tmp_path / "out"))))
    attention, mlp = network.sublayers[:2]
    assert expected.shape == (2, 30, 101) and network.has_equal_layers
    assert (network.hidden_size, mlp.ffn_hidden_size, attention.num_heads) == (40, 30, 4)
    # Megatron-Core itself, from the args alone.
    (pruned / "manifest.json").unlink()
    assert Checkpoint(pruned).network == network
    found = logits_of_folder(export(ExportConfig(str(pruned), str(tmp_path / "again"))))
    assert torch.equal(found, expected)
    with parallel_context(ParallelConfig()):
        model = megatron_model(Checkpoint(pruned).megatron_args())
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(Checkpoint(pruned).folder))
        model.load_state_dict(state["model"], strict=True)
        torch.testing.assert_close(logits_of(model, TOKENS)[..., :101], expected, rtol=1e-4, atol=1e-4)
    # Trained on, and its manifest gone as well.
    loss = LossConfig(kd_logits_weight=0.0, lm_weight=1.0)
    settings = DistillConfig(None, str(tmp_path / "pruned"), str(tmp_path / "distilled"), data=data, loss=loss)
    settings.steps, settings.global_batch, settings.micro_batch = 2, 2, 2
    settings.optimizer.warmup_steps = 0
    checkpoints = distill(settings) / "checkpoints"
    expected = logits_of_folder(export(ExportConfig(str(checkpoints), str(tmp_path / "third"))))
    (checkpoints / "manifest.json").unlink()
    assert torch.equal(logits_of_folder(export(ExportConfig(str(checkpoints), str(tmp_path / "fourth")))), expected)


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


def test_without_a_tokenizer_it_is_said_how_to_give_one(trained, tokenizer, tmp_path):
    root, output = copy_of(trained[0], tmp_path / "run"), str(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"put the tokenizer's files .* or name a folder .* huggingface=FOLDER"):
        export(ExportConfig(str(root), output))
    # Another model's.
    other = json.loads((tokenizer / "config.json").read_text()) | {"model_type": "nemotron"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(other))
    no_nemotron = r"not a nemotron network \(network.norm = .*, network.norm_zero_centered = False, mlp.activation = "
    with pytest.raises(UnsupportedModelError, match=no_nemotron):
        export(ExportConfig(str(root), output, huggingface=str(tmp_path / "other")))
    (tmp_path / "other/config.json").write_text(json.dumps(other | {"vocab_size": 1000, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match="1000 tokens, and the checkpoint an embedding table of 128 rows"):
        export(ExportConfig(str(root), output, huggingface=str(tmp_path / "other")))


def test_a_config_is_written_where_there_is_none(trained, tokenizer, tmp_path):
    root, expected = trained
    (tmp_path / "words").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, tmp_path / "words" / name)
    folder = export(ExportConfig(str(root), str(tmp_path / "out"), huggingface=str(tmp_path / "words")))
    torch.testing.assert_close(logits_of_folder(folder), expected[..., :101], rtol=1e-4, atol=1e-4)


def test_the_tokenizer_that_a_run_saved_is_found(trained, tokenizer, tmp_path):
    """As `--save-tokenizer-assets` and Megatron-Bridge save it. One that is put beside the weights goes before it."""
    root, expected = copy_of(trained[0], tmp_path / "run"), trained[1]
    words = root / "iter_0000100/tokenizer"
    words.mkdir()
    shutil.copy(tokenizer / "tokenizer_config.json", words)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    token, last = max(content["model"]["vocab"].items(), key=lambda item: item[1])
    content["model"]["vocab"][token] = last + 4  # ids may have gaps
    (words / "tokenizer.json").write_text(json.dumps(content))
    count = 1 + max([last + 4, *(added["id"] for added in content["added_tokens"])])
    assert Checkpoint(root).network.vocab_size == count
    folder = export(ExportConfig(str(root), str(tmp_path / "out")))
    torch.testing.assert_close(logits_of_folder(folder), expected[..., :count], rtol=1e-4, atol=1e-4)
    shutil.copytree(tokenizer, root / "huggingface")
    assert Checkpoint(root).network.vocab_size == 101


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


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_megatron_lm_builds_by_the_args_what_was_imported(config, tmp_path):
    hf = hf_model(**config)
    checkpoint = Checkpoint(import_hf(tmp_path, hf))
    with parallel_context(ParallelConfig()), torch.no_grad():
        model = megatron_model(checkpoint.megatron_args())
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint.folder))
        model.load_state_dict(state["model"], strict=True)
        torch.testing.assert_close(logits_of(model, TOKENS)[..., :101], hf(TOKENS).logits, rtol=1e-4, atol=1e-4)


BRIDGE = """
_target_: megatron.bridge.training.config.ConfigContainer
model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  num_layers: 4
  hidden_size: 48
  ffn_hidden_size: 44
  num_attention_heads: 6
  num_query_groups: 2
  kv_channels: 12
  normalization: RMSNorm
  layernorm_epsilon: 1.0e-05
  layernorm_zero_centered_gamma: false
  activation_func: {_call_: false, _target_: torch.nn.functional.silu}
  gated_linear_unit: true
  add_bias_linear: false
  add_qkv_bias: false
  qk_layernorm: false
  position_embedding_type: rope
  rotary_base: 500
  rotary_percent: 1.0
  rope_scaling: false
  seq_length: 64
  seq_len_interpolation_factor: null
  share_embeddings_and_output_weights: false
  vocab_size: 101
  should_pad_vocab: true
  make_vocab_size_divisible_by: 128
  num_moe_experts: null
  transformer_layer_spec: {_call_: false, _target_: megatron.bridge.models.gpt_provider.default_layer_spec}
  params_dtype: {_call_: false, _target_: torch.float32}
"""


@pytest.fixture
def bridge(trained, tmp_path):
    """The same weights, as Megatron-Bridge saves them: without args, with its own file."""
    root = copy_of(trained[0], tmp_path / "run")
    common = torch.load(root / "iter_0000100/common.pt", weights_only=False)
    del common["args"]
    torch.save(common, root / "iter_0000100/common.pt")
    (root / "iter_0000100/run_config.yaml").write_text(BRIDGE)
    return root


def test_a_run_of_megatron_bridge_is_exported(bridge, trained, tokenizer, tmp_path):
    assert Checkpoint(bridge).network == network_from_config(LLAMA)
    folder = export(ExportConfig(str(bridge), str(tmp_path / "out"), huggingface=str(tokenizer)))
    torch.testing.assert_close(logits_of_folder(folder), trained[1][..., :101], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("functional.silu", "functional.tanh", "activation_func = 'torch.nn.functional.tanh' with gated_linear_unit"),
        ("num_moe_experts: null", "num_moe_experts: 8", "num_moe_experts = 8 is not supported (mixtures of experts"),
        ("model:", "other:", "run_config.yaml does not describe a model: KeyError('model')"),
        ("params_dtype: ", "params_dtype: !!python/name:os.system ", "run_config.yaml does not describe a model"),
        ("vocab_size: 101", "vocab_size: null", "padded_vocab_size is missing"),
    ],
)
def test_what_is_wrong_in_a_run_config_is_named(old, new, message, bridge):
    path = bridge / "iter_0000100/run_config.yaml"
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        Checkpoint(bridge)
    assert message in str(caught.value)
