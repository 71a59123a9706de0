"""Builds a Megatron-Core model from a network, and describes a model as a network.

The only module that knows Megatron-Core's model classes: GPTModel, which every supported release has, and HybridModel
(from 0.18 on). Both give the same numbers and the same checkpoints.
"""

import copy
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import megatron.core
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from megatron.core.utils import unwrap_model

from minitron_megatron.config.common import DType
from minitron_megatron.config.parallel import Builder, ModelParallelConfig, ParallelConfig
from minitron_megatron.errors import UnsupportedModelError, raise_if_any
from minitron_megatron.model.layers import DENSE, Slot, Sublayer
from minitron_megatron.model.layers.sublayer import LayerModules
from minitron_megatron.model.megatron_args import NO_FIELD
from minitron_megatron.model.network import Llama3RopeScaling, Network, layout_problems, transformer
from minitron_megatron.model.norms import NormKind
from minitron_megatron.model.specs import layer_submodules, norm_module, uses_te
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.parallel.layout import layers_per_stage

TORCH_DTYPES = {DType.BF16: torch.bfloat16, DType.FP16: torch.float16, DType.FP32: torch.float32}

_NORMS = {NormKind.RMSNORM: "RMSNorm", NormKind.LAYERNORM: "LayerNorm"}
# FP8 matrix products need operands whose sizes are multiples of it.
_FP8_MULTIPLE = 16


def build_problems(network: Network, layout: ModelParallelConfig, where: str = "network") -> list[str]:
    """Returns why a network cannot be built in a layout with this Megatron-Core, one sentence each."""
    problems = layout_problems(network, layout, where)
    mixed = _mixed_layers(network)
    if (mixed or layout.builder is Builder.HYBRID) and not _has_hybrid_model():
        why = f"{where}: {mixed[0]}, which takes HybridModel" if mixed else "parallel.builder = hybrid"
        problems.append(
            f"{why}, and megatron-core {megatron.core.__version__} has none: install megatron-core 0.18 or newer, with "
            f"Python 3.12"
        )
    elif mixed and layout.builder is Builder.GPT:
        problems.append(f"{where}: {mixed[0]}, which GPTModel cannot build: set parallel.builder=hybrid or null")
    return problems


def fp8_problems(network: Network, layout: ModelParallelConfig, where: str) -> list[str]:
    """Returns why a network's matrix products cannot run in FP8 here, one sentence each."""
    if not uses_te():
        return [f"{where} = true needs CUDA and Transformer Engine, which are not available: set it to false"]
    sizes = {"hidden_size": network.hidden_size}
    for sublayer, positions in network.alike():
        for row in sublayer.rows(network):
            if row.matmul and row.split:
                split = next(dim for dim in row.dims if (dim.labels(row.split, sublayer.sizes) >= 0).all())
                sizes[f"{network.describe(positions[0])} ({row.name})"] = split.size(sublayer.sizes) // layout.tensor
    return [
        f"{where} = true needs sizes that are multiples of {_FP8_MULTIPLE}, and {name} has {size} per tensor rank: "
        f"set it to false"
        for name, size in sizes.items()
        if size % _FP8_MULTIPLE
    ]


def build_model(
    network: Network, ctx: ParallelContext, dtype: DType, recompute: bool = False, fp8: bool = False
) -> list[torch.nn.Module]:
    """Builds this rank's part of the network, with random weights.

    Args:
        network: the whole network.
        ctx: this rank's place.
        dtype: of the weights and of computation.
        recompute: full activation recomputation: keep only each layer's input, and run the layer again in the backward
            pass.
        fp8: compute the layers' matrix products in FP8; see `fp8_problems`.

    Returns:
        one model per virtual pipeline stage of this rank.

    Raises:
        ConfigError: the layout cannot split the network, or this release of Megatron-Core cannot build it.
    """
    raise_if_any(build_problems(network, ctx.layout))
    config = _network_config(network, ctx.layout, dtype, recompute, fp8)
    last = ctx.layout.model_chunks - 1
    return [
        _model_chunk(
            network,
            ctx,
            config,
            chunk,
            pre_process=ctx.is_first_stage and chunk == 0,
            post_process=ctx.is_last_stage and chunk == last,
        )
        for chunk in range(last + 1)
    ]


def build_bare_layer(network: Network, ctx: ParallelContext, dtype: DType) -> torch.nn.Module:
    """Builds the transformer layers of a network without embedding, final norm and output projection.

    Args:
        network: with one layer, as a rule: a layer of a larger network that runs by itself.
        ctx: this rank's place, without tensor or pipeline parallelism.
        dtype: of the weights and of computation.

    Returns:
        a model whose `set_input_tensor` takes hidden states `[seq, batch, hidden]`, and whose output they are.
    """
    config = _network_config(network, ctx.layout, dtype, recompute=False, fp8=False)
    return _model_chunk(network, ctx, config, chunk=0, pre_process=False, post_process=False)


