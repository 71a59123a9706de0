"""Hugging Face folders in and out: every tensor bit for bit, and the same network."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.convert import export, import_checkpoint
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.checkpoint.hf_assets import copy_hf_assets
from minitron_megatron.checkpoint.huggingface import HuggingFaceFolder
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.schema import DType, ExportConfig, ImportConfig, ParallelConfig
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.parameters import parameters
from minitron_megatron.parallel.context import parallel_context
from tests.in_memory import StateDict, as_transformers_model
from tests.tiny import LLAMA, NEMOTRON, QWEN2, QWEN3, SEED_OSS, hf_model, save_hf

INDEX = "model.safetensors.index.json"
ALIGNED = {**LLAMA, "vocab_size": 128}  # no padding rows
TIED = {**LLAMA, "tie_word_embeddings": True}
MISTRAL = {**LLAMA, "model_type": "mistral", "hidden_size": 46, "sliding_window": None}


def weights(folder):
    """All tensors of a Hugging Face folder, and the number of files they lie in."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}, len(files)


def shard(folder, num_files=5):
    """Cut the weights of a folder into several files, its tensors dealt out in turn."""
    tensors, _ = weights(folder)
    (folder / "model.safetensors").unlink()
    files = {f"part-{i}.safetensors": list(tensors)[i::num_files] for i in range(num_files)}
    for file, names in files.items():
        save_file({name: tensors[name] for name in names}, folder / file)
    weight_map = {name: file for file, names in files.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def logits(model, tokens):
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize(
    "config, dtype, sharded",
    [
        pytest.param(LLAMA, torch.float32, True, marks=pytest.mark.oldest),
        (ALIGNED, torch.bfloat16, False),
        (TIED, torch.bfloat16, True),
        (NEMOTRON, torch.float32, False),
        (MISTRAL, torch.bfloat16, True),
        ({**QWEN2, "head_dim": 8}, torch.bfloat16, True),
        (QWEN3, torch.float16, False),
        (SEED_OSS, torch.bfloat16, False),
    ],
    ids=["llama", "llama without padding", "tied llama", "nemotron", "mistral", "qwen2", "qwen3", "seed_oss"],
)
def test_import_and_export_give_back_every_tensor_bit_for_bit(config, dtype, sharded, tmp_path):
    source = save_hf(tmp_path / "hf", hf_model(**config).to(dtype))
    if sharded:
        shard(source)
    import_checkpoint(ImportConfig(str(source), str(tmp_path / "checkpoint")))
    max_shard_gb = 3e-5 if sharded else 5.0
    target = export(ExportConfig(str(tmp_path / "checkpoint"), str(tmp_path / "exported"), max_shard_gb))

    expected, _ = weights(source)
    found, num_files = weights(target)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == dtype and torch.equal(found[name], tensor), name
    assert num_files > 3 if sharded else num_files == 1
    if sharded:
        index = json.loads((target / INDEX).read_text())
        assert index["weight_map"].keys() == expected.keys()
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        sizes = [sum(t.nbytes for t in load_file(file).values()) for file in target.glob("*.safetensors")]
        assert max(sizes) <= 3e4

    # Its config describes the same network, in the file's own number format.
    tokens = torch.randint(0, config["vocab_size"], (2, 20), generator=torch.Generator().manual_seed(0))
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (source, target))
    assert after.dtype == dtype and type(after) is type(before)
    assert torch.equal(logits(after, tokens), logits(before, tokens))
    in_memory = as_transformers_model(Checkpoint(tmp_path / "checkpoint"))
    assert in_memory.dtype == dtype and torch.equal(logits(in_memory, tokens), logits(before, tokens))


@pytest.mark.parametrize("config", [LLAMA, NEMOTRON], ids=["llama", "nemotron"])
def test_any_positions_are_read_from_a_folder(config, tmp_path):
    """Rows of fused parameters lie in several of its tensors, and those that pad the vocabulary in none."""
    model = hf_model(**config)
    network = network_from_config(model.config.to_dict())
    in_memory, folder = StateDict(network, model.state_dict()), HuggingFaceFolder(save_hf(tmp_path / "hf", model))
    generator = np.random.default_rng(0)
    for param in parameters(network):
        size = param.shape
        whole = in_memory.read(param, [np.arange(n) for n in size])
        for start in (0, size[0] // 3, size[0] - 1):
            columns = [np.sort(generator.choice(n, n // 2, replace=False)) for n in size[1:]]
            index = [np.arange(start, size[0], 2), *columns]
            expected = whole[tuple(torch.from_numpy(i) for i in np.ix_(*index))]
            assert torch.equal(folder.read(param, index), expected), (param.name, param.layer)


def test_tokenizer_and_settings_travel_and_code_does_not(tmp_path):
    source = save_hf(tmp_path / "hf", hf_model(**LLAMA))
    for name in ("modeling_custom.py", "training_args.bin"):
        (source / name).write_text("print('hello')")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "eos_token_id": 7}))
    import_checkpoint(ImportConfig(str(source), str(tmp_path / "checkpoint")))
    target = export(ExportConfig(str(tmp_path / "checkpoint"), str(tmp_path / "exported")))
    small = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in target.iterdir()} == small | {"model.safetensors", "manifest.json", "README.md"}
    assert (target / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    assert AutoConfig.from_pretrained(target).eos_token_id == 7


def test_import_converts_to_the_number_format_that_is_asked_for(tmp_path):
    model = hf_model(**LLAMA)
    source = save_hf(tmp_path / "hf", model)
    import_checkpoint(ImportConfig(str(source), str(tmp_path / "checkpoint"), DType.BF16))
    found, _ = weights(export(ExportConfig(str(tmp_path / "checkpoint"), str(tmp_path / "exported"))))
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor.to(torch.bfloat16)), name


