"""Checkpoints as a Megatron-LM run writes them, with the args that it saves beside them, and the model of such args.

`megatron.training` is no part of Megatron-Core's wheel. What is written here follows its `generate_state_dict`: args,
model, optimiser, schedule and random states, through Megatron-Core's own `dist_checkpointing.save`.
"""

import argparse
import copy
import dataclasses
import random
import shutil
import signal

import numpy as np
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

from minitron_megatron.checkpoint.dist_reader import TRACKER
from tests.unit.checkpoint.plain import plain_model

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


def copy_of(root, target):
    shutil.copytree(root, target)
    return target


def logits_of_folder(folder):
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(TOKENS).logits
