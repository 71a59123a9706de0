"""Building blocks of the local layer spec, used where Transformer Engine is not: on the CPU.

Megatron-Core's own local blocks refuse sequence parallelism and zero-centred norms, and its attention
materialises the score matrix. These do neither, and keep the parameter names.
"""

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, config: TransformerConfig) -> Tensor:
    """The norm that `config` describes, over the last dimension.

    Args:
        x: `[..., hidden]`.
        weight: `[hidden]`; zero-centred if the config says so.
        bias: `[hidden]` for LayerNorm, None for RMSNorm.
    """
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    if config.normalization == "RMSNorm":
        return F.rms_norm(x, weight.shape, weight, config.layernorm_epsilon)
    return F.layer_norm(x, weight.shape, weight, bias, config.layernorm_epsilon)


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm whose gradients Megatron sums over the tensor ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.config = config
        start = 0.0 if config.layernorm_zero_centered_gamma else 1.0
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), start, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, self.weight, self.bias, self.config)


class CausalAttention(MegatronModule):
    """Causal attention on `torch.nn.functional.scaled_dot_product_attention`, without a score matrix."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ):
        super().__init__(config=config)
        assert attn_mask_type is AttnMaskType.causal and config.context_parallel_size == 1
        self.softmax_scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_) -> Tensor:
        """Attend.

        Args:
            query: `[seq, batch, heads/tp, head_dim]`.
            key, value: `[seq, batch, groups/tp, head_dim]`.
            attention_mask: must be None; the mask is causal.

        Returns:
            `[seq, batch, heads/tp * head_dim]`.
        """
        assert attention_mask is None
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.size(1) != key.size(1)
        )
        return context.permute(2, 0, 1, 3).flatten(2)
