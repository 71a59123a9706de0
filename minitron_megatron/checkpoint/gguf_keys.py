"""The metadata of a GGUF file: which keys are read, which change nothing, and which refuse the file.

llama.cpp reads a model's keys by the name of its architecture, and passes over all others.
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-arch.cpp
"""

import logging
from collections.abc import Mapping
from pathlib import Path

from minitron_megatron.errors import CheckpointError, UnsupportedModelError

logger = logging.getLogger(__name__)

Value = str | int | float | None
"""A text or a number; None for a list."""

# Read here or by transformers, each one number.
_READ = frozenset(
    (
        "context_length",
        "embedding_length",
        "block_count",
        "feed_forward_length",
        "vocab_size",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scaling.type",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "attention.layer_norm_epsilon",
        "attention.layer_norm_rms_epsilon",
        "attention.sliding_window",
    )
)
# Of no effect on the network: how the file was made, and what the scaling that is refused would need.
_HARMLESS = frozenset(("tensor_data_layout", "rope.scaling.original_context_length", "rope.scaling.finetuned"))
# Keys that say nothing with this value, and another network with any other.
_NEUTRAL: Mapping[str, float] = {
    **dict.fromkeys(("rope.scaling.factor", "rope.scaling.attn_factor", "rope.scale_linear"), 1),
    **dict.fromkeys(("residual_scale", "embedding_scale", "logit_scale", "attention.causal"), 1),
    **dict.fromkeys(("expert_count", "expert_used_count", "use_parallel_residual", "nextn_predict_layers"), 0),
    **dict.fromkeys(("attention.max_alibi_bias", "attention.clamp_kqv", "attention.scale", "pooling_type"), 0),
}
# Other prefixes under which llama.cpp finds what changes a network.
_OTHER_PREFIXES = ("adapter.", "clip.", "diffusion.", "xielu.")
# Names for which transformers knows how text is split before its merges; others it splits as GPT-2 does.
_PRE_TOKENIZERS = frozenset(
    (
        *("default", "gpt-2", "gpt2", "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0"),
        *("lfm2", "jina-v5-nano", "dbrx", "smaug-bpe", "tekken", "qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2"),
        *("megrez", "qwen35", "gpt-4o", "llama4", "kanana2", "talkie", "minimax-m2"),
    )
)


def check_whole(path: Path, values: Mapping[str, Value]) -> None:
    """Refuses a file that is no whole model.

    Raises:
        CheckpointError: it is a part of a model, or an adapter.
    """
    if (count := values.get("split.count")) and count != 1:
        raise CheckpointError(
            f"{path} is one of {count} parts of a model: join them first with `llama-gguf-split --merge {path.name} "
            f"whole.gguf` of llama.cpp, and import that"
        )
    if values.get("general.type") == "adapter" or "adapter.type" in values:
        raise CheckpointError(f"{path} is an adapter: merge it first with `llama-export-lora` of llama.cpp")


def check_keys(path: Path, values: Mapping[str, Value], architecture: str) -> None:
    """Refuses a file with keys that llama.cpp reads and this package does not; says an unknown pre-tokenizer.

    Raises:
        UnsupportedModelError: there are such keys.
    """
    own = {key.removeprefix(f"{architecture}."): key for key in values if key.startswith(f"{architecture}.")}
    unknown = [key for name, key in own.items() if not _is_known(name, values[key])]
    unknown += [key for key in values if key.startswith(_OTHER_PREFIXES)]
    if unknown:
        listed = ", ".join(f"{key} = {'[...]' if values[key] is None else values[key]!r}" for key in unknown)
        raise UnsupportedModelError(
            f"{path}: {listed} may change the network, and is not read: import the Hugging Face folder of the model, "
            f"or choose another model"
        )
    split = values.get("tokenizer.ggml.pre")
    if values.get("tokenizer.ggml.model") == "gpt2" and split is not None and split not in _PRE_TOKENIZERS:
        logger.warning(
            "%s: tokenizer.ggml.pre = %r is not known to transformers, which then splits text as GPT-2 does: tokens "
            "may be others than the model's own; the Hugging Face folder of the model has its tokenizer",
            path,
            split,
        )


def _is_known(name: str, value: Value) -> bool:
    if name in _HARMLESS:
        return True
    if name in _READ:
        return value is not None
    return name in _NEUTRAL and value == _NEUTRAL[name]
