"""From a shape to a Megatron-Core model on this rank."""

from functools import partial
from importlib.util import find_spec
from itertools import islice

import megatron.core
import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_APEX,
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from minitron_megatron.config.schema import DType, ParallelConfig
from minitron_megatron.errors import UnsupportedModelError, raise_if_any
from minitron_megatron.model.documents import documents_apart
from minitron_megatron.model.local import (
    CausalAttention,
    ColumnLinear,
    GatedActivation,
    Norm,
    RecomputedLinear,
    RowLinear,
)
from minitron_megatron.model.megatron_args import NO_FIELD
from minitron_megatron.model.shape import (
    Activation,
    Llama3RopeScaling,
    ModelShape,
    NormKind,
    layers_pattern,
    layout_problems,
)
from minitron_megatron.parallel.groups import Groups
from minitron_megatron.parallel.layout import Layout, layers_per_stage

TORCH_DTYPES = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16, DType.FP32: torch.float32}

_ACTIVATIONS = {Activation.SILU: F.silu, Activation.GELU: F.gelu, Activation.SQUARED_RELU: squared_relu}
_NORMS = {NormKind.RMSNORM: "RMSNorm", NormKind.LAYERNORM: "LayerNorm"}


def build_problems(shape: ModelShape, layout: Layout | ParallelConfig, where: str = "shape") -> list[str]:
    """Why `shape` cannot be built in a layout here, one sentence each."""
    found = layout_problems(shape, layout, where)
    if not shape.is_uniform and find_spec("megatron.core.models.hybrid") is None:
        found.append(
            f"{where}.pattern = {shape.pattern!r} is not '*-' repeated, which takes HybridModel, and megatron-core "
            f"{megatron.core.__version__} has none: install 0.18 or newer, which needs Python 3.12"
        )
    return found


# FP8 matrix products take operands whose sizes are multiples of it.
_FP8_MULTIPLE = 16


def fp8_problems(shape: ModelShape, layout: Layout | ParallelConfig, where: str) -> list[str]:
    """Why the matrix products of `shape` cannot be computed in FP8 here, one sentence each."""
    if not _uses_te():
        return [f"{where} = true takes CUDA and Transformer Engine, which are not here: set it to false"]
    sizes = {
        "hidden": shape.hidden,
        "ffn": shape.ffn // layout.tensor,
        "heads x head_dim": shape.num_heads * shape.head_dim // layout.tensor,
    }
    return [
        f"{where} = true takes sizes that are multiples of {_FP8_MULTIPLE}, and {name} has {size} per tensor rank: "
        f"set it to false"
        for name, size in sizes.items()
        if size % _FP8_MULTIPLE
    ]


def transformer_config(
    shape: ModelShape, layout: Layout, dtype: DType, recompute: bool, fp8: bool = False
) -> TransformerConfig:
    """Megatron-Core's configuration of a network in a layout; see `build_model`.

    Raises:
        ConfigError: the layout cannot split the network, or Megatron-Core has no class for its pattern.
    """
    raise_if_any(build_problems(shape, layout))
    interleaved = layout.virtual_pipeline > 1
    num_layers = len(shape.megatron_layers)
    stages = "|".join("t" * count for count in layers_per_stage(num_layers, layout.stages))
    on_cuda = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=num_layers,
        is_hybrid_model=not shape.is_uniform,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.head_dim,
        normalization=_NORMS[shape.norm],
        layernorm_epsilon=shape.norm_eps,
        layernorm_zero_centered_gamma=shape.norm_zero_centered,
        activation_func=_ACTIVATIONS[shape.activation],
        gated_linear_unit=shape.gated,
        add_bias_linear=shape.linear_bias,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if interleaved else None,
        # Megatron's notation of what each stage holds: embedding, transformer layers, loss.
        pipeline_model_parallel_layout=f"E{stages}L",
        sequence_parallel=layout.sequence,
        pipeline_dtype=TORCH_DTYPES[dtype],
        params_dtype=TORCH_DTYPES[dtype],
        bf16=dtype is DType.BF16,
        fp16=dtype is DType.FP16,
        # Scaled by what each tensor holds now: a model that only runs forward has no history to go by.
        fp8="e4m3" if fp8 else None,
        fp8_recipe="tensorwise",
        # Losses are sums over valid tokens; Megatron divides gradients by their global number.
        calculate_per_token_loss=True,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        # With two ranks both neighbours are the same peer, and batched messages between them get mixed up.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        use_cpu_initialization=not on_cuda,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=on_cuda,
        bias_dropout_fusion=on_cuda,
        bias_activation_fusion=_uses_te() and shape.gated and shape.activation is Activation.SILU,
        # Despite its name: that the activation is a module of the layer spec.
        use_te_activation_func=shape.gated and not _uses_te(),
        persist_layer_norm=False,
    )


