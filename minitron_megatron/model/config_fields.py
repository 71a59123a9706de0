"""The fields of a `config.json`: which may be passed over at import, and which still hold in an export.

Every other field is refused, because a model of which one field is passed over is another model.
"""

import json
import logging
from collections.abc import Collection, Mapping
from typing import Any

from minitron_megatron.errors import UnsupportedModelError

logger = logging.getLogger(__name__)

_SHOWN = 80  # characters of a value


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What a config says beside the network: where it comes from, how transformers runs it, and labels of other tasks.
_HARMLESS = _names(
    """
    architectures model_type auto_map _name_or_path name_or_path _model_name_or_path _commit_hash transformers_version
    torch_dtype dtype use_cache initializer_range tokenizer_class id2label label2id num_labels problem_type
    finetuning_task task_specific_params return_dict use_return_dict output_attentions output_hidden_states
    attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled torchscript
    use_bfloat16 tf_legacy_loss
    pretraining_tp chunk_size_feed_forward tie_encoder_decoder prefix gradient_checkpointing is_decoder
    transformers.js_config is_llama_config unsloth_version unsloth_fixed license kv_channels max_sequence_length
    model_max_length seq_length quantization_config
    """
)
# Of generation, which models of earlier transformers kept in the same file.
_GENERATION = _names(
    """
    max_length max_new_tokens min_length min_new_tokens do_sample early_stopping num_beams num_beam_groups
    diversity_penalty temperature top_k top_p min_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
    encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids num_return_sequences output_scores
    output_logits return_dict_in_generate remove_invalid_values exponential_decay_length_penalty suppress_tokens
    begin_suppress_tokens max_time epsilon_cutoff eta_cutoff penalty_alpha renormalize_logits watermarking_config
    cache_implementation guidance_scale
    """
)
# Fields that say nothing with this value, and another network with any other.
_NEUTRAL: Mapping[str, Any] = {
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "logits_scaling", "lm_head_multiplier"), 1),
    **dict.fromkeys(("logit_scale", "residual_scale", "embedding_scale", "rotary_pct", "rope_ratio"), 1),
    **dict.fromkeys(("rope_interleaved", "use_mrope", "is_encoder_decoder", "add_cross_attention"), False),
    **dict.fromkeys(("use_bidirectional_attention", "qk_layernorm", "use_qk_norm", "lm_head_bias"), False),
    **dict.fromkeys(("bias", "use_parallel_residual", "parallel_attn", "alibi", "scale_embedding"), False),
    **dict.fromkeys(("is_causal", "scale_attn_weights"), True),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_nextn_predict_layers"), 0),
    "no_rope_layers": [],
    "pruned_heads": {},
}

_KEPT = frozenset(("initializer_range", "use_cache", "tokenizer_class", "attention_dropout", "residual_dropout"))
"""Fields of the source's config that hold for any network made of it, beside the token ids."""


def check_fields(config: Mapping[str, Any], read: Collection[str], passed_over: Collection[str]) -> None:
    """Refuses a config with fields that may change the network and are not read; warns of dropout.

    Args:
        config: content of a `config.json`.
        read: fields that the family reads.
        passed_over: fields of other families, which the family's class in transformers passes over as well.

    Raises:
        UnsupportedModelError: there are such fields.
    """
    others = {name: value for name, value in config.items() if name not in read and name not in passed_over}
    unknown = {name: value for name, value in others.items() if not _is_harmless(name, value)}
    if unknown:
        listed = ", ".join(f"{name} = {shown(value)}" for name, value in unknown.items())
        raise UnsupportedModelError(
            f"config.json: {listed} may change the network, and a {config.get('model_type')} model is read without: "
            f"take {'it' if len(unknown) == 1 else 'them'} out of config.json if the model is the same without, or "
            f"choose another model"
        )
    for name, value in config.items():
        if _is_dropout(name) and value:
            logger.warning("config.json: %s = %s acts in transformers' training only, and is not applied", name, value)


def shown(value: object) -> str:
    """Returns a value of a config as the start of its JSON."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def kept_fields(original: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a source's config that still hold after any change of the network."""
    return {name: value for name, value in original.items() if name in _KEPT or _is_token_id(name)}


def _is_harmless(name: str, value: object) -> bool:
    if value is None or name in _HARMLESS or name in _GENERATION or _is_token_id(name) or _is_dropout(name):
        return True
    return name in _NEUTRAL and value == _NEUTRAL[name] and isinstance(value, bool) == isinstance(_NEUTRAL[name], bool)


def _is_token_id(name: str) -> bool:
    return name.endswith("_token_id")


def _is_dropout(name: str) -> bool:
    return "dropout" in name or name.endswith("_pdrop")
