"""Converts between a network and Megatron-LM's command line arguments, which its checkpoints keep as `args`.

Names and defaults are those of `megatron/training/arguments.py`. Newer releases of Megatron-LM take some of the names
from `TransformerConfig`; both are read, and both are written.
"""

import argparse
import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from minitron_megatron.errors import UnsupportedModelError
from minitron_megatron.model.layers import DENSE, KINDS
from minitron_megatron.model.network import Llama3RopeScaling, Network, transformer
from minitron_megatron.model.norms import NormKind

logger = logging.getLogger(__name__)

_BY_STAGE = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
    "virtual_pipeline_model_parallel_size",
)
_NULL_TOKENIZERS = ("NullTokenizer", "NullMultimodalTokenizer")
"""Tokenizers without a vocabulary. They add an end-of-document token to `vocab_size`."""

_NORMS = {"RMSNorm": NormKind.RMSNORM, "LayerNorm": NormKind.LAYERNORM}
_OTHER_KINDS = {"M": "Mamba", "E": "mixtures of experts", "G": "gated linear attention", "D": "sparse attention"}
_GPT_ROPE = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192)
"""GPTModel's constants for rotary scaling, beside `rope_scaling_factor`: Llama 3.1's."""


_FRESH = dict(
    add_position_embedding=True,
    rotary_interleaved=False,
    apply_query_key_layer_scaling=False,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    make_vocab_size_divisible_by=128,
    tokenizer_type="HuggingFaceTokenizer",
    tensor_model_parallel_size=1,
    pipeline_model_parallel_size=1,
    expert_model_parallel_size=1,
    ckpt_format="torch_dist",
)
"""Args that no field of `Network` determines, for weights that Megatron-LM did not train."""

_OTHER_NETWORKS = (
    "num_layers_per_virtual_pipeline_stage",
    "virtual_pipeline_model_parallel_size",
    "mtp_hybrid_override_pattern",
    "mtp_num_layers",
    "mtp_use_repeated_layer",
    "spec",
    "num_experts",
    "moe_layer_freq",
    "moe_ffn_hidden_size",
    "moe_router_topk",
    "moe_token_dispatcher_type",
    "moe_router_pre_softmax",
    "moe_grouped_gemm",
    "moe_single_grouped_weight",
    "moe_single_grouped_bias",
    "moe_shared_expert_intermediate_size",
    "moe_router_score_function",
    "moe_router_enable_expert_bias",
    "moe_router_topk_scaling_factor",
    "moe_latent_size",
    "mamba_state_dim",
    "mamba_head_dim",
    "mamba_num_groups",
    "mamba_num_heads",
    "gdp_num_householder",
    "heterogeneous_layers_config_path",
    "heterogeneous_layers_config_encoded_json",
    "tiktoken_pattern",
    "tokenizer_model",
)
"""Other args that `load_args_from_checkpoint` reads, for features that these networks lack: None has no effect."""


def _is_unset(value: Any) -> bool:
    return value is None or value is False or value == 0


NO_FIELD: dict[str, tuple[Callable[[Any], bool], str]] = {
    "num_experts": (_is_unset, "mixtures of experts ('E')"),
    "num_moe_experts": (_is_unset, "mixtures of experts ('E')"),
    "multi_latent_attention": (_is_unset, "multi-latent attention"),
    "experimental_attention_variant": (_is_unset, "attention of another kind"),
    "mtp_num_layers": (_is_unset, "layers that predict several tokens"),
    "heterogeneous_layers_config_path": (_is_unset, "layers of several sizes"),
    "heterogeneous_layers_config_encoded_json": (_is_unset, "layers of several sizes"),
    "heterogeneous_block_specs": (_is_unset, "layers of several sizes"),
    "window_size": (_is_unset, "sliding windows"),
    "no_rope_freq": (_is_unset, "layers without the rotary embedding"),
    "rotary_interleaved": (_is_unset, "an interleaved rotary embedding"),
    "rotary_seq_len_interpolation_factor": (_is_unset, "interpolated positions"),
    "qk_l2_norm": (_is_unset, "L2 norms of queries and keys"),
    "attention_output_gate": (_is_unset, "a gate behind attention"),
    "softmax_scale": (_is_unset, "a scale of its own for attention"),
    "softmax_type": (lambda value: value in (None, "vanilla"), "another softmax"),
    "quick_geglu": (_is_unset, "another activation"),
    "openai_gelu": (_is_unset, "another activation"),
    "activation_func_clamp_value": (_is_unset, "a clamped activation"),
    "glu_linear_offset": (_is_unset, "a shifted gate"),
    "apply_residual_connection_post_layernorm": (_is_unset, "residuals taken behind the norm"),
    "use_mup": (_is_unset, "muP's scales"),
}
"""Args that `Network` has no field for: a predicate for values without effect, and the feature that others enable."""


