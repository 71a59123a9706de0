"""Checkpoints of a Megatron-LM run are scored, pruned and exported, by the args that it saves beside them."""

import json
import random
import shutil

import pytest
import torch
from megatron.core import dist_checkpointing

from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import TRACKER, Checkpoint
from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.schema import (
    DataConfig,
    DistillConfig,
    ExportConfig,
    ParallelConfig,
    PruneConfig,
    ScoreConfig,
    TargetConfig,
)
from minitron_megatron.errors import CheckpointError, UnsupportedModelError
from minitron_megatron.model.families import network_from_config
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.pruning.prune import prune
from minitron_megatron.pruning.score import score
from minitron_megatron.training.distill import distill
from tests.tiny import LLAMA, QWEN2, QWEN3, hf_model, import_hf
from tests.unit.checkpoint.megatron_lm import TOKENS, copy_of, logits_of_folder, megatron_model
from tests.unit.checkpoint.plain import logits_of


@pytest.mark.parametrize("marker", ["100", "release"])
@pytest.mark.parametrize("given", ["beside the weights", "by name"])
def test_a_run_of_megatron_lm_is_exported(given, marker, trained, tokenizer, tmp_path):
    root, expected = trained
    root = copy_of(root, tmp_path / "run")
    if marker == "release":
        (root / "iter_0000100").rename(root / "release")
        (root / TRACKER).write_text("release\n")
    if given == "beside the weights":
        shutil.copytree(tokenizer, root / "huggingface")
        assert Checkpoint(root).network == network_from_config(LLAMA)
    named = str(tokenizer) if given == "by name" else None
    folder = export(ExportConfig(str(root), str(tmp_path / "out"), huggingface=named))
    torch.testing.assert_close(logits_of_folder(folder), expected[..., :101], rtol=1e-4, atol=1e-4)


def test_from_megatron_lm_to_a_smaller_hugging_face_model(trained, tokenizer, tmp_path):
    """Scored, pruned and exported: as transformers prunes the same weights, by the plan; and without the manifest."""
    root = copy_of(trained[0], tmp_path / "run")
    shutil.copytree(tokenizer, root / "huggingface")
    text = tmp_path / "text.jsonl"
    choose = random.Random(0)
    lines = ["".join(choose.choice("abcdefgh") for _ in range(80)) for _ in range(60)]
    text.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    data = DataConfig(text=[str(text)], cache_dir=str(tmp_path / "cache"), sequence_length=16, heldout_pct=20)
    score(ScoreConfig(str(root), str(tmp_path / "scores"), data=data, num_samples=4, micro_batch=2))
    target = TargetConfig(layers=3, hidden=40, ffn=30, heads=4)
    pruned = prune(PruneConfig(str(root), str(tmp_path / "pruned"), str(tmp_path / "scores"), target=target))
    network = Checkpoint(pruned).network
    expected = logits_of_folder(export(ExportConfig(str(pruned), str(tmp_path / "out"))))
    attention, mlp = network.sublayers[:2]
    assert expected.shape == (2, 30, 101) and network.has_equal_layers
    assert (network.hidden_size, mlp.ffn_hidden_size, attention.num_heads) == (40, 30, 4)
    # Megatron-Core itself, from the args alone.
    (pruned / "manifest.json").unlink()
    assert Checkpoint(pruned).network == network
    found = logits_of_folder(export(ExportConfig(str(pruned), str(tmp_path / "again"))))
    assert torch.equal(found, expected)
    with parallel_context(ParallelConfig()):
        model = megatron_model(Checkpoint(pruned).megatron_args())
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(Checkpoint(pruned).folder))
        model.load_state_dict(state["model"], strict=True)
        torch.testing.assert_close(logits_of(model, TOKENS)[..., :101], expected, rtol=1e-4, atol=1e-4)
    # Trained on, and its manifest gone as well.
    loss = LossConfig(kd_logits_weight=0.0, lm_weight=1.0)
    settings = DistillConfig(None, str(tmp_path / "pruned"), str(tmp_path / "distilled"), data=data, loss=loss)
    settings.steps, settings.global_batch, settings.micro_batch = 2, 2, 2
    settings.optimizer.warmup_steps = 0
    checkpoints = distill(settings) / "checkpoints"
    expected = logits_of_folder(export(ExportConfig(str(checkpoints), str(tmp_path / "third"))))
    (checkpoints / "manifest.json").unlink()
    assert torch.equal(logits_of_folder(export(ExportConfig(str(checkpoints), str(tmp_path / "fourth")))), expected)


