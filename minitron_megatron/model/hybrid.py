"""Builds networks as a HybridModel (Megatron-Core 0.18 or newer), which has one layer for every sublayer.

HybridModel chooses a layer's class by its symbol, and all layers share one configuration. Here each sublayer builds its
own layer, so that this package defines the kinds and sizes may differ. On disk layers are numbered as GPTModel's.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from minitron_megatron.model.layers import Slot
from minitron_megatron.model.network import Network
from minitron_megatron.model.specs import layer_submodules, norm_module

# Megatron-Core's own layers with the same call signature as a sublayer in each slot.
_SYMBOLS = {Slot.MIXER: Symbols.ATTENTION, Slot.CHANNEL: Symbols.MLP}


class Layer(TransformerLayer):
    """A transformer layer with one half, built by the sublayer at its position in the network.

    Args:
        config: of the network.
        network: the whole network.
        layer_number: position of the sublayer in the network, from 1.
        options: of Megatron-Core's layer.
    """

    def __init__(self, config: TransformerConfig, network: Network, layer_number: int = 1, **options: Any):
        from minitron_megatron.model.build import layer_config

        sublayer = network.sublayers[layer_number - 1]
        own = layer_config(config, [sublayer])
        super().__init__(own, layer_submodules({sublayer.slot: sublayer.modules(own)}), layer_number, **options)


class Stack(HybridStack):
    """The sublayers of a stage. HybridStack's own final norm is Transformer Engine's, even where that is missing."""

    layers: Iterable[TransformerLayer]

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        network: Network,
        post_process: bool,
        **options: Any,
    ):
        super().__init__(config, submodules, post_process=post_process, post_layer_norm=False, **options)
        self.network = network
        self.final_layernorm = None
        if post_process:
            norm = norm_module(config)
            self.final_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden = super().forward(*args, **kwargs)
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Numbers layers as GPTModel does, and stacks them where all are equal."""
        layers, self.layers = self.layers, torch.nn.ModuleList()
        try:
            state: ShardedStateDict = super().sharded_state_dict(prefix, sharded_offsets, metadata)  # without layers
        finally:
            self.layers = layers
        stacked = self.network.has_equal_layers and not (metadata or {}).get("non_homogeneous_layers")
        for index, layer in enumerate(layers):
            number, own = self.network.layer_of(layer.layer_number - 1), f"{prefix}layers.{index}."
            offsets = [(0, number, len(self.network.layers))] if stacked else []
            part = layer.sharded_state_dict(own, offsets, metadata)
            replace_prefix_for_sharding(part, own, f"{prefix}layers." if stacked else f"{prefix}layers.{number}.")
            state |= part
        return state


class Model(HybridModel):
    """HybridModel with GPTModel's checkpoint keys."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Leaves out Transformer Engine's extra state of the output projection, as GPTModel does."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        state.pop(f"{prefix}output_layer._extra_state", None)
        return state


def hybrid_model(network: Network, stages: Sequence[range], settings: dict[str, Any]) -> Model:
    """Builds this rank's part of a network.

    Args:
        network: the whole network.
        stages: numbers of the transformer layers on each stage.
        settings: arguments that GPTModel and HybridModel share.
    """
    symbols = [_SYMBOLS[sublayer.slot] for sublayer in network.sublayers]
    parts = ["".join(symbols[position] for number in stage for position in network.layers[number]) for stage in stages]
    layer = ModuleSpec(module=Layer, params={"network": network})
    return Model(
        hybrid_stack_spec=ModuleSpec(
            module=Stack,
            params={"network": network},
            submodules=HybridStackSubmodules(attention_layer=layer, mlp_layer=layer),
        ),
        hybrid_layer_pattern="|".join(parts),
        **settings,
    )
