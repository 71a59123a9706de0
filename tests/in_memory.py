"""Weights in memory, in and out: what stands between transformers' models and ours without a file."""

from collections.abc import Mapping

import numpy as np
import torch

from minitron_megatron.checkpoint.companions import original_config
from minitron_megatron.checkpoint.convert import companions_of
from minitron_megatron.checkpoint.huggingface import hf_tensors, read_hf_tensor, true_rows
from minitron_megatron.checkpoint.sharded import Checkpoint
from minitron_megatron.checkpoint.source import take
from minitron_megatron.model.axes import Param, axis_sizes
from minitron_megatron.model.families import config_from_shape
from minitron_megatron.model.shape import ModelShape


class StateDict:
    """Weights in memory under Hugging Face names, as a source."""

    def __init__(self, shape: ModelShape, tensors: Mapping[str, torch.Tensor]):
        self.shape = shape
        self.tensors = tensors
        self.dtype = tensors["model.embed_tokens.weight"].dtype

    def read(self, param: Param, layer: int | None, index: list[np.ndarray]) -> torch.Tensor:
        whole = torch.zeros(param.size(axis_sizes(self.shape)), dtype=self.dtype)
        for part in param.parts:
            whole[torch.from_numpy(true_rows(param, part, self.shape))] = self.tensors[part.name.format(layer=layer)]
        return take(whole, index)


def as_transformers_model(checkpoint: Checkpoint):
    """A checkpoint as a transformers model in memory, in the checkpoint's number format."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config_from_shape(checkpoint.shape, original_config(companions_of(checkpoint)))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=checkpoint.dtype)
    tensors = {n: read_hf_tensor(checkpoint, p, part, layer) for n, _, p, part, layer in hf_tensors(checkpoint.shape)}
    if checkpoint.shape.tied:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model.eval()