_PATTERNS = ["hybrid_layer_pattern", "hybrid_override_pattern"]
"""Names of the layer pattern: today's, and the former one."""


def network_of_args(args: argparse.Namespace) -> Network:
    """Returns the network that a Megatron-LM run with these args has trained.

    Args that an older Megatron-LM did not have get today's default. Where the args do not give the tokenizer's size,
    all rows of the embedding table count as tokens.

    Raises:
        UnsupportedModelError: a feature is on that `Network` has no field for, or a size is missing.
    """

    get = _getter(args)
    pattern = get(*_PATTERNS)
    if problems := _arg_problems(args, pattern, get):
        raise UnsupportedModelError(
            "the args of the run do not describe a network that this package supports:\n  " + "\n  ".join(problems)
        )
    if pattern:
        made = {symbol: KINDS[symbol].from_args(get) for symbol in set(pattern) if symbol in KINDS}
        sublayers = tuple(made[symbol] for symbol in pattern if symbol in made)
    else:
        sublayers = transformer(args.num_layers, [kind.from_args(get) for kind in DENSE])
    scaling = None
    if get("use_rope_scaling", default=False):
        rest = {name: get(f"rope_scaling_{name}", default=value) for name, value in _GPT_ROPE.items()}
        scaling = Llama3RopeScaling(get("rope_scaling_factor", default=8.0), **rest)
    return Network(
        sublayers,
        hidden_size=args.hidden_size,
        vocab_size=_num_tokens(args),
        padded_vocab_size=args.padded_vocab_size,
        max_positions=get("max_position_embeddings", "seq_length", default=2048),
        norm=_NORMS[get("normalization", default="LayerNorm")],
        norm_eps=get("layernorm_epsilon", "norm_epsilon", default=1e-5),
        norm_zero_centered=get("layernorm_zero_centered_gamma", "apply_layernorm_1p", default=False),
        rotary_base=float(get("rotary_base", default=10000)),
        rotary_fraction=get("rotary_percent", default=1.0),
        rotary_scaling=scaling,
        tie_embeddings=not get("untie_embeddings_and_output_weights", default=False),
    )


def _getter(args: argparse.Namespace) -> Callable[..., Any]:
    """Returns a function that gives the first of several args that is set."""

    def get(*names: str, default: Any = None) -> Any:
        values = (getattr(args, name, None) for name in names)
        return next((value for value in values if value is not None), default)

    return get


def _arg_problems(args: argparse.Namespace, pattern: str | None, get: Callable[..., Any]) -> list[str]:
    """Returns why `Network` cannot describe the network of these args, one sentence each."""
    problems = [
        f"{name} = {value!r} is not supported ({what})"
        for name, (is_same, what) in NO_FIELD.items()
        if not is_same(value := getattr(args, name, None))
    ]
    if others := set(pattern or "") - {*KINDS, "|"}:
        kinds = ", ".join(f"{_OTHER_KINDS.get(symbol, 'another kind')} ({symbol!r})" for symbol in sorted(others))
        problems.append(f"hybrid_layer_pattern = {pattern!r} is not supported (layers of {kinds})")
    if pattern and get("use_rope_scaling"):
        problems.append("use_rope_scaling = True is not supported with a pattern (HybridModel scales no frequencies)")
    if not pattern and get("spec"):
        problems.append(f"spec = {args.spec!r} is not supported (layers that other code describes)")
    if not get("use_rotary_position_embeddings") and (kind := get("position_embedding_type")) != "rope":
        problems.append(f"position_embedding_type = {kind!r} is not supported (only 'rope' is)")
    if (norm := get("normalization", default="LayerNorm")) not in _NORMS:
        problems.append(f"normalization = {norm!r} is not supported (only {' and '.join(_NORMS)} are)")
    sizes = ["hidden_size", "num_attention_heads", "padded_vocab_size", *([] if pattern else ["num_layers"])]
    return problems + [f"{name} is missing" for name in sizes if get(name) is None]


