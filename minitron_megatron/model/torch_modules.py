"""Building blocks of the local layer spec, used on the CPU, and on CUDA without Transformer Engine.

Megatron-Core's own local blocks refuse sequence parallelism and zero-centred norms, and its attention materialises the
score matrix. These support both, keep no score matrix, and have the same parameter names.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minitron_megatron.parallel.cpu import bypass_cpu_mode, in_blocks


class _MadeTwice:
    """Makes a tensor for the first of two callers, and keeps it for the second."""

    def __init__(self, make: Callable[[], Tensor]):
        self.make = make
        self.made: Tensor | None = None

    def __call__(self) -> Tensor:
        made, self.made = self.made, None
        if made is None:
            made = self.made = self.make()
        return made


_Recompute = partial[Tensor] | _MadeTwice
"""Makes a tensor again in the backward pass. A `recomputed` tensor has it as an attribute."""


def _set_recompute(tensor: Tensor, recompute: _Recompute) -> None:
    tensor.recompute = recompute  # type: ignore[attr-defined]  # tensors take attributes of any name


def recomputed(function: Callable[..., Tensor], *args: Any) -> Tensor:
    """Calls a function whose result is recomputed in the backward pass instead of kept by the modules that read it.

    Neither does the function keep arguments that are `recomputed` themselves.
    """
    out: Tensor = _call_without_saving(args[0], function, *args)
    if out.requires_grad:
        _set_recompute(out, partial(_run_again, function, *(getattr(arg, "recompute", arg) for arg in args)))
    return out


def _run_again(function: Callable[..., Tensor], *args: Any) -> Tensor:
    return function(*(arg() if isinstance(arg, partial | _MadeTwice) else arg for arg in args))


def _call_without_saving(input_: Tensor, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a function that keeps its input for the backward pass. If that is `recomputed`, it keeps `_Recompute`."""
    recompute: _Recompute | None = getattr(input_, "recompute", None)
    if recompute is None:
        return function(*args, **kwargs)

    # The hook lives as long as its results, and must not hold the input itself.
    kept = input_.data_ptr(), input_.shape

    def keep(saved: Tensor) -> Tensor | _Recompute:
        if (saved.data_ptr(), saved.shape) == kept:
            return recompute
        # Detached, because the function's own output would otherwise keep its graph node alive, and that the output.
        # Not so for parameters, whose attributes Megatron-Core reads.
        return saved if isinstance(saved, torch.nn.Parameter) else saved.detach()

    with torch.autograd.graph.saved_tensors_hooks(keep, _unpack):
        return function(*args, **kwargs)


def _unpack(kept: Tensor | _Recompute) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    with torch.no_grad():
        return kept()


class _RecomputesInput(torch.nn.Module):
    """Makes a linear layer keep no input for its backward pass that can be `recomputed`.

    The outputs of norms and activations are a third of what a layer keeps, and cheap to compute again.
    """

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> Any:
        return _call_without_saving(input_, super().forward, input_, *args, **kwargs)


class ColumnLinear(_RecomputesInput, ColumnParallelLinear):
    """Megatron-Core's ColumnParallelLinear, after a norm."""


class RecomputedLinear(ColumnLinear):
    """The first projection of a gated MLP. Its output, half of what a layer would keep, is `recomputed` as well."""

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        out, bias = super().forward(input_, *args, **kwargs)
        recompute: _Recompute | None = getattr(input_, "recompute", None)
        if recompute is not None and out.requires_grad:
            # Two read it: the activation, and the second linear layer through the activation's output.
            make = recompute
            _set_recompute(out, _MadeTwice(lambda: ColumnParallelLinear.forward(self, make(), *args, **kwargs)[0]))
        return out, bias


class RowLinear(_RecomputesInput, RowParallelLinear):
    """Megatron-Core's RowParallelLinear, after an activation or attention."""


