"""Chooses the modules of transformer layers: Transformer Engine's, Apex's or local ones."""

from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_layer_norm import FusedLayerNorm
from megatron.core.models.gpt.gpt_layer_specs import (
    HAVE_APEX,
    HAVE_TE,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from minitron_megatron.model.layers.sublayer import LayerModules, Slot
from minitron_megatron.model.te_varlen_attention import documents_apart
from minitron_megatron.model.torch_modules import Norm


def uses_te() -> bool:
    """Returns whether layers are Transformer Engine's: on CUDA, where it imports."""
    return torch.cuda.is_available() and HAVE_TE


def transformer_layer(config: TransformerConfig) -> TransformerLayerSubmodules:
    """Returns the submodules of Megatron-Core's own transformer layer, from which a kind takes its own."""
    if uses_te():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm).submodules
    return get_gpt_layer_local_spec(normalization=config.normalization).submodules


def te_attention() -> type[torch.nn.Module]:
    """Returns Transformer Engine's core attention, extended to keep documents apart."""
    from megatron.core.extensions.transformer_engine import TEDotProductAttention

    return documents_apart(TEDotProductAttention)


def norm_module(config: TransformerConfig) -> type[torch.nn.Module]:
    """Returns the class of norms that are not fused into a linear layer."""
    if uses_te():
        from megatron.core.extensions.transformer_engine import TENorm

        return TENorm
    fused = torch.cuda.is_available() and HAVE_APEX and config.normalization == "LayerNorm"
    return FusedLayerNorm if fused else Norm


def layer_modules(parts: TransformerLayerSubmodules, slot: Slot, config: TransformerConfig) -> LayerModules:
    """Returns one half of a transformer layer. Transformer Engine fuses its norm into the linear layer."""
    norm = getattr(parts, slot.norm) if uses_te() else norm_module(config)
    key_map = {
        before: after
        for before, after in parts.sharded_state_dict_keys_map.items()
        if before.split(".")[0] in (slot.norm, slot.module)
    }
    return LayerModules(norm, getattr(parts, slot.module), getattr(parts, slot.bda), key_map)


def layer_submodules(modules: dict[Slot, LayerModules]) -> TransformerLayerSubmodules:
    """Returns the submodules of a transformer layer with one or both halves. A missing half is an identity."""
    fields: dict[str, Any] = {}
    for slot, own in modules.items():
        fields |= {slot.norm: own.norm, slot.module: own.module, slot.bda: own.bda}
    key_map = {before: after for own in modules.values() for before, after in own.key_map.items()}
    return TransformerLayerSubmodules(**fields, sharded_state_dict_keys_map=key_map)


def submodules_of(spec: ModuleSpec | partial) -> Any:
    """Returns the submodules of a module's spec, which newer releases of Megatron-Core write as a partial function."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules
