"""What is exported, served by vLLM: the log-probabilities and greedy tokens of transformers, for every family.

vLLM wants versions of its own, so it runs in an interpreter of its own, which `VLLM_PYTHON` names.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.schema import ExportConfig, PruneConfig, TargetConfig
from minitron_megatron.pruning.prune import prune
from tests.tiny import FAMILIES, LLAMA, hf_model, import_hf, random_scores

INTERPRETER = os.environ.get("VLLM_PYTHON")
pytestmark = pytest.mark.skipif(INTERPRETER is None, reason="VLLM_PYTHON names no interpreter that has vLLM")

# Heads of a size that vLLM's attention on the CPU has.
SIZES = dict(hidden_size=192, intermediate_size=160, head_dim=32)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16)
CONFIGS = {
    **FAMILIES,
    "llama3 rope": {**LLAMA, "rope_parameters": {"rope_type": "llama3", "rope_theta": 500.0, **LLAMA3}},
}
TARGETS = {
    "whole": None,
    "depth and ffn": TargetConfig(layers=3, ffn=96),
    "every axis": TargetConfig(layers=3, hidden=150, ffn=96, heads=4),
}
NEW_TOKENS = 16


def prompts() -> torch.Tensor:
    return torch.randint(0, LLAMA["vocab_size"], (3, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """By family and target: the exported folder, and what vLLM says of it."""
    folders = {}
    for family, config in CONFIGS.items():
        root = tmp_path_factory.mktemp(family)
        checkpoint = import_hf(root, hf_model(**config | SIZES))
        random_scores(root / "scores", Checkpoint(checkpoint).network)
        for name, target in TARGETS.items():
            source = checkpoint
            if target is not None:
                source = prune(PruneConfig(str(checkpoint), str(root / name), str(root / "scores"), target=target))
            folders[family, name] = export(ExportConfig(str(source), str(root / f"{name}, exported")))
    asked = {"folders": [*map(str, folders.values())], "prompts": prompts().tolist(), "new_tokens": NEW_TOKENS}
    answer = tmp_path_factory.mktemp("answer") / "served.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [INTERPRETER, Path(__file__).with_name("serve.py"), answer]
    subprocess.run(command, input=json.dumps(asked), text=True, env=environment, check=True)
    found = json.loads(answer.read_text())
    return {key: (folder, found[str(folder)]) for key, folder in folders.items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", CONFIGS)
def test_vllm_says_what_transformers_says(served, family, target):
    folder, found = served[family, target]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens = prompts()
    expected = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    logprobs = torch.tensor([prompt["logprobs"] for prompt in found])
    assert expected.std() > 0.3  # or the tolerance below would say little
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-4)

    # With a mask, or a token that is the padding's would be taken for it.
    settings = dict(attention_mask=torch.ones_like(tokens), do_sample=False, eos_token_id=None)
    generated = model.generate(tokens, max_new_tokens=NEW_TOKENS, **settings)[:, tokens.shape[1] :].tolist()
    assert [prompt["tokens"] for prompt in found] == generated
    texts = AutoTokenizer.from_pretrained(folder).batch_decode(generated, skip_special_tokens=True)
    assert [prompt["text"].strip() for prompt in found] == texts
