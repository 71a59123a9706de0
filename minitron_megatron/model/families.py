"""Model families: between a Hugging Face config and a `ModelShape`, both ways.

A family says how its config spells the sizes. Where its tensors lie is the axis table's business.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from minitron_megatron.errors import UnsupportedModelError
from minitron_megatron.model.shape import (
    Activation,
    Llama3RopeScaling,
    ModelShape,
    NormKind,
    layers_pattern,
    pad_vocab,
)


@dataclass(frozen=True)
class Family:
    """One Hugging Face model type.

    Attributes:
        architecture: its class in transformers.
        switches: fields of `ModelShape` that are the same for every model of the family.
        activation: what its config calls their activation.
        defaults: config fields that transformers assumes where a config leaves them out.
        config: the family's own config fields that follow from a shape.
        read: fields of `ModelShape` that follow from the family's own config fields.
    """

    architecture: str
    switches: dict
    activation: str
    defaults: dict
    config: Callable[[ModelShape], dict]
    read: Callable[[dict], dict]


def _no_window(shape: ModelShape) -> dict:
    """What Qwen's configs say of layers that all attend to the whole sequence."""
    return dict(use_sliding_window=False, sliding_window=None, layer_types=["full_attention"] * shape.num_layers)


_LLAMA = dict(norm=NormKind.RMSNORM, activation=Activation.SILU, gated=True)

FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _LLAMA,
        "silu",
        {},
        lambda shape: dict(rms_norm_eps=shape.norm_eps, attention_bias=False, mlp_bias=False),
        lambda config: dict(norm_eps=config["rms_norm_eps"]),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _LLAMA,
        "silu",
        dict(num_key_value_heads=8, sliding_window=4096),
        lambda shape: dict(rms_norm_eps=shape.norm_eps, sliding_window=None),
        lambda config: dict(norm_eps=config["rms_norm_eps"]),
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {**_LLAMA, "qkv_bias": True},
        "silu",
        dict(num_key_value_heads=32, use_sliding_window=False),
        lambda shape: dict(rms_norm_eps=shape.norm_eps, **_no_window(shape)),
        lambda config: dict(norm_eps=config["rms_norm_eps"]),
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        {**_LLAMA, "qkv_bias": True},
        "silu",
        dict(num_key_value_heads=8, head_dim=128, attention_bias=True),
        lambda shape: dict(rms_norm_eps=shape.norm_eps, attention_bias=True, attention_out_bias=False, mlp_bias=False),
        lambda config: dict(norm_eps=config["rms_norm_eps"]),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {**_LLAMA, "qk_norm": True},
        "silu",
        dict(num_key_value_heads=32, head_dim=128, use_sliding_window=False),
        lambda shape: dict(rms_norm_eps=shape.norm_eps, attention_bias=False, **_no_window(shape)),
        lambda config: dict(norm_eps=config["rms_norm_eps"]),
    ),
    "nemotron": Family(
        "NemotronForCausalLM",
        dict(norm=NormKind.LAYERNORM, norm_zero_centered=True, activation=Activation.SQUARED_RELU, gated=False),
        "relu2",
        dict(partial_rotary_factor=0.5),
        lambda shape: dict(
            norm_eps=shape.norm_eps,
            attention_bias=False,
            mlp_bias=False,
            partial_rotary_factor=shape.rotary_fraction,
        ),
        lambda config: dict(norm_eps=config["norm_eps"]),
    ),
}

_SEED_OSS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, attention_dropout=0.0, residual_dropout=0.0)
"""What a Qwen2 config means where it leaves these out, and Seed-OSS's does not."""

_QWEN2_ALONE = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")

_EXPERTS = "mixtures of experts ('E')"
_OTHER_LAYERS = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("mamba_d_state", "mamba_num_heads", "ssm_state_size", "state_size"), "Mamba ('M')"),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), "gated linear attention ('G')"),
    "kv_lora_rank": "multi-latent attention",
}
"""Kinds of layers that no axis table describes yet, by the field of a config that tells of them."""

_GEMMA = (
    "GPTModel of Megatron-Core has neither its scaled embeddings nor the norms behind its sublayers, and transformers "
    "derives that scale from the width, so that a network of another width would not be the same there"
)


