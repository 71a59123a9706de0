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


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in float32 that keeps its input for the backward pass, and not the float32 copies of it.

    torch's own keeps two on the CPU: four times the memory in bf16, and a norm stands before every projection.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, scale = ctx.saved_tensors
        grad, normed = grad.float(), x.float() * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0)
        grad = grad * weight
        along = torch.linalg.vecdot(grad, normed).unsqueeze(-1) / x.size(-1)
        return grad.sub_(normed.mul_(along)).mul_(scale).to(x.dtype), grad_weight, None


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, config: TransformerConfig) -> Tensor:
    """The norm that `config` describes, over the last dimension, in float32.

    Args:
        x: `[..., hidden]`.
        weight: `[hidden]`; zero-centred if the config says so.
        bias: `[hidden]` for LayerNorm, None for RMSNorm.
    """
    weight = weight.float()
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    if config.normalization == "RMSNorm":
        return _RMSNorm.apply(x, weight, config.layernorm_epsilon)
    # CUDA's layer_norm takes one number format for input and weight.
    return F.layer_norm(x.float(), weight.shape, weight, bias.float(), config.layernorm_epsilon).to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up` that keeps its input for the backward pass, and neither of the products."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        gate, up = ctx.saved_tensors[0].chunk(2, dim=-1)
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return torch.cat([grad_gate, F.silu(gate).mul_(grad)], dim=-1)


class GatedActivation(MegatronModule):
    """The gated activation of an MLP: of the halves of the last dimension, the first one gates the second."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., 2 * ffn/tp]` to `[..., ffn/tp]`."""
        if self.config.activation_func is F.silu:
            return _SwiGLU.apply(x)
        gate, up = x.chunk(2, dim=-1)
        return self.config.activation_func(gate) * up


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
        # A view would keep the whole QKV projection alive for the backward pass.
        value = value.contiguous()
        context = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=query.size(1) != key.size(1)
        )
        return context.permute(2, 0, 1, 3).flatten(2)
