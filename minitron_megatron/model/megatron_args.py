"""A network's shape in the words of Megatron-LM's command line, which it keeps in its checkpoints as `args`."""

import argparse

from minitron_megatron.model.shape import ModelShape

_BY_STAGE = (
    "decoder_first_pipeline_num_layers",
    "decoder_last_pipeline_num_layers",
    "num_layers_per_virtual_pipeline_stage",
    "num_virtual_stages_per_pipeline_rank",
    "pipeline_model_parallel_layout",
    "virtual_pipeline_model_parallel_size",
)


def args_of_shape(args: argparse.Namespace, shape: ModelShape) -> argparse.Namespace:
    """The saved args of a network after it got another shape: fresh weights, which no run has trained on yet.

    Args:
        args: of the network that it was made from; they stay as they are.
        shape: of the network that it is now.
    """
    values = {
        "num_layers": len(shape.megatron_layers),
        "hidden_size": shape.hidden,
        "ffn_hidden_size": shape.ffn,
        "num_attention_heads": shape.num_heads,
        "group_query_attention": shape.num_query_groups != shape.num_heads,
        "num_query_groups": shape.num_query_groups,
        "kv_channels": shape.head_dim,
        "padded_vocab_size": shape.padded_vocab,
        "max_position_embeddings": shape.max_positions,
        "iteration": 0,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        # How the layers were spread over stages holds for another number of layers no more.
        **{name: None for name in _BY_STAGE if name in args},
        # As by a run that was told not to save them, so that Megatron-LM does not look for them.
        "no_save_optim": True,
        "no_save_rng": True,
    }
    if "encoder_num_layers" in args:  # a second name, which Megatron-LM fills with the first
        values["encoder_num_layers"] = values["num_layers"]
    if not shape.is_uniform:
        values["hybrid_layer_pattern"] = shape.pattern
    return argparse.Namespace(**(vars(args) | values))