def _model_chunk(
    network: Network, ctx: ParallelContext, config: TransformerConfig, chunk: int, pre_process: bool, post_process: bool
) -> torch.nn.Module:
    """Builds one virtual pipeline stage of this rank."""
    settings: dict[str, Any] = dict(
        config=config,
        vocab_size=network.padded_vocab_size,
        max_sequence_length=network.max_positions,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=network.tie_embeddings,
        position_embedding_type="rope",
        rotary_percent=network.rotary_fraction,
        rotary_base=network.rotary_base,
        pg_collection=ctx.collection,
        vp_stage=chunk if ctx.layout.model_chunks > 1 else None,
    )
    stages = _layers_of_stages(network, ctx.layout)
    if builds_hybrid(network, ctx.layout):
        from minitron_megatron.model.hybrid import hybrid_model

        model = hybrid_model(network, stages, settings)
    else:
        own = stages[chunk * ctx.layout.pipeline + ctx.pipeline_rank]
        model = GPTModel(transformer_layer_spec=_block(network, own, config), **settings)
    model.rotary_pos_emb.inv_freq = _rotary_frequencies(model.rotary_pos_emb, network)
    return model.to(ctx.device)


def builds_hybrid(network: Network, layout: ParallelConfig) -> bool:
    """Returns whether HybridModel builds a network in a layout, and not GPTModel."""
    return layout.builder is Builder.HYBRID or bool(_mixed_layers(network))


def layer_config(config: TransformerConfig, sublayers: Sequence[Sublayer]) -> TransformerConfig:
    """Returns Megatron-Core's configuration of one transformer layer: the network's, with the sublayers' sizes."""
    own = copy.copy(config)
    for sublayer in sublayers:
        for name, value in sublayer.megatron_fields().items():
            setattr(own, name, value)
    return own


def held_sublayers(model: torch.nn.Module, network: Network) -> Iterator[tuple[tuple[int, ...], torch.nn.Module]]:
    """Yields the Megatron-Core layers of a model on this rank, each with the positions of its sublayers before it."""
    own = unwrap_model(model)
    for layer in own.decoder.layers:
        number = layer.layer_number - 1
        yield (network.layers[number] if isinstance(own, GPTModel) else (number,)), layer


def layers_of(model: torch.nn.Module) -> dict[int, list[torch.nn.Module]]:
    """Returns the Megatron-Core layers of a model on this rank, by the number of their transformer layer."""
    own = unwrap_model(model)
    layers: dict[int, list[torch.nn.Module]] = {}
    for layer in own.decoder.layers:
        number = layer.layer_number - 1
        number = number if isinstance(own, GPTModel) else own.decoder.network.layer_of(number)
        layers.setdefault(number, []).append(layer)
    return layers


def first_position(model: torch.nn.Module, network: Network, ctx: ParallelContext, vp_stage: int | None) -> int:
    """Returns the position of a model's first sublayer on this rank, or where it would be if the model has none."""
    held = next(held_sublayers(model, network), None)
    if held is not None:
        return held[0][0]
    number = get_transformer_layer_offset(model.config, vp_stage, ctx.pipeline_rank)
    return sum(map(len, network.layers[:number]))


def network_of(
    model: GPTModel, vocab_size: int | None = None, rotary_scaling: Llama3RopeScaling | None = None
) -> Network:
    """Returns the network of any GPTModel, such as your own.

    Args:
        model: the model, or one rank's part of it.
        vocab_size: tokens of the tokenizer; None if the vocabulary is not padded.
        rotary_scaling: scaling of the rotary frequencies, which the model does not keep.

    Raises:
        UnsupportedModelError: it has features that the axis table does not describe, or other rotary frequencies.
    """
    config = model.config
    norms = {name: kind for kind, name in _NORMS.items()}
    unsupported = {
        **{name: value for name in NO_FIELD if not NO_FIELD[name][0](value := getattr(config, name, None))},
        "normalization": None if config.normalization in norms else config.normalization,
        "position_embedding_type": None if model.position_embedding_type == "rope" else model.position_embedding_type,
        "context_parallel_size": config.context_parallel_size if config.context_parallel_size > 1 else None,
    }
    layer: list[Sublayer] = []
    for kind in DENSE:
        try:
            layer.append(kind.of_config(config))
        except UnsupportedModelError as e:
            unsupported[kind.name] = e
    if wrong := [f"config.{name} = {value}" for name, value in unsupported.items() if value is not None]:
        raise UnsupportedModelError(f"{', '.join(wrong)}: not supported; supported are dense GPT models with rope")
    padded = model.vocab_size
    network = Network(
        transformer(config.num_layers, layer),
        hidden_size=config.hidden_size,
        vocab_size=vocab_size or padded,
        padded_vocab_size=padded,
        max_positions=model.max_sequence_length,
        norm=norms[config.normalization],
        norm_eps=config.layernorm_epsilon,
        norm_zero_centered=config.layernorm_zero_centered_gamma,
        rotary_base=model.rotary_base,
        rotary_fraction=model.rotary_percent,
        rotary_scaling=rotary_scaling,
        tie_embeddings=model.share_embeddings_and_output_weights,
    )
    rotary = model.rotary_pos_emb
    expected = RotaryEmbedding(config.kv_channels, network.rotary_fraction, rotary_base=network.rotary_base)
    if not torch.allclose(_rotary_frequencies(expected, network), rotary.inv_freq):
        raise UnsupportedModelError(
            "the rotary frequencies are not those of rotary_base: give rotary_scaling, as Llama 3.1 scales them"
        )
    return network


