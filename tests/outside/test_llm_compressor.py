"""SparseGPT and Wanda beside llm-compressor's: the same masks but for weights that are all but equal, and errors alike.

llm-compressor wants versions of its own, so it runs in an interpreter of its own, which `LLM_COMPRESSOR_PYTHON` names.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.huggingface import hf_tensors, read_hf_tensor
from minitron_megatron.config.schema import DType, ParallelConfig
from minitron_megatron.config.sparsify import SparsifyConfig, SparsifyMethod
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.sparsity.layerwise import solve
from minitron_megatron.sparsity.sparsify import sparsification
from tests.tiny import LLAMA, hf_model, import_hf

INTERPRETER = os.environ.get("LLM_COMPRESSOR_PYTHON")
pytestmark = pytest.mark.skipif(
    INTERPRETER is None, reason="LLM_COMPRESSOR_PYTHON names no interpreter that has llm-compressor"
)

SIZES = dict(hidden_size=128, intermediate_size=256, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
SAMPLES, LENGTH = 16, 64
COMMON = dict(targets=["Linear"], ignore=["lm_head"])
RECIPES = {
    "sparsegpt": ["SparseGPTModifier", dict(sparsity=0.5, mask_structure="2:4", dampening_frac=0.01, **COMMON)],
    "wanda": ["WandaPruningModifier", dict(sparsity=0.5, mask_structure="2:4", **COMMON)],
}
METHODS = {"sparsegpt": SparsifyMethod.SPARSEGPT, "wanda": SparsifyMethod.WANDA}


class Tokens:
    """The calibration set, as samples."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(0, LLAMA["vocab_size"], (SAMPLES, LENGTH), generator=generator)

    def __len__(self):
        return SAMPLES

    def __getitem__(self, index):
        tokens = self.tokens[index]
        return {"tokens": tokens, "loss_mask": torch.ones(LENGTH), "position_ids": torch.arange(LENGTH)}


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The imported model, and by recipe the weights that llm-compressor makes of it."""
    folder = tmp_path_factory.mktemp("compressed")
    checkpoint = import_hf(folder, hf_model(**{**LLAMA, **SIZES}))
    asked = {"folder": str(folder / "hf"), "tokens": Tokens().tokens.tolist(), "recipes": RECIPES}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [INTERPRETER, Path(__file__).with_name("compress.py"), folder]
    subprocess.run(command, input=json.dumps(asked), text=True, env=environment, check=True)
    return checkpoint, {name: load_file(folder / f"{name}.safetensors") for name in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES)
def test_masks_and_weights_are_llm_compressors(recipe, theirs, tmp_path):
    source, weights = Checkpoint(theirs[0]), theirs[1][recipe]
    config = SparsifyConfig(
        str(source.root),
        "unused",
        num_samples=SAMPLES,
        method=METHODS[recipe],
        refit=False,
        by_activation=False,
        dtype=DType.FP32,
    )
    with parallel_context(ParallelConfig()) as ctx:
        solved = solve(config, source, Tokens(), sparsification(config, source), tmp_path / "work", ctx)
    same = count = 0
    for name, _, param, part in hf_tensors(source.network):
        if not param.matmul or param.position is None:
            continue
        ours, dense = read_hf_tensor(solved, param, part), read_hf_tensor(source, param, part)
        same += int(((ours == 0) == (weights[name] == 0)).sum())
        count += ours.numel()
        changes = [(found - dense).norm() for found in (ours, weights[name])]
        assert abs(changes[0] - changes[1]) <= 0.01 * changes[1], name
    assert same / count >= 0.998
