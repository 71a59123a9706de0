"""What Hugging Face folders look like: ties, prefixes, two sets of weights, number formats, and what is none."""

import json
import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_megatron.checkpoint.convert import export, import_checkpoint
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.schema import DType, ExportConfig, ImportConfig
from minitron_megatron.errors import CheckpointError, ConfigError, UserError
from tests.in_memory import as_transformers_model
from tests.tiny import FAMILIES, LLAMA, QWEN2, hf_model, save_hf

NOBODY = 65534
TOKENS = torch.arange(20)[None]
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("originals")
    return {name: save_hf(folder / name, hf_model(**config)) for name, config in FAMILIES.items()}


@pytest.fixture
def folder(originals, tmp_path):
    return shutil.copytree(originals["llama"], tmp_path / "hf")


def imported(folder, **settings):
    output = folder.parent / "checkpoint"
    return Checkpoint(import_checkpoint(ImportConfig(str(folder), str(output), **settings)))


def refusal(folder, **settings):
    with pytest.raises(UserError) as raised:
        imported(folder, **settings)
    assert not (folder.parent / "checkpoint").exists()
    return str(raised.value)


def reconfigure(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: v for name, v in config.items() if v is not ...}))


def rewrite(folder, change):
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def theirs(folder):
    return logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32))


def test_a_tie_that_the_weights_deny_is_none(folder, caplog):
    reconfigure(folder, tie_word_embeddings=True)
    checkpoint = imported(folder)
    assert "lm_head.weight differs from model.embed_tokens.weight: both are kept" in caplog.text
    assert not checkpoint.network.tie_embeddings
    assert torch.equal(logits(as_transformers_model(checkpoint)), theirs(folder))


def test_a_tie_with_equal_weights_is_one(folder):
    reconfigure(folder, tie_word_embeddings=True)
    rewrite(folder, lambda tensors: {**tensors, HEAD: tensors[EMBEDDING].clone()})
    checkpoint = imported(folder)
    assert checkpoint.network.tie_embeddings
    assert torch.equal(logits(as_transformers_model(checkpoint)), theirs(folder))


def test_the_one_end_of_a_tie_that_is_there_is_both(folder):
    reconfigure(folder, tie_word_embeddings=True)
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != EMBEDDING})
    assert torch.equal(logits(as_transformers_model(imported(folder))), theirs(folder))


def test_an_output_that_is_missing_is_refused_with_what_would_tie_it(folder):
    rewrite(folder, lambda tensors: {name: tensor for name, tensor in tensors.items() if name != HEAD})
    message = refusal(folder)
    assert "missing: lm_head.weight [101, 48]" in message and "set tie_word_embeddings to true" in message


def test_a_tied_output_of_another_size_is_refused(folder):
    reconfigure(folder, tie_word_embeddings=True)
    rewrite(folder, lambda tensors: {**tensors, HEAD: torch.zeros(90, 48)})
    assert "wrong size: lm_head.weight is [90, 48]" in refusal(folder)


@pytest.mark.parametrize(
    "prefix, head",
    [
        ("language_model.model.", "language_model.lm_head.weight"),
        ("model.language_model.", "lm_head.weight"),
        ("base_model.model.model.", "base_model.model.lm_head.weight"),
        ("module.model.", "module.lm_head.weight"),
        ("", "lm_head.weight"),
    ],
)
def test_keys_with_another_prefix_are_read(folder, prefix, head, caplog):
    expected = theirs(folder)
    rename = {HEAD: head}
    rewrite(folder, lambda ts: {rename.get(n, prefix + n.removeprefix("model.")): t for n, t in ts.items()})
    checkpoint = imported(folder)
    assert f"its keys begin with {prefix!r}" in caplog.text if prefix else "begin with no prefix" in caplog.text
    assert torch.equal(logits(as_transformers_model(checkpoint)), expected)


def test_a_prefix_beside_another_network_is_said_and_refused(folder):
    rewrite(
        folder, lambda ts: {f"language_model.{n}": t for n, t in ts.items()} | {"vision_tower.weight": torch.zeros(1)}
    )
    message = refusal(folder)
    assert "unknown: vision_tower.weight" in message and "its keys begin with 'language_model.model.'" in message