class _RMSNorm(torch.autograd.Function):
    """RMSNorm in float32 that keeps its input for the backward pass, without float32 copies of it.

    torch's own keeps two such copies on the CPU: four times the memory in bf16, with a norm before every projection.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        out, scale = torch.empty_like(x), x.new_empty(*x.shape[:-1], 1, dtype=torch.float32)
        with bypass_cpu_mode():
            for x_part, out_part, scale_part in in_blocks(x, out, scale):
                wide = x_part.float()
                torch.rsqrt(wide.square().mean(-1, keepdim=True).add_(eps), out=scale_part)
                out_part.copy_((wide * scale_part).mul_(weight))
        ctx.save_for_backward(x, weight, scale)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        out, grad_weight = torch.empty_like(x), torch.zeros_like(weight)
        with bypass_cpu_mode():
            for grad_part, x_part, scale_part, out_part in in_blocks(grad, x, scale, out):
                normed = x_part.float() * scale_part
                wide = grad_part.float()
                grad_weight += (wide * normed).flatten(0, -2).sum(0)
                wide = wide * weight
                along = torch.linalg.vecdot(wide, normed).unsqueeze(-1) / x.size(-1)
                out_part.copy_(wide.sub_(normed.mul_(along)).mul_(scale_part))
        return out, grad_weight, None


def normalize(x: Tensor, weight: Tensor, bias: Tensor | None, config: TransformerConfig) -> Tensor:
    """Applies the norm that `config` describes, over the last dimension, in float32.

    Args:
        x: `[..., hidden]`.
        weight: `[hidden]`; zero-centred if the config says so.
        bias: `[hidden]`; None for RMSNorm.
    """
    weight = weight.float()
    if config.layernorm_zero_centered_gamma:
        weight = weight + 1
    if bias is None:
        return _RMSNorm.apply(x, weight, config.layernorm_epsilon)
    # CUDA's layer_norm needs the same dtype for input and weight.
    return F.layer_norm(x.float(), weight.shape, weight, bias.float(), config.layernorm_epsilon).to(x.dtype)


class _SwiGLU(torch.autograd.Function):
    """`silu(gate) * up` that keeps only its input for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        out = x.new_empty(*x.shape[:-1], x.size(-1) // 2)
        with bypass_cpu_mode():
            for x_part, out_part in in_blocks(x, out):
                gate, up = x_part.chunk(2, dim=-1)
                torch.mul(F.silu(gate), up, out=out_part)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        [x] = ctx.saved_tensors
        out = torch.empty_like(x)
        with bypass_cpu_mode():
            for grad_part, x_part, out_part in in_blocks(grad, x, out):
                (gate, up), (grad_gate, grad_up) = x_part.chunk(2, dim=-1), out_part.chunk(2, dim=-1)
                torch.ops.aten.silu_backward(grad_part * up, gate, grad_input=grad_gate)
                torch.mul(F.silu(gate), grad_part, out=grad_up)
        return out


class GatedActivation(MegatronModule):
    """The gated activation of an MLP: the first half of the last dimension gates the second."""

    def __init__(self, config: TransformerConfig):
        super().__init__(config=config)

    def forward(self, x: Tensor) -> Tensor:
        """Maps `[..., 2 * ffn/tp]` to `[..., ffn/tp]`."""
        return recomputed(self._gated, x)

    def _gated(self, x: Tensor) -> Tensor:
        if self.config.activation_func is F.silu:
            return _SwiGLU.apply(x)
        gate, up = x.chunk(2, dim=-1)
        return self.config.activation_func(gate) * up


class Norm(torch.nn.Module):
    """RMSNorm or LayerNorm, marked for Megatron to sum its gradients over tensor ranks under sequence parallelism."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any):
        super().__init__()
        self.config = config
        start = 0.0 if config.layernorm_zero_centered_gamma else 1.0
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), start, dtype=config.params_dtype))
        self.bias = None
        if config.normalization == "LayerNorm":
            self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        for parameter in self.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]  # Megatron's mark

    def forward(self, x: Tensor) -> Tensor:
        return recomputed(normalize, x, self.weight, self.bias, self.config)


class CausalAttention(MegatronModule):
    """Causal attention, by torch's `scaled_dot_product_attention`, which keeps no score matrix."""

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

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any) -> Tensor:
        """Computes the attention.

        Args:
            query: `[seq, batch, heads/tp, head_dim]`.
            key, value: `[seq, batch, groups/tp, head_dim]`.
            attention_mask: `[batch, seq]`, the document number of each token, which attends only within its document;
                None for one document. Attention is causal in either case.

        Returns:
            `[seq, batch, heads/tp * head_dim]`.
        """
        # Contiguous, because a view would keep the whole QKV projection alive for the backward pass.
        key, value = (x.permute(1, 2, 0, 3).contiguous() for x in (key, value))
        if not query.is_cuda:
            with bypass_cpu_mode():
                return _attend_by_blocks(query, key, value, attention_mask, self.softmax_scale)
        if attention_mask is not None:
            attention_mask = (attention_mask[:, None, :, None] == attention_mask[:, None, None, :]).tril()
        query = query.permute(1, 2, 0, 3)
        context = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attention_mask,
            is_causal=attention_mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.size(1) != key.size(1),
        )
        return context.permute(2, 0, 1, 3).flatten(2)


# Queries per block: with fewer, the kernel's backward pass is slower; with more, it computes more masked scores.
_QUERIES = 256


def _attend_by_blocks(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, scale: float | None
) -> Tensor:
    """Computes causal attention a block of queries at a time, over keys up to its last query: half of all on average.

    One causal call of torch for everything would compute the masked scores too. The heads of a group are passed as
    additional queries of one head, which is faster than torch's own query groups.

    Args:
        query: `[seq, batch, heads, head_dim]`.
        key, value: `[batch, groups, seq, head_dim]`.
        documents, scale: as in `CausalAttention`.

    Returns:
        `[seq, batch, heads * head_dim]`.
    """
    groups = key.size(1)
    share = query.size(2) // groups
    blocks = []
    for start in range(0, len(query), _QUERIES):
        # [batch, groups, queries * share, head_dim]
        queries = query[start : start + _QUERIES].unflatten(2, (groups, share)).permute(1, 2, 0, 3, 4).flatten(2, 3)
        seen = slice(start + queries.size(2) // share)
        make_mask = partial(_mask, start, seen.stop, share, query.dtype, documents)
        mask = make_mask()
        _set_recompute(mask, make_mask)
        blocks.append(
            _call_without_saving(
                mask, F.scaled_dot_product_attention, queries, key[:, :, seen], value[:, :, seen], mask, scale=scale
            )
        )
    return recomputed(partial(_joined, share), *blocks)


def _mask(start: int, end: int, share: int, dtype: torch.dtype, documents: Tensor | None) -> Tensor:
    """Returns the additive mask of queries `start:end` over keys `:end`, `-inf` where masked.

    Returns:
        `[queries * share, keys]`, or `[batch, 1, queries * share, keys]` for several documents.
    """
    hidden = torch.ones(end - start, end, dtype=torch.bool).triu_(start + 1)
    if documents is not None:
        hidden = hidden | (documents[:, None, start:end, None] != documents[:, None, None, :end])
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -torch.inf)
    return mask.repeat_interleave(share, -2)


def _joined(share: int, *blocks: Tensor) -> Tensor:
    """Joins blocks `[batch, groups, queries * share, head_dim]` to `[seq, batch, groups * share * head_dim]`."""
    return torch.cat([block.unflatten(2, (-1, share)).permute(2, 0, 1, 3, 4) for block in blocks]).flatten(2)
