"""Model families: convert a Hugging Face config to a `Network`, and back.

A family defines how its config spells sizes and switches, and which kinds of layers it has. The kinds know the names of
its tensors. How to add one: docs/architecture.md.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from minitron_megatron.errors import ConfigError, UnsupportedModelError
from minitron_megatron.model.config_fields import check_fields, kept_fields
from minitron_megatron.model.config_positions import (
    require_full_attention,
    require_no_window,
    rotary_parameters,
    rotary_scaling,
)
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP, Activation
from minitron_megatron.model.network import Network, pad_vocab, transformer
from minitron_megatron.model.norms import NormKind

Config = dict[str, Any]
"""The content of a `config.json`."""


@dataclass(frozen=True)
class Family:
    """One Hugging Face model type.

    Attributes:
        architecture: its class in transformers.
        read: converts a config to a network. Raises `UnsupportedModelError` for unsupported features and, with
            `check_fields`, for fields that it does not know.
        write: returns the config fields of a network, without `model_type` and `architectures`.
        obstacles: returns why a network does not belong to the family, as `NAME = VALUE`.
    """

    architecture: str
    read: Callable[[Config], Network]
    write: Callable[[Network], Config]
    obstacles: Callable[[Network], list[str]] = lambda network: []


@dataclass(frozen=True)
class _Dense:
    """The differences between families of dense transformers.

    Attributes:
        norm_eps: name of the norm's epsilon in the config.
        hidden_act: the config's name of the activation.
        own_fields: config fields that not all families read.
        attention, mlp, network: fields of these that are the same for every model of the family.
        defaults: config fields that transformers assumes where a config leaves them out.
        config: returns further config fields of a network.
    """

    norm_eps: str = "rms_norm_eps"
    hidden_act: str = "silu"
    own_fields: frozenset[str] = frozenset()
    attention: Mapping[str, Any] = field(default_factory=dict)
    mlp: Mapping[str, Any] = field(default_factory=dict)
    network: Mapping[str, Any] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    config: Callable[[Network], Config] = lambda network: {}

    def read(self, config: Config) -> Network:
        config = {**self.defaults, **config}
        self._require_known(config)
        rope = rotary_parameters(config)
        if "partial_rotary_factor" not in self.defaults and rope["partial_rotary_factor"] != 1:
            raise UnsupportedModelError(
                f"config.json: partial_rotary_factor = {rope['partial_rotary_factor']} is not supported for this "
                f"family: choose a model without"
            )
        heads = config["num_attention_heads"]
        attention = Attention(
            num_heads=heads,
            num_query_groups=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            **self.attention,
        )
        mlp = MLP(ffn_hidden_size=config["intermediate_size"], **self.mlp)
        return Network(
            transformer(config["num_hidden_layers"], [attention, mlp]),
            hidden_size=config["hidden_size"],
            vocab_size=config["vocab_size"],
            padded_vocab_size=pad_vocab(config["vocab_size"]),
            max_positions=config["max_position_embeddings"],
            norm_eps=config[self.norm_eps],
            rotary_base=rope["rope_theta"],
            rotary_fraction=rope["partial_rotary_factor"],
            rotary_scaling=rotary_scaling(rope),
            tie_embeddings=bool(config.get("tie_word_embeddings")),
            **self.network,
        )

    def _require_known(self, config: Config) -> None:
        """Raises an error for features of a config that `Network` has no field for."""
        own = {*_SHARED_FIELDS, self.norm_eps, *self.own_fields}
        check_fields(config, own, _OF_SOME_FAMILY)
        if (activation := config.get("hidden_act", self.hidden_act)) != self.hidden_act:
            raise UnsupportedModelError(
                f"config.json: hidden_act = {activation!r} is not supported for this family: choose a model with "
                f"{self.hidden_act!r}"
            )
        for name in sorted(_BIASES & self.own_fields):
            if bool(config.get(name)) != (expected := self.defaults.get(name, False)):
                raise UnsupportedModelError(
                    f"config.json: {name} = {json.dumps(config.get(name))} is not supported for this family: choose a "
                    f"model {'with' if expected else 'without'}"
                )
        if "layer_types" in self.own_fields:
            require_full_attention(config)
        elif "sliding_window" in self.own_fields:
            require_no_window(config)

    def write(self, network: Network) -> Config:
        attention, mlp = _first_layer(network)
        rope: Config = {"rope_type": "default", "rope_theta": network.rotary_base}
        if scaling := network.rotary_scaling:
            rope = {
                "rope_type": "llama3",
                "rope_theta": network.rotary_base,
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_positions,
            }
        if network.rotary_fraction != 1:
            rope["partial_rotary_factor"] = network.rotary_fraction
        return {
            "num_hidden_layers": len(network.layers),
            "hidden_size": network.hidden_size,
            "intermediate_size": mlp.ffn_hidden_size,
            "num_attention_heads": attention.num_heads,
            "num_key_value_heads": attention.num_query_groups,
            "head_dim": attention.head_dim,
            "vocab_size": network.vocab_size,
            "max_position_embeddings": network.max_positions,
            "rope_parameters": rope,
            # Readers older than transformers 5 look for these two.
            "rope_theta": network.rotary_base,
            "rope_scaling": rope if network.rotary_scaling else None,
            "tie_word_embeddings": network.tie_embeddings,
            "hidden_act": self.hidden_act,
            self.norm_eps: network.norm_eps,
            **self.config(network),
        }

    def obstacles(self, network: Network) -> list[str]:
        """Returns the fields with which a network differs from every model of the family."""
        if any(tuple(type(network.sublayers[p]) for p in layer) != (Attention, MLP) for layer in network.layers):
            return [f"pattern = {network.pattern!r}"]
        if not network.has_equal_layers:
            return unlike_layers(network)
        attention, mlp = _first_layer(network)
        switches = {"norm": NormKind.RMSNORM, "norm_zero_centered": False, **self.network}
        if "partial_rotary_factor" not in self.defaults:
            switches["rotary_fraction"] = 1.0
        of_attention = {"bias": False, "qkv_bias": False, "qk_norm": False, **self.attention}
        of_mlp = {"activation": Activation.SILU, "gated": True, "bias": False, **self.mlp}
        checked: list[tuple[object, str, Mapping[str, Any]]] = [
            (network, "network", switches),
            (attention, attention.name, of_attention),
            (mlp, mlp.name, of_mlp),
        ]
        return [
            f"{where}.{name} = {value}"
            for owner, where, expected in checked
            for name in expected
            if (value := getattr(owner, name)) != expected[name]
        ]

    def family(self, architecture: str) -> Family:
        return Family(architecture, self.read, self.write, self.obstacles)


def _first_layer(network: Network) -> tuple[Attention, MLP]:
    """Returns the sublayers of the first layer of a dense transformer."""
    attention, mlp = (network.sublayers[position] for position in network.layers[0])
    assert isinstance(attention, Attention) and isinstance(mlp, MLP)  # `_Dense.obstacles` refuses other layers
    return attention, mlp


def _no_window(network: Network) -> Config:
    """Returns the fields with which Qwen's configs say that all layers attend to the whole sequence."""
    layer_types = ["full_attention"] * len(network.layers)
    return dict(use_sliding_window=False, sliding_window=None, layer_types=layer_types)


