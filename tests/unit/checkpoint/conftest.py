"""A checkpoint of Megatron-LM, and the Hugging Face folder of the model that its run began with."""

import pytest
import torch
from megatron.core import dist_checkpointing

from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.parallel.context import parallel_context
from tests.tiny import LLAMA, hf_model, save_hf
from tests.unit.checkpoint.megatron_lm import TOKENS, train_and_save
from tests.unit.checkpoint.plain import logits_of


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A checkpoint of Megatron-LM, and what its model makes of `TOKENS`."""
    root = tmp_path_factory.mktemp("run") / "checkpoints"
    with parallel_context(ParallelConfig()):
        model = train_and_save(root)
        folder = root / "iter_0000100"
        if not (folder / "common.pt").exists():  # where Megatron-Core 0.16 keeps the args, and 0.19 does not
            torch.save(dist_checkpointing.load_common_state_dict(str(folder)), folder / "common.pt")
        return root, logits_of(model, TOKENS)


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    """A Hugging Face folder of the model that the run began with."""
    return save_hf(tmp_path_factory.mktemp("hf"), hf_model(**LLAMA))
