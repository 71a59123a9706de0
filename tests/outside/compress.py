"""Run by an interpreter that has llm-compressor: sparsifies or quantises a Hugging Face folder in one shot.

On standard input is JSON: `{"folder": ..., "tokens": [[token, ...], ...], "recipes": {name: [modifier, {arguments},
sequential]}, "dtype": ..., "threads": ...}`. Below the folder that the argument names, each recipe's weights are
written to `NAME.safetensors`, and to `NAME.json` the seconds from the folder to these weights in memory, and the
largest resident memory of this process until then.
"""

import json
import sys
import time
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


def compress(asked: dict, modifier: str, arguments: dict, sequential: bool) -> dict[str, torch.Tensor]:
    folder, tokens = asked["folder"], asked["tokens"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=asked["dtype"])
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


def peak_bytes() -> int:
    """The largest resident set of this process (Linux): anonymous memory and pages of mapped files."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    asked, output = json.load(sys.stdin), Path(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    for name, recipe in asked["recipes"].items():
        started = time.perf_counter()
        weights = compress(asked, *recipe)
        found = {"seconds": time.perf_counter() - started, "peak_gb": peak_bytes() / 1e9}
        (output / f"{name}.json").write_text(json.dumps(found))
        save_file(weights, output / f"{name}.safetensors")