FAMILIES: dict[str, Family] = {}
"""Every family by its `model_type`. `register_family` fills it."""


def register_family(model_type: str, family: Family) -> None:
    """Registers a family.

    Raises:
        ValueError: the type is registered already.
    """
    if model_type in FAMILIES:
        raise ValueError(f"the family {model_type!r} is registered already, for {FAMILIES[model_type].architecture}")
    FAMILIES[model_type] = family


_SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
_ROTARY = "rope_theta rope_scaling rope_parameters partial_rotary_factor original_max_position_embeddings"
_SHARED_FIELDS = {*_SIZES.split(), *_ROTARY.split(), "hidden_act", "max_position_embeddings", "tie_word_embeddings"}
_BIASES = frozenset(("attention_bias", "attention_out_bias", "mlp_bias"))
_WINDOWS = frozenset(("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"))
_OF_SOME_FAMILY = _BIASES | _WINDOWS | {"rms_norm_eps", "norm_eps"}
"""Fields that some families' classes in transformers read, and all others pass over."""

_DENSE = {
    "llama": _Dense(
        own_fields=frozenset(("attention_bias", "mlp_bias")),
        config=lambda network: dict(attention_bias=False, mlp_bias=False),
    ).family("LlamaForCausalLM"),
    "mistral": _Dense(
        own_fields=frozenset(("sliding_window",)),
        defaults=dict(num_key_value_heads=8, sliding_window=4096),
        config=lambda network: dict(sliding_window=None),
    ).family("MistralForCausalLM"),
    "qwen2": _Dense(
        own_fields=_WINDOWS,
        attention=dict(qkv_bias=True),
        defaults=dict(num_key_value_heads=32, use_sliding_window=False, sliding_window=4096),
        config=_no_window,
    ).family("Qwen2ForCausalLM"),
    "seed_oss": _Dense(
        own_fields=_BIASES,
        attention=dict(qkv_bias=True),
        defaults=dict(num_key_value_heads=8, head_dim=128, attention_bias=True),
        config=lambda network: dict(attention_bias=True, attention_out_bias=False, mlp_bias=False),
    ).family("SeedOssForCausalLM"),
    "qwen3": _Dense(
        own_fields=_WINDOWS | {"attention_bias"},
        attention=dict(qk_norm=True),
        defaults=dict(num_key_value_heads=32, head_dim=128, use_sliding_window=False, sliding_window=4096),
        config=lambda network: dict(attention_bias=False, **_no_window(network)),
    ).family("Qwen3ForCausalLM"),
    "nemotron": _Dense(
        norm_eps="norm_eps",
        own_fields=frozenset(("attention_bias", "mlp_bias")),
        hidden_act="relu2",
        mlp=dict(activation=Activation.SQUARED_RELU, gated=False),
        network=dict(norm=NormKind.LAYERNORM, norm_zero_centered=True),
        defaults=dict(partial_rotary_factor=0.5),
        config=lambda network: dict(
            attention_bias=False, mlp_bias=False, partial_rotary_factor=network.rotary_fraction
        ),
    ).family("NemotronForCausalLM"),
}
for _model_type, _family in _DENSE.items():
    register_family(_model_type, _family)