def _has_hybrid_model() -> bool:
    return find_spec("megatron.core.models.hybrid") is not None


def _mixed_layers(network: Network) -> list[str]:
    """Returns why GPTModel, which has one configuration per transformer layer, cannot build a network."""
    reasons = []
    for number, positions in enumerate(network.layers):
        fields: dict[str, Any] = {}
        for position in positions:
            for name, value in network.sublayers[position].megatron_fields().items():
                if fields.setdefault(name, value) != value:
                    reasons.append(f"layer {number} has sublayers of unlike {name}")
    return reasons


def _layers_of_stages(network: Network, layout: ParallelConfig) -> list[range]:
    """Returns the numbers of the transformer layers on every stage, in the order of the network."""
    ends, stages = 0, []
    for count in layers_per_stage(len(network.layers), layout.stages):
        stages.append(range(ends, ends + count))
        ends += count
    return stages


def _network_config(
    network: Network, layout: ParallelConfig, dtype: DType, recompute: bool, fp8: bool
) -> TransformerConfig:
    """Returns Megatron-Core's configuration of a network in a layout, with the sizes of the first layer."""
    interleaved = layout.model_chunks > 1
    hybrid = builds_hybrid(network, layout)
    stages = [
        sum(len(network.layers[number]) for number in stage) if hybrid else len(stage)
        for stage in _layers_of_stages(network, layout)
    ]
    on_cuda = torch.cuda.is_available()
    # Megatron-Core requires a number of heads even without attention.
    fields: dict[str, Any] = {"num_attention_heads": layout.tensor}
    for kind in network.kinds:
        fields |= network.sublayers[network.positions(kind)[0]].megatron_fields()
    config = TransformerConfig(
        num_layers=sum(stages),
        hidden_size=network.hidden_size,
        normalization=_NORMS[network.norm],
        layernorm_epsilon=network.norm_eps,
        layernorm_zero_centered_gamma=network.norm_zero_centered,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline,
        # Megatron's notation for the contents of each stage: embedding, transformer layers, loss.
        pipeline_model_parallel_layout=f"E{'|'.join('t' * count for count in stages)}L",
        is_hybrid_model=hybrid,
        sequence_parallel=layout.sequence,
        pipeline_dtype=TORCH_DTYPES[dtype],
        params_dtype=TORCH_DTYPES[dtype],
        bf16=dtype is DType.BF16,
        fp16=dtype is DType.FP16,
        # Current scaling: a model that only runs forward has no history of maxima for delayed scaling.
        fp8="e4m3" if fp8 else None,
        fp8_recipe="tensorwise",
        # Losses are sums over valid tokens; Megatron divides gradients by their global number.
        calculate_per_token_loss=True,
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
        # With two ranks both neighbours are the same peer, and batched messages between them would be mixed up.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        use_cpu_initialization=not on_cuda,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=on_cuda,
        bias_dropout_fusion=on_cuda,
        persist_layer_norm=False,
        **fields,
    )
    if not hybrid and not network.has_equal_layers:
        own = [[network.sublayers[position] for position in layer] for layer in network.layers]
        config.heterogeneous_block_specs = True
        config.get_config_for_layer = lambda number: layer_config(config, own[number - 1])
    return config


def _block(network: Network, numbers: range, config: TransformerConfig) -> TransformerBlockSubmodules:
    """Returns the specs of the transformer layers with these numbers, for GPTModel."""
    specs = []
    for number in numbers:
        own = [network.sublayers[position] for position in network.layers[number]]
        fields = layer_config(config, own)
        modules: dict[Slot, LayerModules] = {sublayer.slot: sublayer.modules(fields) for sublayer in own}
        specs.append(ModuleSpec(module=TransformerLayer, submodules=layer_submodules(modules)))
    return TransformerBlockSubmodules(layer_specs=specs, layer_norm=norm_module(config))


def _rotary_frequencies(rotary: RotaryEmbedding, network: Network) -> torch.Tensor:
    """Returns the rotary frequencies of a network, scaled from those of a module that does not scale them."""
    scaling = network.rotary_scaling
    if scaling is None:
        return rotary.inv_freq
    # Megatron-Core's switch takes only the factor; the other three would always be Llama 3.1's.
    return rotary._apply_scaling(
        rotary.inv_freq,
        factor=scaling.factor,
        low_freq_factor=scaling.low_freq_factor,
        high_freq_factor=scaling.high_freq_factor,
        original_max_position_embeddings=scaling.original_max_positions,
    )