def _uses_te() -> bool:
    return torch.cuda.is_available() and HAVE_TE


def submodules_of(spec: ModuleSpec | partial):
    """The parts of a module's spec, which newer releases of Megatron-Core write as a partial function."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def layer_modules(config: TransformerConfig) -> tuple[ModuleSpec, type[torch.nn.Module]]:
    """The modules of a transformer layer, and the final norm.

    On CUDA these are Transformer Engine's, where it imports. Elsewhere they are the local ones: Megatron-Core's
    linear layers around our attention and norm, or around Apex's fused LayerNorm where that imports.
    """
    if _uses_te():
        from megatron.core.extensions.transformer_engine import TEDotProductAttention, TENorm

        layer, norm = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm), TENorm
        attention = documents_apart(TEDotProductAttention)
        layer.submodules.self_attention.submodules.core_attention = attention
    else:
        fused = torch.cuda.is_available() and HAVE_APEX and config.normalization == "LayerNorm"
        norm = FusedLayerNorm if fused else Norm
        layer = get_gpt_layer_local_spec(normalization=config.normalization)
        layer.submodules.input_layernorm = norm
        layer.submodules.pre_mlp_layernorm = norm
        attention = layer.submodules.self_attention.submodules
        attention.core_attention = CausalAttention
        attention.linear_qkv, attention.linear_proj = ColumnLinear, RowLinear
        if config.qk_layernorm:
            attention.q_layernorm = attention.k_layernorm = norm
        mlp = submodules_of(layer.submodules.mlp)
        mlp.linear_fc1, mlp.linear_fc2 = ColumnLinear, RowLinear
        if config.use_te_activation_func:
            mlp.activation_func = GatedActivation
        # Memory is what a CPU is short of; where whole layers are run again, this is, too.
        is_swiglu = config.gated_linear_unit and config.activation_func is F.silu
        if is_swiglu and not torch.cuda.is_available() and config.recompute_granularity is None:
            mlp.linear_fc1 = RecomputedLinear
    return layer, norm


def layer_spec(config: TransformerConfig, vp_stage: int | None) -> TransformerBlockSubmodules:
    """The modules of the layers on this stage."""
    layer, norm = layer_modules(config)
    layers = [layer] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)


def build_model(
    shape: ModelShape, groups: Groups, dtype: DType, recompute: bool = False, fp8: bool = False
) -> list[GPTModel]:
    """This rank's part of the network, with random weights.

    Args:
        shape: of the whole network.
        groups: this rank's place.
        dtype: of the weights and of computation.
        recompute: in training, keep each layer's input alone and run the layer again in the backward pass.
        fp8: compute the layers' matrix products in FP8; see `fp8_problems`.

    Returns:
        one model per virtual pipeline stage of this rank.
    """
    config = transformer_config(shape, groups.layout, dtype, recompute, fp8)
    num_chunks = groups.layout.virtual_pipeline
    chunks = []
    for chunk in range(num_chunks):
        vp_stage = chunk if num_chunks > 1 else None
        settings = dict(
            config=config,
            vocab_size=shape.padded_vocab,
            max_sequence_length=shape.max_positions,
            pre_process=groups.is_first_stage and chunk == 0,
            post_process=groups.is_last_stage and chunk == num_chunks - 1,
            share_embeddings_and_output_weights=shape.tied,
            position_embedding_type="rope",
            rotary_percent=shape.rotary_fraction,
            rotary_base=shape.rotary_base,
            pg_collection=groups.collection,
            vp_stage=vp_stage,
        )
        if shape.is_uniform:
            model = GPTModel(transformer_layer_spec=layer_spec(config, vp_stage), **settings)
        else:
            model = _hybrid(shape.pattern, groups.layout, settings)
        model.rotary_pos_emb.inv_freq = _rotary_frequencies(model.rotary_pos_emb, shape)
        chunks.append(model.to(groups.device))
    return chunks


def shape_of(model: GPTModel, vocab: int | None = None, rotary_scaling: Llama3RopeScaling | None = None) -> ModelShape:
    """The shape of somebody's own GPTModel.

    Args:
        model: the model, or one rank's part of it.
        vocab: tokens of the tokenizer; None if the vocabulary is not padded.
        rotary_scaling: how its rotary frequencies are scaled, which the model does not keep.

    Raises:
        UnsupportedModelError: it has parts that the axis table does not describe, or other rotary frequencies.
    """
    config = model.config
    norms = {name: kind for kind, name in _NORMS.items()}
    activations = {function: kind for kind, function in _ACTIVATIONS.items()}
    unsupported = {
        **{name: value for name in NO_FIELD if not NO_FIELD[name][0](value := getattr(config, name, None))},
        "normalization": None if config.normalization in norms else config.normalization,
        "activation_func": None if config.activation_func in activations else config.activation_func,
        "position_embedding_type": None if model.position_embedding_type == "rope" else model.position_embedding_type,
        "context_parallel_size": config.context_parallel_size if config.context_parallel_size > 1 else None,
    }
    if found := [f"config.{name} = {value}" for name, value in unsupported.items() if value is not None]:
        raise UnsupportedModelError(f"{', '.join(found)}: not supported; supported are dense GPT models with rope")
    padded_vocab = model.vocab_size
    shape = ModelShape(
        pattern=layers_pattern(config.num_layers),
        hidden=config.hidden_size,
        ffn=config.ffn_hidden_size,
        num_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        head_dim=config.kv_channels,
        vocab=vocab or padded_vocab,
        padded_vocab=padded_vocab,
        max_positions=model.max_sequence_length,
        norm=norms[config.normalization],
        norm_eps=config.layernorm_epsilon,
        norm_zero_centered=config.layernorm_zero_centered_gamma,
        activation=activations[config.activation_func],
        gated=config.gated_linear_unit,
        qkv_bias=config.add_qkv_bias,
        linear_bias=config.add_bias_linear,
        qk_norm=config.qk_layernorm,
        rotary_base=model.rotary_base,
        rotary_fraction=model.rotary_percent,
        rotary_scaling=rotary_scaling,
        tied=model.share_embeddings_and_output_weights,
    )
    rotary = model.rotary_pos_emb
    expected = RotaryEmbedding(config.kv_channels, shape.rotary_fraction, rotary_base=shape.rotary_base)
    if not torch.allclose(_rotary_frequencies(expected, shape), rotary.inv_freq):
        raise UnsupportedModelError(
            "the rotary frequencies are not those of rotary_base: give rotary_scaling, as Llama 3.1 scales them"
        )
    return shape


def _rotary_frequencies(rotary: RotaryEmbedding, shape: ModelShape) -> torch.Tensor:
    """The frequencies of `shape`, from those of a module that does not scale them."""
    scaling = shape.rotary_scaling
    if scaling is None:
        return rotary.inv_freq
    # The models' own switch takes the factor alone; the other three would be Llama 3.1's, whatever the model.
    return rotary._apply_scaling(
        rotary.inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_positions,
    )


def _hybrid(pattern: str, layout: Layout, settings: dict) -> torch.nn.Module:
    """One chunk of the model whose sublayers come in the order of `pattern`."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    from minitron_megatron.model.hybrid import stack_spec

    sublayers = iter(pattern)
    stages = ["".join(islice(sublayers, count)) for count in layers_per_stage(len(pattern), layout.stages)]
    return HybridModel(
        hybrid_stack_spec=stack_spec(*layer_modules(settings["config"])),
        hybrid_layer_pattern="|".join(stages),
        **settings,
    )