_SEED_OSS = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None, attention_dropout=0.0, residual_dropout=0.0)
"""Defaults of a Qwen2 config that differ from Seed-OSS's."""

_EXPERTS = "mixtures of experts ('E')"
_OTHER_LAYERS = {
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), _EXPERTS),
    **dict.fromkeys(("mamba_d_state", "mamba_num_heads", "ssm_state_size", "state_size"), "Mamba ('M')"),
    **dict.fromkeys(("linear_num_value_heads", "linear_num_key_heads"), "gated linear attention ('G')"),
    "kv_lora_rank": "multi-latent attention",
}
"""Unsupported kinds of layers, by the config field that shows them."""

_GEMMA = (
    "GPTModel of Megatron-Core has neither its scaled embeddings nor the norms behind its sublayers, and transformers "
    "derives that scale from the width, so that a network of another width would not be the same there"
)


def network_from_config(config: Config, max_positions: int | None = None) -> Network:
    """Converts a Hugging Face `config.json` to a network.

    Args:
        config: content of the file.
        max_positions: longest sequence, where it is to be shorter than the config's.

    Raises:
        ConfigError: the config's longest sequence is shorter.
        UnsupportedModelError: the axis table does not describe the family, or a feature of the model.
    """
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None:
        raise UnsupportedModelError(
            f"config.json: model_type = {config.get('model_type')!r} is not supported{_unsupported_reason(config)}: "
            f"choose a model of one of {', '.join(sorted(FAMILIES))}"
        )
    if max_positions is None:
        return family.read(config)
    if max_positions > (own := config["max_position_embeddings"]):
        raise ConfigError([f"max_positions = {max_positions}: must be at most the {own} of the model's config"])
    return family.read({**config, "max_position_embeddings": max_positions})


