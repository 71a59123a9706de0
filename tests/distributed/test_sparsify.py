"""`sparsify` and `quantize` on several ranks: the same masks, weights and scales to the bit, and what they must be."""

import os
from dataclasses import replace

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoint.companions import read_mask
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.calibration import Scheme
from minitron_megatron.config.quantize import KVCache, QuantizeConfig
from minitron_megatron.config.schema import DataConfig, DType
from minitron_megatron.config.sparsify import SparsifyConfig, SparsifyMethod
from minitron_megatron.errors import DataError
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf, literate

# Rows for several blocks, and columns for whole bytes on two tensor ranks.
SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sparse")
    import_hf(folder, literate(hf_model(**{**LLAMA, **SIZES, "num_hidden_layers": 2})))
    for number in range(20):
        (folder / f"{number}.txt").write_text("abcdefgh"[number % 8] * (50 + number))
    return folder


def settings(schema, inputs, output, **changes):
    data = DataConfig([str(inputs / f"{n}.txt") for n in range(20)], str(inputs / "corpora"), 16, seed=1)
    return schema(
        checkpoint=str(inputs / "checkpoint"),
        output=str(output),
        num_samples=14,
        micro_batch=2,
        dtype=DType.FP32,
        data=data,
        **changes,
    )


def everything(folder):
    """All tensors of a checkpoint, by key."""
    checkpoint = Checkpoint(folder)
    return {key: checkpoint.read(param, [np.arange(n) for n in param.shape]) for key, param in all_params(checkpoint)}


def all_params(checkpoint):
    from minitron_megatron.model.parameters import layer_key, parameters

    for param in [*parameters(checkpoint.network), *checkpoint.companions.values()]:
        yield layer_key(param), param


def run(config):
    from minitron_megatron.config.verbs import verb_function
    from minitron_megatron.sparsity import engine, moment_sums, second_moments

    torch.set_num_threads(1)  # as every rank has, or sums differ
    engine.ROW_BLOCK = 20
    moment_sums.BLOCK = second_moments.BLOCK = 40
    verb_function("sparsify" if isinstance(config, SparsifyConfig) else "quantize")(
        replace(config, parallel=replace(config.parallel, data=int(os.environ.get("WORLD_SIZE", 1))))
    )


TASKS = {
    "alps-2:4": (SparsifyConfig, dict(method=SparsifyMethod.ALPS, pattern="2:4")),
    "alps-unstructured": (SparsifyConfig, dict(method=SparsifyMethod.ALPS, pattern="unstructured")),
    "sparsegpt-2:4": (SparsifyConfig, dict(method=SparsifyMethod.SPARSEGPT)),
    "magnitude-unstructured": (SparsifyConfig, dict(method=SparsifyMethod.MAGNITUDE, pattern="unstructured")),
    "by-error": (
        SparsifyConfig,
        dict(method=SparsifyMethod.WANDA, pattern="unstructured", by_error=True, refit=False),
    ),
    "dense-inputs": (SparsifyConfig, dict(method=SparsifyMethod.WANDA, sequential=False)),
    "in-one-pass": (SparsifyConfig, dict(method=SparsifyMethod.SPARSEGPT, refit=False, scheme=Scheme.W4A16)),
    "rounded": (SparsifyConfig, dict(method=SparsifyMethod.WANDA, scheme=Scheme.W4A16, group_size=8)),
    "fp8": (QuantizeConfig, dict(scheme=Scheme.FP8, kv_cache=KVCache.FP8)),
}


def run_all(inputs, where):
    torch.distributed.init_process_group("gloo")  # once: the verbs use a world that there is
    for name, (schema, changes) in TASKS.items():
        run(settings(schema, inputs, inputs / where / name, **changes))


@pytest.fixture(scope="module")
def alone(inputs):
    threads = torch.get_num_threads()
    run_on_ranks(1, run_all, inputs, "1")
    torch.set_num_threads(threads)
    return inputs / "1"


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_the_result_is_the_same_to_the_bit_for_any_number_of_ranks(num_ranks, inputs, alone):
    run_on_ranks(num_ranks, run_all, inputs, str(num_ranks))
    for name in TASKS:
        expected, found = everything(alone / name), everything(inputs / str(num_ranks) / name)
        assert expected.keys() == found.keys()
        different = [key for key in expected if not torch.equal(expected[key], found[key])]
        assert not different, (name, different)


