"""Scales of the KV cache: those of what transformers caches for the same tokens, and what reads them when exported."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, DynamicCache

from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.calibration import Scheme
from minitron_megatron.config.quantize import KVCache, QuantizeConfig, QuantizeMethod
from minitron_megatron.config.schema import DataConfig, DType, ExportConfig, InspectConfig, PruneConfig, TargetConfig
from minitron_megatron.data.samples import training_samples
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.errors import ConfigError, DataError
from minitron_megatron.model.layers import DENSE
from minitron_megatron.pruning.prune import prune
from minitron_megatron.report.inspect import inspect
from minitron_megatron.sparsity.quantize import quantize
from minitron_megatron.training import distill
from tests.distributed import distilling
from tests.in_memory import as_transformers_model
from tests.tiny import FAMILIES, hf_model, import_hf, literate, random_scores

SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
SAMPLES = 6  # of which the last micro-batch is not full
LARGEST = 448  # of 8-bit floats (e4m3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints of families with and without norms of keys, biases and partial rotary embeddings, and text."""
    folder = tmp_path_factory.mktemp("kv_cache")
    for family in ("llama", "qwen2", "qwen3", "nemotron"):
        model = hf_model(**{**FAMILIES[family], **SIZES})
        import_hf(folder / family, literate(model) if family == "llama" else model)  # which is distilled
    choose = random.Random(0)
    for number in range(20):
        (folder / f"{number}.txt").write_text("".join(choose.choice("abcdefgh") for _ in range(60)))
    return folder


def settings(folder, family, output, **changes):
    data = DataConfig([str(folder / f"{n}.txt") for n in range(20)], str(folder / "corpora"), 16, seed=1)
    config = QuantizeConfig(str(folder / family / "checkpoint"), str(output), SAMPLES, dtype=DType.FP32, data=data)
    return replace(config, method=QuantizeMethod.RTN, kv_cache=KVCache.FP8, **changes)


@pytest.fixture(scope="module")
def rounded(folder):
    """By family: a quantised checkpoint with scales of its KV cache."""
    return {family: quantize(settings(folder, family, folder / f"{family}_q")) for family in ("llama", "qwen3")}


def calibration_tokens(config):
    corpus = prepare_corpus(config.data, Checkpoint(config.checkpoint).huggingface_folder)
    samples = training_samples(corpus, config.data, SAMPLES)
    return torch.stack([samples[number]["tokens"] for number in range(SAMPLES)])


def scales_of(folder):
    """Name in the checkpoint and scale, in the order of the layers, keys before values."""
    checkpoint = Checkpoint(folder)
    return {
        f"{param.layer}.{param.name}": checkpoint.read(param, [np.arange(1)]).item()
        for param in checkpoint.cache_scales
    }


@torch.no_grad()
def cached_by_transformers(model, tokens):
    """The largest keys and values of every layer over 448."""
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    return [float(x.abs().max()) / LARGEST for layer in cache.layers for x in (layer.keys, layer.values)]


CASES = {
    "llama": dict(method=QuantizeMethod.GPTQ),
    "qwen3": {},
    "qwen2": dict(sequential=False),
    "nemotron": dict(method=QuantizeMethod.GPTQ, sequential=False),
}


@pytest.mark.parametrize("family", CASES)
def test_scales_are_those_of_what_transformers_caches(family, folder, tmp_path):
    """With `sequential` the rounded network, whose layers get their inputs from rounded layers; else the source."""
    config = replace(settings(folder, family, tmp_path / "out", scheme=Scheme.W4A16), **CASES[family])
    found = scales_of(quantize(config))
    models = [as_transformers_model(Checkpoint(path)) for path in (config.checkpoint, config.output)]
    source, result = (cached_by_transformers(model, calibration_tokens(config)) for model in models)
    expected, other = (result, source) if config.sequential else (source, result)
    assert len(found) == 8 and [*found][:2] == [
        "0.self_attention.key_cache_scale",
        "0.self_attention.value_cache_scale",
    ]
    assert [*found.values()] == pytest.approx(expected, rel=1e-5)
    assert [*found.values()] != pytest.approx(other, rel=1e-3)