def config_from_network(network: Network, original: Config) -> Config:
    """Returns the `config.json` of a network.

    Only the fields of `original` that hold for any network made of it, such as token ids, are kept. Without a
    `model_type` there, the first family that describes the network is used.

    Raises:
        UnsupportedModelError: no family of transformers describes the network, or not the original's.
    """
    model_type, original = _family_to_write(original.get("model_type") or _family_of(network), network, original)
    family = FAMILIES[model_type]
    others = family.obstacles(network)
    if others and (unlike := unlike_layers(network)):
        raise UnsupportedModelError(
            f"no class of transformers has layers of unlike sizes, and {'; '.join(unlike)}: make these alike, or "
            f"export with format=padded, which fills layers up with zeros"
        )
    if others:
        raise UnsupportedModelError(
            f"the checkpoint is not a {model_type} network ({', '.join(others)}): give the config.json of its own "
            f"family"
        )
    kept = kept_fields(original)
    return {**kept, "model_type": model_type, "architectures": [family.architecture], **family.write(network)}


def _family_to_write(model_type: str, network: Network, original: Config) -> tuple[str, Config]:
    """Returns the family to write a network as, and the config to begin with.

    Pruned networks may have sizes that the original family's class refuses.
    """
    attention = next((own for own in network.sublayers if isinstance(own, Attention)), None)
    if attention and model_type == "llama" and network.hidden_size % attention.num_heads:
        # LlamaConfig refuses a hidden size that is not a multiple of the heads. Mistral is the same network (without a
        # sliding window and biases) and has no such restriction.
        return "mistral", original
    if attention and model_type == "qwen2" and network.hidden_size != attention.num_heads * attention.head_dim:
        # Inference servers compute Qwen2's head_dim as hidden size / heads and ignore the config's. Seed-OSS is the
        # same network with a head_dim field.
        return "seed_oss", {**_SEED_OSS, **original}
    return model_type, original


def unlike_layers(network: Network) -> list[str]:
    """Returns how the layers of a network differ, one phrase each: sizes, and missing sublayers."""
    phrases = []
    for kind in network.kinds:
        own = [network.sublayers[position] for position in network.positions(kind)]
        for name in own[0].__dataclass_fields__:
            values = [getattr(sublayer, name) for sublayer in own]
            if any(value != values[0] for value in values):
                shown = ", ".join(map(str, dict.fromkeys(values)))
                phrases.append(f"{kind.name}.{name} is {shown} by layer")
        having = {network.layer_of(position) for position in network.positions(kind)}
        if missing := [number for number in range(len(network.layers)) if number not in having]:
            phrases.append(f"layers {', '.join(map(str, missing))} have no {kind.title}")
    return phrases


def _family_of(network: Network) -> str:
    """Returns the first family that describes a network."""
    missing = {}
    for name, family in FAMILIES.items():
        if not (others := family.obstacles(network)):
            return name
        missing[name] = others
    listed = "\n  ".join(f"not {name}: {', '.join(others)}" for name, others in missing.items())
    raise UnsupportedModelError(f"the network belongs to no supported family of transformers:\n  {listed}")


def _unsupported_reason(config: Config) -> str:
    """Returns what Megatron-Core or the axis table lacks for a family, as far as its config tells."""
    if str(config.get("model_type")).startswith("gemma"):
        return f" ({_GEMMA})"
    kinds = {kind: None for field, kind in _OTHER_LAYERS.items() if config.get(field)}
    return f" (it has layers of {' and of '.join(kinds)})" if kinds else ""
