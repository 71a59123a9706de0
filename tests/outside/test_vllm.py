"""What is exported, served by vLLM: the log-probabilities and greedy tokens of transformers, for every family; and of
what is quantised or sparse, the log-probabilities of its weights unpacked.

vLLM wants versions of its own, so it runs in an interpreter of its own, which `VLLM_PYTHON` names.
"""

import json
import os
import random
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_megatron.checkpoint.convert import export, import_checkpoint
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.calibration import Scheme
from minitron_megatron.config.quantize import KVCache, QuantizeConfig, QuantizeMethod
from minitron_megatron.config.schema import DataConfig, DType, ExportConfig, ImportConfig, PruneConfig, TargetConfig
from minitron_megatron.config.sparsify import SparsifyConfig
from minitron_megatron.pruning.prune import prune
from minitron_megatron.sparsity.patterns import NofM, broken_groups
from minitron_megatron.sparsity.quantize import quantize
from minitron_megatron.sparsity.sparsify import sparsify
from tests.tiny import FAMILIES, LLAMA, hf_model, import_hf, random_scores, save_hf

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


def ask(folders: dict[Path, str], temporary: Path) -> dict[str, list[dict]]:
    """What vLLM says of folders, each in a number format; see `serve.py`."""
    own = {str(folder): dtype for folder, dtype in folders.items()}
    asked = {"folders": own, "prompts": prompts().tolist(), "new_tokens": NEW_TOKENS}
    answer = temporary / "served.json"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [INTERPRETER, Path(__file__).with_name("serve.py"), answer]
    subprocess.run(command, input=json.dumps(asked), text=True, env=environment, check=True)
    return json.loads(answer.read_text())


def logprobs_of(answers: list[dict]) -> torch.Tensor:
    return torch.tensor([prompt["logprobs"] for prompt in answers])