class Rounding(DynamicCache):
    """A cache of 8-bit floats."""

    def update(self, keys, values, layer, *args, **kwargs):
        pair = [self.rounded(x, scale) for x, scale in zip((keys, values), self.scales[layer], strict=True)]
        return super().update(*pair, layer, *args, **kwargs)

    def rounded(self, x, scale):
        return (x / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype) * scale


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@torch.no_grad()
def test_transformers_reads_the_exported_scales(family, rounded, folder, tmp_path, caplog):
    packed = export(ExportConfig(str(rounded[family]), str(tmp_path / "packed")))
    scheme = json.loads((packed / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]
    known = dict(num_bits=8, type="float", strategy="tensor", symmetric=True, dynamic=False)
    assert {name: scheme[name] for name in known} == known
    expected = torch.tensor([*scales_of(rounded[family]).values()]).view(-1, 2)
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
    with safe_open(packed / "model.safetensors", framework="pt") as file:
        for number, pair in enumerate(expected):
            for name, scale in zip(("k_scale", "v_scale"), pair, strict=True):
                stored = file.get_tensor(f"model.layers.{number}.self_attn.{name}")
                assert stored.dtype is torch.float32 and stored.shape == (1,) and stored == scale
                assert getattr(model.model.layers[number].self_attn, name) == scale
    assert "8 scales, one for the keys and one for the values of each layer" in (packed / "README.md").read_text()

    plain = export(ExportConfig(str(rounded[family]), str(tmp_path / "plain"), packed=False))
    assert "leaves the scales of the KV cache out" in caplog.text
    assert "KV cache" not in (plain / "README.md").read_text()
    unpacked = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)
    tokens, cache = calibration_tokens(settings(folder, family, "")), Rounding(config=unpacked.config)
    cache.scales = expected
    found, dense = model(tokens).logits, unpacked(tokens).logits
    wanted = unpacked(tokens, past_key_values=cache).logits
    assert (found - wanted).norm() < 1e-5 * wanted.norm() < (found - dense).norm() < 0.1 * dense.norm()


def test_verbs_that_change_what_is_cached_leave_its_scales_out(rounded, folder, tmp_path, caplog, capsys):
    inspect(InspectConfig(str(rounded["llama"])))
    shown = capsys.readouterr().out
    assert "8 scales for 8-bit floats" in shown and "kv_cache: fp8" in shown
    assert Checkpoint(rounded["llama"]).manifest.details["kv_cache"] == "fp8"

    random_scores(tmp_path / "scores", Checkpoint(rounded["llama"]).network)
    target = TargetConfig(heads=2)
    small = prune(PruneConfig(str(rounded["llama"]), str(tmp_path / "small"), str(tmp_path / "scores"), target=target))
    assert not Checkpoint(small).companions and "those of its KV cache are left out" in caplog.text

    config = replace(distilling.settings(folder / "llama", tmp_path / "run"), student=str(rounded["llama"]))
    distill.distill(replace(config, data=settings(folder, "llama", "").data))
    assert not Checkpoint(tmp_path / "run").companions and "which training makes wrong" in caplog.text


def test_what_has_no_scales_is_refused(folder, tmp_path, monkeypatch):
    config = settings(folder, "llama", tmp_path / "out")
    monkeypatch.setattr(DENSE[0], "cached", ())
    with pytest.raises(ConfigError, match="kv_cache = fp8: layer 0's attention caches something that cannot have one"):
        quantize(config)


def test_keys_that_are_not_finite_are_an_error(folder, tmp_path, monkeypatch):
    read = Checkpoint.read

    def with_a_fault(self, param, index):
        tensor = read(self, param, index)
        return tensor * torch.inf if param.name.endswith("k_layernorm.weight") and param.layer == 1 else tensor

    monkeypatch.setattr(Checkpoint, "read", with_a_fault)
    with pytest.raises(DataError, match=r"what layer 1 caches is not finite \(self_attention\.key_cache_scale\)"):
        quantize(settings(folder, "qwen3", tmp_path / "out"))