def _num_tokens(args: argparse.Namespace) -> int:
    """Returns the tokens of the tokenizer, as far as the args tell."""
    if not (given := getattr(args, "vocab_size", None)):
        return args.padded_vocab_size
    return given + (getattr(args, "tokenizer_type", None) in _NULL_TOKENIZERS)


def args_of_network(args: argparse.Namespace | None, network: Network) -> argparse.Namespace | None:
    """Returns the args to save with weights that no run has trained yet: all that `--use-checkpoint-args` reads.

    If layers differ, the args are the first layer's: Megatron-LM has none for the others. There are none, and a warning
    says why, if Megatron-LM would build another network from any.

    Args:
        args: of the original network, if Megatron-LM trained it; not modified.
        network: the new network.
    """
    before = vars(args) if args is not None else {}
    patterns = [name for name in _PATTERNS if before.get(name) is not None] or _PATTERNS[:1]
    of_kinds: dict[str, Any] = {}
    for kind in network.kinds:
        of_kinds |= network.sublayers[network.positions(kind)[0]].to_args()
    values = {
        "num_layers": len(network.layers),
        "hidden_size": network.hidden_size,
        **of_kinds,
        "vocab_size": network.vocab_size - (before.get("tokenizer_type") in _NULL_TOKENIZERS),
        "padded_vocab_size": network.padded_vocab_size,
        "max_position_embeddings": network.max_positions,
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "rotary_base": int(network.rotary_base) if float(network.rotary_base).is_integer() else network.rotary_base,
        "rotary_percent": network.rotary_fraction,
        "use_rope_scaling": network.rotary_scaling is not None,
        "normalization": next(name for name, norm in _NORMS.items() if norm is network.norm),
        **dict.fromkeys(("norm_epsilon", "layernorm_epsilon"), network.norm_eps),
        **dict.fromkeys(("apply_layernorm_1p", "layernorm_zero_centered_gamma"), network.norm_zero_centered),
        "untie_embeddings_and_output_weights": not network.tie_embeddings,
        **dict.fromkeys(patterns, None if _is_gpt(network) else network.pattern),
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        # The layers' distribution over stages does not fit another number of layers.
        **{name: None for name in _BY_STAGE if name in before},
        # Megatron-LM then looks for neither in the checkpoint.
        "no_save_optim": True,
        "no_save_rng": True,
    }
    if network.rotary_scaling is not None:
        scaling = asdict(network.rotary_scaling)
        values["rope_scaling_factor"] = scaling.pop("factor")
        # GPTModel's constants need no arg.
        values |= {f"rope_scaling_{name}": value for name, value in scaling.items() if value != _GPT_ROPE[name]}
    if "encoder_num_layers" in before:  # a second name for num_layers
        values["encoder_num_layers"] = values["num_layers"]
    fresh = {"seq_length": network.max_positions, **_FRESH, **dict.fromkeys(_OTHER_NETWORKS)}
    made = argparse.Namespace(**{**fresh, **before, **values})
    if unsaid := _unsaid(made, network):
        logger.warning(
            "no args are saved for Megatron-LM's --use-checkpoint-args: none describe %s", " and ".join(unsaid)
        )
        return None
    return made


def _unsaid(args: argparse.Namespace, network: Network) -> list[str]:
    """Returns what Megatron-LM would build otherwise from the args of a network."""
    get, unsaid = _getter(args), []
    for kind in network.kinds:
        first = network.sublayers[network.positions(kind)[0]]
        if kind in DENSE and kind.from_args(get) != first:
            unsaid.append(f"this {kind.title} beside the other layers ({first})")
    if network.rotary_scaling and not _is_gpt(network):
        unsaid.append("rotary_scaling in a network with a pattern")
    return unsaid


def _is_gpt(network: Network) -> bool:
    """Returns whether all transformer layers are Megatron-LM's dense ones, which need no pattern."""
    return all(tuple(type(network.sublayers[p]) for p in layer) == DENSE for layer in network.layers)