def logprobs_in_transformers(model) -> torch.Tensor:
    tokens = prompts()
    with torch.no_grad():
        return model(tokens).logits[:, :-1].float().log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


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
    answers = ask(dict.fromkeys(folders.values(), "float32"), tmp_path_factory.mktemp("answer"))
    return {key: (folder, answers[str(folder)]) for key, folder in folders.items()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", CONFIGS)
def test_vllm_says_what_transformers_says(served, family, target):
    folder, found = served[family, target]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokens, expected = prompts(), logprobs_in_transformers(model)
    assert expected.std() > 0.3  # or the tolerance below would say little
    torch.testing.assert_close(logprobs_of(found), expected, rtol=0, atol=1e-4)

    # With a mask, or a token that is the padding's would be taken for it.
    settings = dict(attention_mask=torch.ones_like(tokens), do_sample=False, eos_token_id=None)
    generated = model.generate(tokens, max_new_tokens=NEW_TOKENS, **settings)[:, tokens.shape[1] :].tolist()
    assert [prompt["tokens"] for prompt in found] == generated
    texts = AutoTokenizer.from_pretrained(folder).batch_decode(generated, skip_special_tokens=True)
    assert [prompt["text"].strip() for prompt in found] == texts


# Inputs and outputs in 32s, which vLLM's kernels take; groups of 128 are whole rows of all matrices but one.
PACKED_SIZES = dict(
    num_hidden_layers=2,
    hidden_size=128,
    intermediate_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)
# By name: the verb, its settings, and a number format that vLLM's kernel takes, float32 if it does.
PACKED = {
    "w4a16, groups of 32": (quantize, dict(scheme=Scheme.W4A16, group_size=32), "float16"),
    "w4a16, groups of 64": (quantize, dict(scheme=Scheme.W4A16, group_size=64), "float16"),
    "w4a16, groups of 128": (quantize, dict(scheme=Scheme.W4A16, group_size=128), "float16"),
    "w8a8": (quantize, dict(scheme=Scheme.W8A8), "bfloat16"),
    "fp8": (quantize, dict(scheme=Scheme.FP8), "float32"),
    "2:4": (sparsify, dict(), "float32"),
    "2:4, w4a16": (sparsify, dict(scheme=Scheme.W4A16), "float16"),
}


def unlike(model):
    """The model with rows and groups of columns of unlike size, so that a scale in a wrong place shows."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                rows, groups = len(weight), weight.shape[1] // 32
                weight.mul_((torch.randn(rows, 1) / 2).exp())
                weight.mul_((torch.randn(groups) / 2).exp().repeat_interleave(32))
    return model


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """By name: the packed folder, the same unpacked, and what vLLM says of the packed one."""
    root, folders = tmp_path_factory.mktemp("packed"), {}
    source = save_hf(root / "hf", unlike(hf_model(**LLAMA | PACKED_SIZES)))
    for dtype in (DType.FP32, DType.BF16):
        import_checkpoint(ImportConfig(str(source), str(root / dtype.value), dtype))
    choose = random.Random(0)
    lines = ["".join(chr(33 + choose.randrange(100)) for _ in range(100)) for _ in range(40)]
    (root / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = DataConfig([str(root / "text.jsonl")], str(root / "corpora"), 64)
    for name, (verb, settings, _) in PACKED.items():
        schema = QuantizeConfig if verb is quantize else SparsifyConfig
        checkpoint = root / (DType.FP32 if "scheme" in settings else DType.BF16).value
        made = verb(schema(str(checkpoint), str(root / name), 16, dtype=DType.FP32, data=data, **settings))
        folders[name] = export(ExportConfig(str(made), str(root / f"{name}, packed")))
        export(ExportConfig(str(made), str(root / f"{name}, unpacked"), packed=False))
    answers = ask({folders[name]: dtype for name, (*_, dtype) in PACKED.items()}, root)
    return {name: (folders[name], root / f"{name}, unpacked", answers[str(folders[name])]) for name in PACKED}


@pytest.mark.parametrize("name", PACKED)
def test_vllm_reads_what_is_packed(packed, name):
    """In the number format of vLLM's kernel, vLLM is about as far from the unpacked weights in float32 as transformers
    is, whose compressed-tensors rounds activations alike."""
    (folder, unpacked, answers), dtype = packed[name], getattr(torch, PACKED[name][2])
    exact = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.float32)
    expected, logprobs = logprobs_in_transformers(exact), logprobs_of(answers)
    alike = logprobs_in_transformers(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    assert expected.std() > 0.3
    assert (logprobs - expected).norm() <= 2 * (alike - expected).norm() + 1e-4
    if dtype is torch.float32:
        torch.testing.assert_close(logprobs, alike, rtol=0, atol=1e-3)
    if "2:4" in name:
        assert not any(broken_groups(weight, NofM(2, 4)) for key, weight in exact.named_parameters() if "_proj" in key)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_vllm_caches_keys_and_values_with_the_exported_scales(family, tmp_path):
    """Values are so large that with scales of 1, as without any, they would overflow."""
    model = hf_model(**CONFIGS[family] | SIZES)
    choice = random.Random(0).choice
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight.mul_(1000)
            layer.self_attn.o_proj.weight.div_(1000)
    checkpoint, texts = import_hf(tmp_path, model), [tmp_path / f"{number}.txt" for number in range(20)]
    for text in texts:
        text.write_text("".join(choice("abcdefgh") for _ in range(60)))
    data = DataConfig([*map(str, texts)], str(tmp_path / "corpora"), 16)
    nearest = dict(method=QuantizeMethod.RTN, kv_cache=KVCache.FP8, num_samples=8, data=data)
    rounded = quantize(QuantizeConfig(str(checkpoint), str(tmp_path / "rounded"), **nearest))
    scaled, ones = (export(ExportConfig(str(rounded), str(tmp_path / name))) for name in ("scaled", "ones"))
    tensors = load_file(ones / "model.safetensors")
    tensors |= {name: torch.ones(1) for name in tensors if name.endswith((".k_scale", ".v_scale"))}
    save_file(tensors, ones / "model.safetensors", metadata={"format": "pt"})

    plain = export(ExportConfig(str(rounded), str(tmp_path / "plain"), packed=False))
    tokens = prompts()
    expected = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(tokens).logits[:, :-1].log_softmax(-1)
    expected = expected.gather(-1, tokens[:, 1:, None])[..., 0]
    found = ask(dict.fromkeys((scaled, ones), "bfloat16"), tmp_path)
    errors = [(logprobs_of(found[str(own)]) - expected).norm() for own in (scaled, ones)]
    assert errors[0] < errors[1] / 3