def shape_from_config(config: dict) -> ModelShape:
    """The shape of the network that a Hugging Face `config.json` describes.

    Raises:
        UnsupportedModelError: the family, or a switch of it, has no axis table.
    """
    family = FAMILIES.get(config.get("model_type"))
    if family is None:
        raise UnsupportedModelError(
            f"config.json: model_type = {config.get('model_type')!r} is not supported{_why_not(config)}: choose a "
            f"model of one of {', '.join(sorted(FAMILIES))}"
        )
    config = {**family.defaults, **config}
    if (activation := config.get("hidden_act", family.activation)) != family.activation:
        raise UnsupportedModelError(
            f"config.json: hidden_act = {activation!r} is not supported for this family: choose a model with "
            f"{family.activation!r}"
        )
    for name in ("attention_bias", "attention_out_bias", "mlp_bias"):
        if bool(config.get(name)) != (expected := family.defaults.get(name, False)):
            raise UnsupportedModelError(
                f"config.json: {name} = {json.dumps(config.get(name))} is not supported for this family: choose a "
                f"model {'with' if expected else 'without'}"
            )
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < config["max_position_embeddings"]:
        raise UnsupportedModelError(
            f"config.json: sliding_window = {window} is not supported, being shorter than max_position_embeddings = "
            f"{config['max_position_embeddings']}: lower that to {window} if longer sequences are not needed"
        )
    # The one is transformers 5's name, the other that of earlier versions, which kept these two fields outside.
    rope = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    rope |= {name: config[name] for name in rope if config.get(name)}
    rope |= config.get("rope_scaling") or config.get("rope_parameters") or {}
    return ModelShape(
        pattern=layers_pattern(config["num_hidden_layers"]),
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        num_heads=config["num_attention_heads"],
        num_query_groups=config.get("num_key_value_heads") or config["num_attention_heads"],
        head_dim=config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"],
        vocab=config["vocab_size"],
        padded_vocab=pad_vocab(config["vocab_size"]),
        max_positions=config["max_position_embeddings"],
        rotary_base=rope["rope_theta"],
        rotary_fraction=rope["partial_rotary_factor"],
        rotary_scaling=_rotary_scaling(rope),
        tied=bool(config.get("tie_word_embeddings")),
        **family.switches,
        **family.read(config),
    )


def config_from_shape(shape: ModelShape, original: dict) -> dict:
    """The `config.json` of a network, keeping what `original` says beside sizes (token ids and the like).

    Without a family in `original` it is of the first one that is the same network.

    Raises:
        UnsupportedModelError: no network of transformers is this one, or none of that family.
    """
    if not shape.is_uniform:
        raise UnsupportedModelError(
            f"shape.pattern = {shape.pattern!r} is not '*-' repeated, and transformers has no such network: export "
            f"what keeps or drops attention and MLP of a layer together"
        )
    model_type = original.get("model_type") or _family_of(shape)
    if model_type == "llama" and shape.hidden % shape.num_heads:
        # LlamaConfig refuses a width that is no multiple of the heads. Mistral's is the same network without
        # that restriction (no sliding window, no biases).
        model_type = "mistral"
    if model_type == "qwen2" and shape.hidden != shape.num_heads * shape.head_dim:
        # Servers take Qwen2's head_dim to be the width divided by the heads, whatever the config says.
        # Seed-OSS's is the same network with a head_dim of its own.
        model_type = "seed_oss"
        original = {**_SEED_OSS, **{name: value for name, value in original.items() if name not in _QWEN2_ALONE}}
    family = FAMILIES[model_type]
    if others := _other_switches(family, shape):
        raise UnsupportedModelError(
            f"the checkpoint is no {model_type} network, by {', '.join(others)}: give the config.json of its own family"
        )
    rope = {"rope_type": "default", "rope_theta": shape.rotary_base}
    if scaling := shape.rotary_scaling:
        rope = {
            "rope_type": "llama3",
            "rope_theta": shape.rotary_base,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_positions,
        }
    if shape.rotary_fraction != 1:
        rope["partial_rotary_factor"] = shape.rotary_fraction
    return {
        **original,
        "model_type": model_type,
        "architectures": [family.architecture],
        "num_hidden_layers": shape.num_layers,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.num_heads,
        "num_key_value_heads": shape.num_query_groups,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocab,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": rope,
        # Readers older than transformers 5 look for these two.
        "rope_theta": shape.rotary_base,
        "rope_scaling": rope if shape.rotary_scaling else None,
        "tie_word_embeddings": shape.tied,
        "hidden_act": family.activation,
        **family.config(shape),
    }


def _other_switches(family: Family, shape: ModelShape) -> list[str]:
    """The fields of a shape that have another value in every model of a family, as `shape.NAME = VALUE`."""
    switches = {"qkv_bias": False, "linear_bias": False, "qk_norm": False, "norm_zero_centered": False}
    if "partial_rotary_factor" not in family.defaults:
        switches["rotary_fraction"] = 1.0
    wrong = [name for name, value in {**switches, **family.switches}.items() if getattr(shape, name) != value]
    return [f"shape.{name} = {getattr(shape, name)}" for name in wrong]


def _family_of(shape: ModelShape) -> str:
    """The first family that is the same network."""
    missing = {}
    for name, family in FAMILIES.items():
        if not (others := _other_switches(family, shape)):
            return name
        missing[name] = others
    listed = "\n  ".join(f"not {name}: {', '.join(others)}" for name, others in missing.items())
    raise UnsupportedModelError(f"transformers has no network of this shape that this package writes:\n  {listed}")


def _why_not(config: dict) -> str:
    """What Megatron-Core or the axis tables lack for a family, as far as its config tells."""
    if str(config.get("model_type")).startswith("gemma"):
        return f" ({_GEMMA})"
    kinds = {kind: None for field, kind in _OTHER_LAYERS.items() if config.get(field)}
    return f" (it has layers of {' and of '.join(kinds)})" if kinds else ""


def _rotary_scaling(scaling: dict) -> Llama3RopeScaling | None:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise UnsupportedModelError(
            f"config.json: rotary scaling {kind!r} is not supported: choose a model with 'llama3' or none"
        )
    return Llama3RopeScaling(
        factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        original_max_positions=scaling["original_max_position_embeddings"],
    )
