"""Run by an interpreter that has llm-compressor: sparsifies or quantises a Hugging Face folder in one shot.

On standard input is JSON: `{"folder": ..., "tokens": [[token, ...], ...], "recipes": {name: [modifier, {arguments},
sequential]}}`. Below the folder that the argument names, each recipe's weights are written to `NAME.safetensors`.
"""

import json
import sys
from importlib import import_module
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

MODULES = {
    "SparseGPTModifier": "llmcompressor.modifiers.pruning",
    "WandaPruningModifier": "llmcompressor.modifiers.pruning",
    "GPTQModifier": "llmcompressor.modifiers.gptq",
}


def compress(
    folder: str, tokens: list[list[int]], modifier: str, arguments: dict, sequential: bool
) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    texts = Dataset.from_dict({"input_ids": tokens, "attention_mask": [[1] * len(row) for row in tokens]})
    recipe = getattr(import_module(MODULES[modifier]), modifier)(**arguments)
    oneshot(
        model=model,
        processor=AutoTokenizer.from_pretrained(folder),
        dataset=texts,
        recipe=[recipe],
        num_calibration_samples=len(tokens),
        max_seq_length=len(tokens[0]),
        shuffle_calibration_samples=False,
        propagate_error=sequential,
        log_dir=None,
    )
    return {name: value.detach().contiguous() for name, value in model.named_parameters() if "layers." in name}


if __name__ == "__main__":
    asked, output = json.load(sys.stdin), Path(sys.argv[1])
    torch.set_num_threads(1)
    for name, recipe in asked["recipes"].items():
        save_file(compress(asked["folder"], asked["tokens"], *recipe), output / f"{name}.safetensors")
