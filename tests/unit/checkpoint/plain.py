"""The network of `LLAMA` in Megatron-Core's own classes, as any Megatron training run has it."""

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig


def plain_config(tensor: int, dtype: torch.dtype, **changes) -> TransformerConfig:
    """Sizes and switches of `LLAMA`, on a CPU."""
    settings = dict(
        num_layers=4,
        hidden_size=48,
        ffn_hidden_size=44,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=12,
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        persist_layer_norm=False,
    )
    return TransformerConfig(**settings | changes)


def plain_model(tensor: int, dtype: torch.dtype) -> GPTModel:
    """The network of `LLAMA` as Megatron-Core builds it on a CPU."""
    model = GPTModel(
        config=plain_config(tensor, dtype),
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=128,
        max_sequence_length=64,
        position_embedding_type="rope",
        rotary_base=500,
        share_embeddings_and_output_weights=False,
    )
    return model.to(dtype)  # the norms too, as Megatron's Float16Module does


def logits_of(model, tokens):
    """`[batch, seq, vocab/tp]`."""
    length = tokens.size(1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return model(tokens, torch.arange(length).expand_as(tokens), future, runtime_gather_output=False)
