"""Students with rounded weights: on their grid after every step, learning all the same, in every layout."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoint.companions import SCALE, matrices
from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.calibration import Scheme
from minitron_megatron.config.distill import FakeQuantConfig, MasksConfig
from minitron_megatron.config.quantize import QuantizeConfig, QuantizeMethod
from minitron_megatron.config.schema import DataConfig, DistillConfig, ExportConfig, OptimizerConfig, ParallelConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.model.parameters import layer_key
from minitron_megatron.sparsity.quantize import quantize
from minitron_megatron.tracking.metrics import read_metrics
from minitron_megatron.training import distill
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf, literate

SIZES = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
LAYOUTS = {"tp2": ParallelConfig(tensor=2), "dp2": ParallelConfig(data=2)}
STEPS = 16


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fake_quant")
    import_hf(folder, literate(hf_model(**{**LLAMA, **SIZES})))
    import_hf(folder / "student", hf_model(seed=1, **{**LLAMA, **SIZES}))
    for number in range(20):
        (folder / f"{number}.txt").write_text("abcdefgh"[number % 8] * (50 + number))
    return folder


def settings(inputs, output, scheme=Scheme.W4A16, **changes):
    return DistillConfig(
        str(inputs / "checkpoint"),
        str(inputs / "student" / "checkpoint"),
        str(output),
        steps=STEPS,
        global_batch=4,
        micro_batch=2,
        save_every=8,
        keep_checkpoints=5,
        fake_quant=FakeQuantConfig(scheme, 32 if scheme is Scheme.W4A16 else None),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=2, distributed=True),
        data=DataConfig([str(inputs / f"{n}.txt") for n in range(20)], str(inputs / "corpora"), 16, seed=1),
        **changes,
    )


def codes_of(folder):
    """The weights of every matrix in units of their scales."""
    checkpoint = Checkpoint(folder)
    for param in matrices(checkpoint.network):
        index = [np.arange(size) for size in param.shape]
        scale = checkpoint.companions[f"{layer_key(param)}{SCALE}"]
        scales = checkpoint.read(scale, [np.arange(size) for size in scale.shape])
        spread = scales.repeat_interleave(param.shape[1] // scale.shape[1], 1)
        yield param, checkpoint.read(param, index).float() / spread, scales


def run_in(config, parallel):
    distill.distill(replace(config, parallel=parallel))


@pytest.fixture(scope="module")
def alone(inputs):
    distill.distill(settings(inputs, inputs / "alone"))
    return inputs / "alone"


def test_rounded_weights_learn_and_are_packed_as_they_are(inputs, alone, tmp_path):
    losses = [line["loss/total"] for line in read_metrics(alone)]
    assert losses[-1] < 0.7 * losses[0]
    for param, codes, _ in codes_of(alone):
        assert (codes - codes.round()).abs().max() < 0.05 and codes.abs().max() < 8.05, param.name
    export(ExportConfig(str(alone), str(tmp_path / "packed")))  # which checks that it is exact


def test_the_scales_of_a_quantised_student_stay_if_they_are_of_the_scheme(inputs, tmp_path):
    given = dict(method=QuantizeMethod.RTN, scheme=Scheme.W8A8)
    quantize(QuantizeConfig(str(inputs / "student" / "checkpoint"), str(tmp_path / "student"), **given))
    scales = {}
    for scheme in (Scheme.W8A8, Scheme.FP8):
        config = replace(settings(inputs, tmp_path / scheme.value, scheme), steps=1, student=str(tmp_path / "student"))
        config.optimizer.warmup_steps = 0
        distill.distill(config)
        scales[scheme] = [own for _, _, own in codes_of(tmp_path / scheme.value)]
        export(ExportConfig(str(tmp_path / scheme.value), str(tmp_path / f"{scheme.value}_packed")))
    for theirs, same, other in zip(codes_of(tmp_path / "student"), *scales.values(), strict=True):
        assert torch.equal(theirs[2], same)
        torch.testing.assert_close(other, same * 127.5 / 448, rtol=0.02, atol=0)


def test_a_group_size_that_does_not_divide_is_refused(inputs, tmp_path):
    config = settings(inputs, tmp_path / "run")
    config.fake_quant.group_size = 48
    with pytest.raises(ConfigError, match=r"group_size = 48 does not divide the 64 columns of .*linear_qkv"):
        distill.distill(config)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_same_scales_and_learns_alike(name, inputs, alone, tmp_path):
    run_on_ranks(2, run_in, settings(inputs, tmp_path / "run"), LAYOUTS[name])
    for (param, found, scales), (_, expected, theirs) in zip(codes_of(tmp_path / "run"), codes_of(alone), strict=True):
        assert torch.equal(scales, theirs), param.name
        assert (found - found.round()).abs().max() < 0.05
        # In bf16 a weight between two numbers of the grid may end at either.
        assert ((found - expected).abs() > 1.5).float().mean() < 0.01, param.name
    runs = [read_metrics(run)[-1]["loss/total"] for run in (tmp_path / "run", alone)]
    assert runs[0] == pytest.approx(runs[1], rel=0.2)  # a hundredth of the first


def test_an_interrupted_run_goes_on_exactly(inputs, alone, tmp_path, stop_after_saving):
    with stop_after_saving():
        distill.distill(settings(inputs, tmp_path / "run"))
    distill.distill(settings(inputs, tmp_path / "run"))
    for (param, found, _), (_, expected, _) in zip(codes_of(tmp_path / "run"), codes_of(alone), strict=True):
        assert torch.equal(found, expected), param.name


def test_zeros_and_rounding_go_together(inputs, tmp_path):
    masks = MasksConfig(sparsity=0.5, last_step=4, every=1)
    distill.distill(replace(settings(inputs, tmp_path / "run"), steps=8, masks=masks))
    assert len(Checkpoint(tmp_path / "run").masks) == 16
    for param, codes, _ in codes_of(tmp_path / "run"):
        assert (codes == 0).float().mean() >= 0.5 and (codes - codes.round()).abs().max() < 0.05, param.name
    export(ExportConfig(str(tmp_path / "run"), str(tmp_path / "packed")))