def test_without_a_tokenizer_it_is_said_how_to_give_one(trained, tokenizer, tmp_path):
    root, output = copy_of(trained[0], tmp_path / "run"), str(tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"put the tokenizer's files .* or name a folder .* huggingface=FOLDER"):
        export(ExportConfig(str(root), output))
    # Another model's.
    other = json.loads((tokenizer / "config.json").read_text()) | {"model_type": "nemotron"}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps(other))
    no_nemotron = r"not a nemotron network \(network.norm = .*, network.norm_zero_centered = False, mlp.activation = "
    with pytest.raises(UnsupportedModelError, match=no_nemotron):
        export(ExportConfig(str(root), output, huggingface=str(tmp_path / "other")))
    (tmp_path / "other/config.json").write_text(json.dumps(other | {"vocab_size": 1000, "model_type": "llama"}))
    with pytest.raises(CheckpointError, match="1000 tokens, and the checkpoint an embedding table of 128 rows"):
        export(ExportConfig(str(root), output, huggingface=str(tmp_path / "other")))


def test_a_config_is_written_where_there_is_none(trained, tokenizer, tmp_path):
    root, expected = trained
    (tmp_path / "words").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, tmp_path / "words" / name)
    folder = export(ExportConfig(str(root), str(tmp_path / "out"), huggingface=str(tmp_path / "words")))
    torch.testing.assert_close(logits_of_folder(folder), expected[..., :101], rtol=1e-4, atol=1e-4)


def test_the_tokenizer_that_a_run_saved_is_found(trained, tokenizer, tmp_path):
    """As `--save-tokenizer-assets` and Megatron-Bridge save it. One that is put beside the weights goes before it."""
    root, expected = copy_of(trained[0], tmp_path / "run"), trained[1]
    words = root / "iter_0000100/tokenizer"
    words.mkdir()
    shutil.copy(tokenizer / "tokenizer_config.json", words)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    token, last = max(content["model"]["vocab"].items(), key=lambda item: item[1])
    content["model"]["vocab"][token] = last + 4  # ids may have gaps
    (words / "tokenizer.json").write_text(json.dumps(content))
    count = 1 + max([last + 4, *(added["id"] for added in content["added_tokens"])])
    assert Checkpoint(root).network.vocab_size == count
    folder = export(ExportConfig(str(root), str(tmp_path / "out")))
    torch.testing.assert_close(logits_of_folder(folder), expected[..., :count], rtol=1e-4, atol=1e-4)
    shutil.copytree(tokenizer, root / "huggingface")
    assert Checkpoint(root).network.vocab_size == 101


@pytest.mark.parametrize("config", [QWEN2, QWEN3], ids=["qwen2", "qwen3"])
def test_megatron_lm_builds_by_the_args_what_was_imported(config, tmp_path):
    hf = hf_model(**config)
    checkpoint = Checkpoint(import_hf(tmp_path, hf))
    with parallel_context(ParallelConfig()), torch.no_grad():
        model = megatron_model(checkpoint.megatron_args())
        state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint.folder))
        model.load_state_dict(state["model"], strict=True)
        torch.testing.assert_close(logits_of(model, TOKENS)[..., :101], hf(TOKENS).logits, rtol=1e-4, atol=1e-4)