@pytest.mark.parametrize("is_damaged", [False, True])
def test_of_two_sets_of_weights_that_of_transformers_is_read(folder, is_damaged, caplog):
    shards = {name: tensor * 2 for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(shards, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    weight_map = dict.fromkeys(shards, "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text("{" if is_damaged else json.dumps({"weight_map": weight_map}))
    torch.save(shards, folder / "pytorch_model.bin")
    assert torch.equal(logits(as_transformers_model(imported(folder))), theirs(folder))
    assert f"model.safetensors is read, and not the shards of {INDEX}" in caplog.text


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_weights_beside_an_adapter_are_refused(folder, name):
    (folder / name).write_text("{}")
    message = refusal(folder)
    assert f"{name} is of an adapter over other weights: merge it first" in message


def test_an_adapter_alone_is_refused_with_the_step(folder):
    (folder / "adapter_config.json").write_text("{}")
    (folder / "config.json").unlink()
    assert "has no config.json; adapter_config.json is of an adapter" in refusal(folder)


def test_a_cast_is_said_with_what_it_costs(folder, caplog):
    rewrite(folder, lambda ts: {n: t if n.endswith("norm.weight") else t.bfloat16() for n, t in ts.items()})
    assert imported(folder).dtype is torch.bfloat16
    said = "9 tensors are float32 (model.layers.0.input_layernorm.weight, ...) and are written as bfloat16"
    assert said in caplog.text and "dtype=fp32 keeps them" in caplog.text


def test_no_digit_is_lost_on_the_way_to_the_format_that_is_asked_for(folder):
    rewrite(folder, lambda ts: {n: t if n.endswith("norm.weight") else t.bfloat16() for n, t in ts.items()})
    found = as_transformers_model(imported(folder, dtype=DType.FP32)).state_dict()
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(found[name], tensor.float()), name


def blocks(tensors, size):
    """Matrices of the layers as 8-bit floats with scales of their blocks."""
    found = {}
    for name, tensor in tensors.items():
        if tensor.ndim < 2 or ".layers." not in name:
            found[name] = tensor.bfloat16()
            continue
        rows, columns = (torch.arange(n) // size for n in tensor.shape)
        scales = torch.rand(int(rows[-1]) + 1, int(columns[-1]) + 1) + 0.01
        found[name] = (tensor / scales[rows][:, columns]).clamp(-448, 448).to(torch.float8_e4m3fn)
        found[f"{name}_scale_inv"] = scales
    return found


@pytest.mark.parametrize("size", [128, 16])
def test_blocks_of_8_bits_are_read_with_their_scales(folder, size):
    rewrite(folder, lambda tensors: blocks(tensors, size))
    settings = {"quant_method": "fp8", "weight_block_size": [size, size], "activation_scheme": "dynamic"}
    reconfigure(folder, quantization_config=settings)
    stored = load_file(folder / "model.safetensors")
    checkpoint = imported(folder)
    assert checkpoint.dtype is torch.bfloat16
    for name, tensor in as_transformers_model(checkpoint).state_dict().items():
        expected = stored[name]
        if f"{name}_scale_inv" in stored:
            rows, columns = (torch.arange(n) // size for n in expected.shape)
            expected = (expected.float() * stored[f"{name}_scale_inv"][rows][:, columns]).bfloat16()
        assert torch.equal(tensor, expected), name
    target = export(ExportConfig(str(checkpoint.root), str(folder.parent / "out")))
    assert "quantization_config" not in json.loads((target / "config.json").read_text())


def test_blocks_without_or_with_other_scales_are_refused(folder):
    settings = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    rewrite(folder, lambda tensors: blocks(tensors, 16))
    reconfigure(folder, quantization_config=settings)
    assert "and blocks of [64, 64] of [48, 44] need [1, 1]" in refusal(folder)
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if not n.endswith("_scale_inv")})
    assert "_scale_inv, the scales of its blocks, is not there" in refusal(folder)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq"])
def test_other_quantised_weights_are_refused_with_the_way_out(folder, method):
    reconfigure(folder, quantization_config={"quant_method": method, "bits": 4})
    message = refusal(folder)
    assert f"quantised by {method}" in message and "de-quantise first" in message


def test_a_window_is_avoided_by_a_setting(originals, tmp_path):
    folder = shutil.copytree(originals["mistral"], tmp_path / "hf")
    reconfigure(folder, sliding_window=32)
    assert "import with max_positions=32" in refusal(folder)
    with pytest.raises(ConfigError, match="max_positions = 65: must be at most the 64"):
        imported(folder, max_positions=65)
    checkpoint = imported(folder, max_positions=32)
    assert checkpoint.network.max_positions == 32
    target = export(ExportConfig(str(checkpoint.root), str(tmp_path / "out")))
    written = json.loads((target / "config.json").read_text())
    assert (written["max_position_embeddings"], written["sliding_window"]) == (32, None)
    assert torch.equal(theirs(target), theirs(folder))


def make(folder, *names):
    folder.mkdir()
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x" * 20)
    return folder


@pytest.mark.parametrize(
    "names, said",
    [
        (["context/model.yaml", "weights/metadata.json"], "nemo llm export"),
        (["model_world_size_2_rank_0.pt"], "verl.model_merger"),
        (["actor/model_world_size_2_rank_0.pt"], "verl.model_merger"),
        (["model-Q4.GGUF"], "it holds model-Q4.GGUF: name that file"),
        (["latest_checkpointed_iteration.txt"], "Megatron checkpoint already"),
        (["inner/config.json"], "inner/ in it has one"),
        (["config.json"], None),
    ],
    ids=str,
)
def test_other_folders_are_recognised(tmp_path, names, said):
    message = refusal(make(tmp_path / "hf", *names))
    assert (said or "config.json is not the whole config") in message


@pytest.mark.parametrize(
    "name, said",
    [
        ("model-00001-of-00002.safetensors", "the index of such files is not there"),
        ("pytorch_model.bin", "it holds pytorch_model.bin: load it with transformers"),
        ("consolidated.safetensors", "Mistral's or Meta's own format"),
    ],
)
def test_weights_of_other_formats_are_recognised(folder, name, said):
    (folder / "model.safetensors").rename(folder / name)
    assert said in refusal(folder)


@pytest.mark.parametrize(
    "name, said",
    [("model.safetensors", "name its folder"), ("model.nemo", "checkpoint of NeMo"), ("a.pt", "torch.save")],
)
def test_other_files_are_recognised(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"x" * 20)
    message = refusal(tmp_path / name)
    assert "is neither a folder nor a .gguf file" in message and said in message


def test_a_name_on_the_hub_is_recognised():
    with pytest.raises(CheckpointError, match="hf download some-org/Model-1B --local-dir DIR"):
        import_checkpoint(ImportConfig("some-org/Model-1B", "out"))
    with pytest.raises(CheckpointError, match="hf download some-org/Model-1B --local-dir DIR"):
        Checkpoint("some-org/Model-1B")


def test_a_source_where_a_checkpoint_is_meant_is_to_be_imported(folder):
    with pytest.raises(CheckpointError, match=f"import it first, with `minitron import source={folder}`"):
        Checkpoint(folder)


STALE = dict(
    layer_types=["full_attention"] * 4,
    max_window_layers=28,
    auto_map={"AutoModelForCausalLM": "modeling_custom.Custom"},
    quantization_config={"quant_method": "fp8"},
    pruned_heads={},
    kv_channels=12,
    _name_or_path="/somewhere",
)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_runs_whatever_its_source_said_beside_the_network(originals, tmp_path, family):
    folder = shutil.copytree(originals[family], tmp_path / "hf")
    expected = theirs(folder)
    reconfigure(folder, **STALE)
    target = export(ExportConfig(str(imported(folder).root), str(tmp_path / "out")))
    assert torch.equal(theirs(target), expected)
    written = json.loads((target / "config.json").read_text())
    assert not {"auto_map", "quantization_config", "max_window_layers", "_name_or_path"} & written.keys()


def test_what_is_copied_of_a_read_only_source_can_be_written(originals, monkeypatch):
    """By an ordinary user, whom modes bind."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        folder = shutil.copytree(originals["llama"], root / "hf")
        for path in [*folder.iterdir(), folder]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        root.chmod(0o777)
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        if user == 0:
            os.seteuid(NOBODY)
        try:
            checkpoint = imported(folder)
            target = export(ExportConfig(str(checkpoint.root), str(root / "out")))
            for path in [*checkpoint.root.rglob("*"), *target.iterdir()]:
                assert path.stat().st_mode & stat.S_IWUSR, path
        finally:
            os.seteuid(user)
            folder.chmod(0o755)


def test_qwen2_with_a_window_that_no_layer_has_is_read(tmp_path):
    folder = save_hf(tmp_path / "hf", hf_model(**QWEN2))
    reconfigure(folder, use_sliding_window=True, sliding_window=8, max_window_layers=4, layer_types=...)
    assert torch.equal(logits(as_transformers_model(imported(folder))), theirs(folder))


def test_llama_with_fields_that_transformers_passes_over_is_read(folder):
    reconfigure(folder, sliding_window=8, use_sliding_window=True, layer_types=["sliding_attention"] * 4)
    assert imported(folder).network.max_positions == LLAMA["max_position_embeddings"]
