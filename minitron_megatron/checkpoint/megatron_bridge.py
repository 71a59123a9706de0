"""Converts the `run_config.yaml` that Megatron-Bridge writes into a checkpoint to Megatron-LM's args."""

import argparse
from pathlib import Path

import yaml

from minitron_megatron.errors import CheckpointError, UnsupportedModelError
from minitron_megatron.model.network import pad_vocab

RUN_CONFIG = "run_config.yaml"
_ACTIVATIONS = ("silu", "gelu", "squared_relu")


def args_of_bridge(folder: Path) -> argparse.Namespace | None:
    """Returns Megatron-LM's args for the network of a Megatron-Bridge run; None without its file.

    `_target_` entries, which name Python classes and functions, are compared by name and never loaded.

    Args:
        folder: of one iteration.

    Raises:
        CheckpointError: the file cannot be read, or does not describe a model.
        UnsupportedModelError: `Network` has no such activation.
    """
    path = folder / RUN_CONFIG
    if not path.is_file():
        return None
    try:
        model = yaml.safe_load(path.read_text())["model"]
        model = {**model, **(model.get("transformer") or {})}  # a section of its own in some releases
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{path} does not describe a model: {e!r}") from e
    target = model.get("activation_func") or "gelu"
    target = target.get("_target_", "") if isinstance(target, dict) else str(target)
    activation, gated = target.rsplit(".", 1)[-1], bool(model.get("gated_linear_unit"))
    if activation not in _ACTIVATIONS or gated != (activation == "silu"):
        raise UnsupportedModelError(
            f"{path}: activation_func = {target!r} with gated_linear_unit = {gated} is not supported: choose a model "
            f"with a gated silu, or with gelu or squared_relu without a gate"
        )
    padded = vocab = model.get("vocab_size")
    if vocab and model.get("should_pad_vocab"):
        multiple = model.get("make_vocab_size_divisible_by", 128) * model.get("tensor_model_parallel_size", 1)
        padded = pad_vocab(vocab, multiple)
    names = {
        "group_query_attention": model.get("num_query_groups") is not None,
        "swiglu": gated,
        "squared_relu": activation == "squared_relu",
        "untie_embeddings_and_output_weights": not model.get("share_embeddings_and_output_weights", True),
        "use_rope_scaling": model.get("rope_scaling"),
        "rope_scaling_factor": model.get("rope_scaling_factor", 1.0),
        "rotary_seq_len_interpolation_factor": model.get("seq_len_interpolation_factor"),
        "max_position_embeddings": model.get("seq_length"),
        "vocab_size": vocab,
        "padded_vocab_size": padded,
    }
    return argparse.Namespace(**{**model, **names})
