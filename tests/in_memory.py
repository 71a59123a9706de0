"""Weights in memory, in and out: what stands between transformers' models and ours without a file."""

from collections.abc import Mapping

import numpy as np
import torch

from minitron_megatron.checkpoint.convert import hf_assets_of
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.hf_assets import original_config
from minitron_megatron.checkpoint.huggingface import hf_tensors, read_hf_tensor
from minitron_megatron.checkpoint.source import take
from minitron_megatron.model.axes import Param
from minitron_megatron.model.families import config_from_network
from minitron_megatron.model.network import Network


class StateDict:
    """Weights in memory under Hugging Face names, as a source."""

    def __init__(self, network: Network, tensors: Mapping[str, torch.Tensor]):
        self.network = network
        self.tensors = tensors
        self.dtype = tensors["model.embed_tokens.weight"].dtype

    def read(self, param: Param, index: list[np.ndarray]) -> torch.Tensor:
        whole = torch.zeros(param.shape, dtype=self.dtype)
        for part in param.parts:
            rows = param.hf_rows(part, self.network.vocab_size)
            whole[torch.from_numpy(rows)] = self.tensors[param.hf_name(part)]
        return take(whole, index)


def as_transformers_model(checkpoint: Checkpoint):
    """A checkpoint as a transformers model in memory, in the checkpoint's number format."""
    from transformers import AutoConfig, AutoModelForCausalLM

    values = config_from_network(checkpoint.network, original_config(hf_assets_of(checkpoint)))
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    model = AutoModelForCausalLM.from_config(config, dtype=checkpoint.dtype)
    tensors = {n: read_hf_tensor(checkpoint, p, part) for n, _, p, part in hf_tensors(checkpoint.network)}
    if checkpoint.network.tie_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors, strict=True)
    return model.eval()
