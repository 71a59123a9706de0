"""Networks whose sublayers come in any order: HybridModel, which Megatron-Core has from 0.18 on, on our modules."""

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor


class Stack(HybridStack):
    """The sublayers of a stage. HybridStack's own final norm is Transformer Engine's, whether it is there or not.

    Args:
        norm: class of the final norm, which the last stage has.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        norm: type[torch.nn.Module],
        post_process: bool,
        **options,
    ):
        super().__init__(config, submodules, post_process=post_process, post_layer_norm=False, **options)
        self.final_norm = None
        if post_process:
            self.final_norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, *args, **kwargs) -> Tensor:
        hidden = super().forward(*args, **kwargs)
        return hidden if self.final_norm is None else self.final_norm(hidden)


def stack_spec(layer: ModuleSpec, norm: type[torch.nn.Module]) -> ModuleSpec:
    """The modules of a hybrid model, from those of a transformer layer, which has both kinds of sublayers."""
    both = layer.submodules
    attention = TransformerLayerSubmodules(
        input_layernorm=both.input_layernorm,
        self_attention=both.self_attention,
        self_attn_bda=both.self_attn_bda,
        sharded_state_dict_keys_map=both.sharded_state_dict_keys_map,
    )
    mlp = TransformerLayerSubmodules(
        pre_mlp_layernorm=both.pre_mlp_layernorm,
        mlp=both.mlp,
        mlp_bda=both.mlp_bda,
        sharded_state_dict_keys_map=both.sharded_state_dict_keys_map,
    )
    return ModuleSpec(
        module=Stack,
        params={"norm": norm},
        submodules=HybridStackSubmodules(
            attention_layer=ModuleSpec(module=TransformerLayer, submodules=attention),
            mlp_layer=ModuleSpec(module=MLPLayer, submodules=mlp),
        ),
    )
