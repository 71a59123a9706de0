"""Quantised exports: transformers, through compressed-tensors, has the logits of the checkpoint."""

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.calibration import Scheme
from minitron_megatron.config.quantize import QuantizeConfig, QuantizeMethod
from minitron_megatron.config.schema import DType, ExportConfig, ImportConfig
from minitron_megatron.config.sparsify import SparsifyConfig, SparsifyMethod
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.sparsity.quantize import quantize
from minitron_megatron.sparsity.sparsify import sparsify
from tests.in_memory import as_transformers_model
from tests.tiny import LLAMA, QWEN2, hf_model, import_hf, save_hf

SIZES = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
FORMATS = {Scheme.W4A16: "pack-quantized", Scheme.W8A8: "int-quantized", Scheme.FP8: "float-quantized"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoints in bf16, dense and 2:4, and quantised ones of both."""
    from minitron_megatron.checkpoint.convert import import_checkpoint

    folder = tmp_path_factory.mktemp("packed")
    source = save_hf(folder / "hf", hf_model(**{**LLAMA, **SIZES}))
    import_checkpoint(ImportConfig(str(source), str(folder / "dense"), DType.BF16))
    plain = dict(method=SparsifyMethod.MAGNITUDE, refit=False)
    sparsify(SparsifyConfig(str(folder / "dense"), str(folder / "sparse"), **plain))
    for source in ("dense", "sparse"):
        for scheme in Scheme:
            nearest = dict(scheme=scheme, method=QuantizeMethod.RTN)
            quantize(QuantizeConfig(str(folder / source), str(folder / f"{source}_{scheme.value}"), **nearest))
    return folder


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 51).view(1, -1) * 7 % 100).logits.float()


@pytest.mark.parametrize("source", ["dense", "sparse"])
@pytest.mark.parametrize("scheme", Scheme)
def test_transformers_reads_what_is_packed(scheme, source, folder, tmp_path):
    checkpoint = folder / f"{source}_{scheme.value}"
    packed = export(ExportConfig(str(checkpoint), str(tmp_path / "packed")))
    unpacked = export(ExportConfig(str(checkpoint), str(tmp_path / "unpacked"), packed=False))
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert config["format"] == FORMATS[scheme] and "sparsity_config" not in config
    assert config["ignore"] == ["lm_head"]
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=torch.bfloat16)
    expected = AutoModelForCausalLM.from_pretrained(unpacked, dtype=torch.bfloat16)
    assert expected.config.to_dict().get("quantization_config") is None
    found, wanted = logits(model), logits(expected)
    assert wanted.std() > 0.3
    # Activations of 8 bits are rounded by the reader.
    tolerance = 1e-6 if scheme is Scheme.W4A16 else 0.1
    assert (found - wanted).norm() <= tolerance * wanted.norm()


def test_packed_weights_take_fewer_bytes(folder, tmp_path):
    sizes = {}
    for scheme in Scheme:
        export(ExportConfig(str(folder / f"dense_{scheme.value}"), str(tmp_path / scheme.value)))
        with safe_open(tmp_path / scheme.value / "model.safetensors", framework="pt") as file:
            names = [name for name in file.keys() if "down_proj" in name]  # noqa: SIM118, it is no dict
            tensors = [file.get_tensor(name) for name in names]
        sizes[scheme] = sum(tensor.numel() * tensor.itemsize for tensor in tensors)
    matrices = 4 * 64 * 128
    assert sizes[Scheme.W4A16] == matrices // 2 + 4 * (64 * 2 + 2 * 8)  # two codes to a byte, a scale a row, a shape
    assert sizes[Scheme.W8A8] == sizes[Scheme.FP8] == matrices + 4 * 64 * 2


def test_unlike_group_sizes_are_told_apart(tmp_path):
    from minitron_megatron.checkpoint.convert import import_checkpoint

    source = save_hf(tmp_path / "hf", hf_model(**{**QWEN2, **SIZES, "intermediate_size": 96}))
    import_checkpoint(ImportConfig(str(source), str(tmp_path / "dense"), DType.BF16))
    nearest = dict(method=QuantizeMethod.RTN, ignore=["decoder.layers.1.mlp.*"])
    quantize(QuantizeConfig(str(tmp_path / "dense"), str(tmp_path / "rounded"), **nearest))
    packed = export(ExportConfig(str(tmp_path / "rounded"), str(tmp_path / "packed")))
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    assert {group["weights"]["group_size"] for group in config["config_groups"].values()} == {32, None}
    assert config["ignore"] == ["lm_head", *(f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up"))]
    unpacked = export(ExportConfig(str(tmp_path / "rounded"), str(tmp_path / "unpacked"), packed=False))
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16) for folder in (packed, unpacked)]
    found, wanted = map(logits, models)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


def test_weights_that_are_off_their_grid_are_not_packed(folder, tmp_path, monkeypatch):
    read = Checkpoint.read

    def trained(self, param, index):
        tensor = read(self, param, index)
        return tensor + tensor / 16 if param.name.endswith("linear_fc1.weight") else tensor

    monkeypatch.setattr(Checkpoint, "read", trained)
    with pytest.raises(CheckpointError, match=r"(gate|up)_proj\.weight: its weights are not multiples of their scales"):
        export(ExportConfig(str(folder / "dense_w4a16"), str(tmp_path / "packed")))
    assert not (tmp_path / "packed").exists()


def test_what_cannot_be_packed_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="packed = true, and checkpoint = .* is not quantised"):
        export(ExportConfig(str(folder / "dense"), str(tmp_path / "out"), packed=True))
    monkeypatch.setattr("minitron_megatron.checkpoint.packed.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install compressed-tensors"):
        export(ExportConfig(str(folder / "dense_fp8"), str(tmp_path / "out")))


def test_quantising_twice_is_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match="is quantised already"):
        quantize(QuantizeConfig(str(folder / "dense_fp8"), str(tmp_path / "out")))


def test_a_quantised_checkpoint_is_read_by_everything_else(folder):
    model = as_transformers_model(Checkpoint(folder / "dense_w8a8"))
    dense = as_transformers_model(Checkpoint(folder / "dense"))
    assert 0 < (logits(model) - logits(dense)).norm() < 0.1 * logits(dense).norm()


def test_groups_that_no_reader_knows_are_warned_of_and_not_packed(folder, tmp_path, caplog):
    few = dict(group_size=16, method=QuantizeMethod.RTN)
    quantize(QuantizeConfig(str(folder / "dense"), str(tmp_path / "out"), **few))
    known = "readers of packed weights know groups of 128, 64, 32 columns and whole rows"
    assert f"group_size = 16: {known}; export will want packed=false" in caplog.text
    with pytest.raises(CheckpointError, match=rf"a scale for every 16 columns of decoder.*, and {known}: quantise it"):
        export(ExportConfig(str(tmp_path / "out"), str(tmp_path / "packed")))
    assert not (tmp_path / "packed").exists()
    export(ExportConfig(str(tmp_path / "out"), str(tmp_path / "unpacked"), packed=False))


def test_a_packed_folder_is_no_checkpoint_to_train(folder, tmp_path):
    packed = export(ExportConfig(str(folder / "dense_w4a16"), str(tmp_path / "packed")))
    with pytest.raises(
        CheckpointError, match="its weights are packed, so name the checkpoint that it was exported from"
    ):
        Checkpoint(packed)


def test_the_group_size_must_divide(tmp_path):
    checkpoint = import_hf(tmp_path, hf_model(**LLAMA))
    config = QuantizeConfig(str(checkpoint), str(tmp_path / "out"), group_size=32, method=QuantizeMethod.RTN)
    with pytest.raises(ConfigError, match=r"group_size = 32 does not divide the 48 columns of .*linear_qkv"):
        quantize(config)