@pytest.mark.parametrize("name", [name for name, (schema, _) in TASKS.items() if schema is SparsifyConfig])
def test_what_the_masks_drop_is_zero_and_what_they_keep_is_half(name, alone):
    checkpoint, kept = Checkpoint(alone / name), {}
    assert len(checkpoint.masks) == 8 and len(checkpoint.scales) in (0, 8)
    for _, param in all_params(checkpoint):
        if not param.matmul or param.position is None:
            continue
        index = [np.arange(n) for n in param.shape]
        weight, mask = checkpoint.read(param, index), read_mask(checkpoint, param, index)
        assert not weight[~mask].any()
        kept.setdefault(param.layer, []).append(mask.flatten())
        assert mask.float().mean() == 0.5 or name == "by-error"
        if "unstructured" not in name and name != "by-error":
            assert (mask.view(len(mask), -1, 4).sum(2) == 2).all()
    if name == "by-error":
        first, second = (float(torch.cat(masks).float().mean()) for masks in kept.values())
        assert abs(first - second) > 0.05 and (first + second) / 2 == pytest.approx(0.5, abs=0.01)  # of rows of few


def test_other_calibration_gives_other_masks(inputs, alone):
    """So that ranks that saw a part of the samples alone would be noticed."""
    name = "sparsegpt-2:4"
    schema, changes = TASKS[name]
    half = replace(settings(schema, inputs, inputs / "half", **changes), num_samples=6)
    run_on_ranks(1, run, half)
    expected, found = everything(alone / name), everything(inputs / "half")
    masks = [key for key in expected if key.endswith("_mask")]
    same = [(expected[key] == found[key]).float().mean() for key in masks]
    assert max(same) < 1


def test_without_text_nothing_is_tokenised(inputs, tmp_path):
    config = settings(SparsifyConfig, inputs, tmp_path / "out", method=SparsifyMethod.MAGNITUDE, refit=False)
    config.data.cache_dir = str(tmp_path / "corpora")
    run_on_ranks(1, run, config)
    assert not (tmp_path / "corpora").exists()


def stop_after_one_layer(config):
    from minitron_megatron.sparsity.solved_layers import SolvedLayers

    write = SolvedLayers.write

    def write_and_stop(self, number, *args):
        write(self, number, *args)
        raise KeyboardInterrupt

    SolvedLayers.write = write_and_stop
    try:
        run(config)
    except KeyboardInterrupt:
        pass
    finally:
        SolvedLayers.write = write


def without_finite_weights(config):
    read = Checkpoint.read

    def with_a_fault(self, param, index):
        tensor = read(self, param, index)
        return tensor * 1e30 if param.name.endswith("linear_fc1.weight") and param.layer == 1 else tensor

    Checkpoint.read = with_a_fault
    with pytest.raises(DataError, match=r"the inputs of layer 1, mlp\.linear_fc2\.weight are not finite"):
        run(config)


def test_inputs_that_are_not_finite_are_an_error_on_every_rank(inputs, tmp_path):
    config = settings(SparsifyConfig, inputs, tmp_path / "out", method=SparsifyMethod.WANDA, refit=False)
    run_on_ranks(2, without_finite_weights, config)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["sparsegpt-2:4", "dense-inputs", "fp8"])
def test_an_interrupted_run_goes_on_after_its_last_layer(name, inputs, alone, tmp_path):
    schema, changes = TASKS[name]
    config = settings(schema, inputs, tmp_path / "out", **changes)
    run_on_ranks(1, stop_after_one_layer, config)
    left = tmp_path / ".out.layers"
    assert [file.name for file in left.glob("layer_*")] == ["layer_0000.safetensors"]
    before = (left / "layer_0000.safetensors").stat().st_mtime_ns
    run_on_ranks(1, watch_layers, config, tmp_path / "written")
    assert (tmp_path / "written").read_text() == "1"
    assert before and not left.exists()
    expected, found = everything(alone / name), everything(tmp_path / "out")
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def write_loads(config, file):
    from minitron_megatron.sparsity.layer_stream import LayerStream

    load = LayerStream.load

    def write_and_load(self, number):
        with file.open("a") as numbers:
            numbers.write(str(number))
        return load(self, number)

    LayerStream.load = write_and_load
    run(config)


@pytest.mark.parametrize(
    ("name", "moments_gb", "loads"),
    [("sparsegpt-2:4", 0.0, 5 * "0" + 5 * "1"), ("dense-inputs", 0.0, 4 * "0" + 4 * "1"), ("rounded", 1e-4, "000111")],
)
def test_matrices_are_measured_in_turn_where_moments_are_large(name, moments_gb, loads, inputs, alone, tmp_path):
    schema, changes = TASKS[name]
    config = settings(schema, inputs, tmp_path / "out", moments_gb=moments_gb, **changes)
    run_on_ranks(1, write_loads, config, tmp_path / "loads")
    assert (tmp_path / "loads").read_text() == loads
    expected, found = everything(alone / name), everything(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def watch_layers(config, file):
    from minitron_megatron.sparsity.solved_layers import SolvedLayers

    write, numbers = SolvedLayers.write, []
    SolvedLayers.write = lambda self, number, *args: (numbers.append(str(number)), write(self, number, *args))
    run(config)
    file.write_text(",".join(numbers))