def test_a_llama_whose_width_is_no_multiple_of_the_heads_is_exported_as_mistral(tmp_path):
    """As a width-pruned Llama may be. The original config still says llama."""
    theirs = hf_model(**MISTRAL)
    network = network_from_config(theirs.config.to_dict())
    source = StateDict(network, theirs.state_dict())
    copy_hf_assets(save_hf(tmp_path / "llama", hf_model(**LLAMA)), tmp_path / "companions")
    write_checkpoint(tmp_path / "c", source, torch.float32, Manifest("checkpoint"), tmp_path / "companions")
    target = export(ExportConfig(str(tmp_path / "c"), str(tmp_path / "exported")))
    exported = AutoModelForCausalLM.from_pretrained(target)
    assert exported.config.model_type == "mistral"
    tokens = torch.randint(0, 101, (2, 20), generator=torch.Generator().manual_seed(0))
    assert torch.equal(logits(exported, tokens), logits(theirs, tokens))
    with parallel_context(ParallelConfig()) as ctx, torch.no_grad():
        [ours] = build_model(network, ctx, DType.FP32)
        load_weights([ours], Checkpoint(tmp_path / "c"), ctx)
        found = ours(tokens, torch.arange(20).expand(2, -1), attention_mask=None)[..., :101]
    torch.testing.assert_close(found, logits(exported, tokens), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A sharded Hugging Face folder, copied for each test that damages it."""
    original = save_hf(tmp_path_factory.mktemp("hf") / "hf", hf_model(**LLAMA))
    shard(original)
    return lambda tmp_path: shutil.copytree(original, tmp_path / "hf")


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-100])


def forget(path, name):
    """Drop a tensor from its file and leave it in the index."""
    save_file({n: t for n, t in load_file(path).items() if n != name}, path)


def reindex(folder, **changes):
    index = json.loads((folder / INDEX).read_text())
    weight_map = {n: f for n, f in {**index["weight_map"], **changes}.items() if f}
    (folder / INDEX).write_text(json.dumps({**index, "weight_map": weight_map}))


def reconfigure(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda f: (f / "part-2.safetensors").unlink(), "part-2.safetensors is missing"),
        (lambda f: cut_short(f / "part-2.safetensors"), "part-2.safetensors is not a whole safetensors file"),
        (lambda f: (f / INDEX).unlink(), f"neither model.safetensors nor {INDEX}"),
        (lambda f: (f / INDEX).write_text("{"), f"{INDEX} is not a whole index"),
        (lambda f: (f / "config.json").unlink(), "is not a Hugging Face folder: it has no config.json"),
        (lambda f: (f / "config.json").write_text('{"model_'), "config.json is not the whole config of a model"),
        (lambda f: (f / "config.json").write_text('{"model_type": "llama"}'), "config of a model: KeyError('num_att"),
        (lambda f: reindex(f, **{"model.norm.weight": None}), "missing: model.norm.weight [48]"),
        (lambda f: forget(f / "part-0.safetensors", "lm_head.weight"), "missing: lm_head.weight [101, 48]"),
        (lambda f: reindex(f, **{"lm_head.weight": None, "head": "part-0.safetensors"}), "missing: lm_head.weight"),
        (lambda f: reconfigure(f, hidden_size=54), "embed_tokens.weight is [101, 48], the config says [101, 54]"),
        (lambda f: reconfigure(f, tie_word_embeddings=True, num_hidden_layers=3), "unknown: model.layers.3.mlp.up"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_folder_that_is_not_whole_is_named(damage, named, folder_of, tmp_path):
    folder = folder_of(tmp_path)
    damage(folder)
    with pytest.raises(CheckpointError) as raised:
        import_checkpoint(ImportConfig(str(folder), str(tmp_path / "output")))
    assert named in str(raised.value)
    assert not (tmp_path / "output").exists()


def test_of_many_problems_ten_are_shown_and_the_rest_counted(folder_of, tmp_path):
    folder = folder_of(tmp_path)
    reconfigure(folder, num_hidden_layers=40)
    with pytest.raises(CheckpointError) as raised:
        import_checkpoint(ImportConfig(str(folder), str(tmp_path / "output")))
    first, *lines = str(raised.value).splitlines()
    assert first.endswith("does not hold the network of its config:")
    assert len(lines) == 11 and lines[10] == f"  and {36 * 9 - 10} more"


def test_an_undamaged_folder_imports(folder_of, tmp_path):
    assert Checkpoint(import_checkpoint(ImportConfig(str(folder_of(tmp_path)), str(tmp_path / "output"))))


def test_export_without_a_tokenizer_says_what_to_do(tmp_path):
    model = hf_model(**LLAMA)
    source = StateDict(network_from_config(model.config.to_dict()), model.state_dict())
    write_checkpoint(tmp_path / "c", source, torch.float32, Manifest("checkpoint"), None)
    with pytest.raises(CheckpointError, match=r"put the tokenizer's files and config.json .* into .*/c/huggingface"):
        export(ExportConfig(str(tmp_path / "c"), str(tmp_path / "exported")))
