"""Sparse students: what is zero stays zero to the bit, in every layout, over restarts, and as plain torch has it."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoint.companions import matrices, read_mask
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.distill import MaskMode, MasksConfig, MaskScore
from minitron_megatron.config.schema import DataConfig, DistillConfig, DType, OptimizerConfig, ParallelConfig
from minitron_megatron.config.sparsify import SparsifyConfig, SparsifyMethod
from minitron_megatron.errors import CheckpointError, ConfigError, TrainingError
from minitron_megatron.sparsity.sparsify import sparsify
from minitron_megatron.tracking.metrics import read_metrics
from minitron_megatron.training import distill
from minitron_megatron.training.masks import Masks, share_of_zeros
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf, literate

# Columns for whole bytes on two tensor ranks.
SIZES = dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
LAYOUTS = {
    "tp2_sp": (2, ParallelConfig(tensor=2, sequence=True)),
    "pp2_vpp2": (2, ParallelConfig(pipeline=2, virtual_pipeline=2)),
    "dp2": (2, ParallelConfig(data=2)),
}
STEPS = 12


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("masks")
    import_hf(folder, literate(hf_model(**{**LLAMA, **SIZES})))
    for number in range(20):
        (folder / f"{number}.txt").write_text("abcdefgh"[number % 8] * (50 + number))
    magnitude = dict(method=SparsifyMethod.MAGNITUDE, refit=False)
    sparsify(SparsifyConfig(str(folder / "checkpoint"), str(folder / "sparse"), **magnitude))
    return folder


def settings(inputs, output, **changes):
    given = dict(
        steps=STEPS,
        global_batch=4,
        micro_batch=2,
        save_every=5,
        keep_checkpoints=5,
        dtype=DType.FP32,
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, warmup_steps=0, weight_decay=0.1),
        data=DataConfig([str(inputs / f"{n}.txt") for n in range(20)], str(inputs / "corpora"), 16, seed=1),
    )
    return DistillConfig(str(inputs / "checkpoint"), str(inputs / "sparse"), str(output), **{**given, **changes})


def run_in(config, parallel):
    distill.distill(replace(config, parallel=parallel))


def weights_and_masks(checkpoint):
    for param in matrices(checkpoint.network):
        index = [np.arange(size) for size in param.shape]
        yield param, checkpoint.read(param, index), read_mask(checkpoint, param, index)


def assert_same_zeros(folder, before):
    """The masks of a checkpoint, and zeros where they are; returns its weights."""
    found = Checkpoint(folder)
    weights = []
    for (_, weight, mask), (param, first, expected) in zip(
        weights_and_masks(found), weights_and_masks(Checkpoint(before)), strict=True
    ):
        assert torch.equal(mask, expected), param.name
        assert not weight[~mask].any() and not torch.equal(weight, first)
        weights.append(weight)
    return weights


@pytest.fixture(scope="module")
def alone(inputs):
    distill.distill(settings(inputs, inputs / "alone"))
    return inputs / "alone"


def test_what_is_zero_stays_zero(alone, inputs):
    assert_same_zeros(alone, inputs / "sparse")


GRADUAL = MasksConfig(sparsity=0.6, first_step=2, last_step=8, every=2)


def gradual(inputs, output):
    """A dense student that gets sparser."""
    return replace(settings(inputs, output, masks=GRADUAL), student=str(inputs / "checkpoint"))


def run_both(inputs, where, parallel):
    torch.distributed.init_process_group("gloo")  # once: the verb uses a world that there is
    for config in (settings(inputs, where / "kept"), gradual(inputs, where / "gradual")):
        config.optimizer.distributed = parallel.replicas > 1
        run_in(config, parallel)


@pytest.fixture(scope="module", params=LAYOUTS)
def in_layout(request, inputs):
    num_ranks, parallel = LAYOUTS[request.param]
    run_on_ranks(num_ranks, run_both, inputs, inputs / request.param, parallel)
    return inputs / request.param


def test_every_layout_trains_the_same_student(in_layout, inputs, alone):
    expected = assert_same_zeros(alone, inputs / "sparse")
    for found, weight in zip(assert_same_zeros(in_layout / "kept", inputs / "sparse"), expected, strict=True):
        # Adam makes a step of a gradient that is next to nothing, and 12 steps of 1e-3 were made.
        assert (found - weight).abs().max() <= 1e-3 and (found - weight).abs().mean() <= 1e-5


@pytest.fixture(scope="module")
def gradual_alone(inputs):
    distill.distill(gradual(inputs, inputs / "gradual"))
    return inputs / "gradual"


def test_a_student_gets_sparser_the_same_way_in_every_layout(in_layout, gradual_alone):
    expected = weights_and_masks(Checkpoint(gradual_alone))
    for (param, weight, mask), (_, _, own) in zip(
        weights_and_masks(Checkpoint(in_layout / "gradual")), expected, strict=True
    ):
        assert not weight[~mask].any()
        assert (mask != own).float().mean() < 0.01, param.name


def test_a_student_gets_sparser_on_schedule(gradual_alone):
    for param, weight, mask in weights_and_masks(Checkpoint(gradual_alone)):
        assert not weight[~mask].any()
        for rows in param.rows_of_parts():  # of queries, say
            assert (~mask[rows]).sum() == int(0.6 * mask[rows].numel())
    shares = [values["masks/sparsity"] for values in read_metrics(gradual_alone)]
    assert shares == sorted(shares) and shares[0] == 0
    for step, share in enumerate(shares, start=1):
        wanted = share_of_zeros(GRADUAL, step)
        assert wanted is None or abs(share - wanted) < 1e-3


def test_getting_sparser_goes_on_where_it_was_interrupted(inputs, gradual_alone, tmp_path, stop_after_saving):
    parts = gradual(inputs, tmp_path / "parts")
    with stop_after_saving():
        distill.distill(parts)
    distill.distill(parts)
    for (_, weight, mask), (_, whole, own) in zip(
        weights_and_masks(Checkpoint(tmp_path / "parts")), weights_and_masks(Checkpoint(gradual_alone)), strict=True
    ):
        assert torch.equal(mask, own) and torch.equal(weight, whole)


def test_weights_are_dropped_by_the_inputs_that_sparsify_saved(inputs, tmp_path):
    """At a learning rate of next to nothing, what Wanda drops at once is dropped in two rounds, on two tensor ranks."""
    wanda = dict(method=SparsifyMethod.WANDA, pattern="unstructured", refit=False, sequential=False, num_samples=8)
    for name, sparsity in (("some", 0.2), ("most", 0.6)):
        data = settings(inputs, "unused").data
        folders = str(inputs / "checkpoint"), str(tmp_path / name)
        sparsify(SparsifyConfig(*folders, sparsity=sparsity, dtype=DType.FP32, data=data, **wanda))
    masks = MasksConfig(sparsity=0.6, last_step=2, every=1, by=MaskScore.ACTIVATION)
    config = settings(inputs, tmp_path / "run", steps=2, save_every=None, masks=masks)
    config.optimizer = replace(config.optimizer, lr=1e-12, min_lr=1e-12)
    with pytest.raises(ConfigError, match=r"masks\.by = activation needs the norms .* has none of decoder"):
        distill.distill(replace(config, student=str(inputs / "checkpoint")))
    run_on_ranks(2, run_in, replace(config, student=str(tmp_path / "some")), LAYOUTS["tp2_sp"][1])
    expected = weights_and_masks(Checkpoint(tmp_path / "most"))
    for (param, weight, mask), (_, _, own) in zip(
        weights_and_masks(Checkpoint(tmp_path / "run")), expected, strict=True
    ):
        assert torch.equal(mask, own) and not weight[~mask].any(), param.name


def test_bf16_and_the_distributed_optimizer_keep_zeros_over_a_change_of_the_layout(inputs, tmp_path, stop_after_saving):
    config = settings(inputs, tmp_path / "run", dtype=DType.BF16)
    config.optimizer.distributed = True
    with stop_after_saving():
        distill.distill(config)
    run_on_ranks(2, run_in, config, LAYOUTS["tp2_sp"][1])
    assert_same_zeros(tmp_path / "run", inputs / "sparse")


def test_masked_training_is_that_of_torch_with_masked_gradients(inputs, tmp_path):
    """Cross-entropy alone: AdamW in torch on a model of transformers, gradients masked before they are clipped."""
    from minitron_megatron.data.samples import rank_batches, training_samples
    from minitron_megatron.data.tokens import prepare_corpus
    from minitron_megatron.parallel.context import parallel_context
    from tests.in_memory import as_transformers_model

    config = replace(settings(inputs, tmp_path / "run", steps=4, save_every=None), teacher=None)
    config.loss = replace(config.loss, kd_logits_weight=0.0, lm_weight=1.0)
    config.optimizer = OptimizerConfig(lr=1e-2, min_lr=1e-2, warmup_steps=0, clip_grad=0.5, weight_decay=0.0)
    distill.distill(config)
    model = as_transformers_model(Checkpoint(inputs / "sparse")).train()
    masks = {name: (parameter != 0).float() for name, parameter in model.named_parameters() if "layers." in name}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    with parallel_context(ParallelConfig()):
        corpus = prepare_corpus(config.data, inputs / "checkpoint" / "huggingface")
        samples = training_samples(corpus, config.data, 16)
        for step in range(4):
            optimizer.zero_grad()
            [batch] = rank_batches(samples, 4 * step, 4, 4, 0, 1)
            logits = model(batch["tokens"], position_ids=batch["position_ids"]).logits
            losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"], reduction="none")
            ((losses * batch["loss_mask"]).sum() / batch["loss_mask"].sum()).backward()
            for name, parameter in model.named_parameters():
                if name in masks:
                    parameter.grad *= masks[name]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            # Of what is left: Adam would not notice that gradients were clipped by another norm.
            assert read_metrics(tmp_path / "run")[step]["optim/grad_norm"] == pytest.approx(float(norm), rel=1e-4)
            optimizer.step()
    expected = dict(model.named_parameters())
    found = dict(as_transformers_model(Checkpoint(tmp_path / "run")).named_parameters())
    for name, parameter in found.items():
        difference = (parameter - expected[name]).abs()
        assert difference.max() <= 1e-3 and difference.mean() <= 1e-5, name  # after 4 steps of 1e-2


def test_masks_that_are_ignored_are_gone(inputs, tmp_path):
    distill.distill(settings(inputs, tmp_path / "run", steps=2, masks=MasksConfig(MaskMode.IGNORE)))
    assert not Checkpoint(tmp_path / "run").masks
    first = next(iter(matrices(Checkpoint(tmp_path / "run").network)))
    weight = Checkpoint(tmp_path / "run").read(first, [np.arange(size) for size in first.shape])
    assert (weight == 0).float().mean() < 0.1


def test_a_student_whose_weights_and_masks_disagree_is_refused(inputs, tmp_path, monkeypatch):
    read = Checkpoint.read

    def with_a_fault(self, param, index):
        tensor = read(self, param, index)
        if param.name.endswith("linear_fc2.weight") and param.layer == 2 and "sparse" in str(self.root):
            tensor[3] = 1
        return tensor

    monkeypatch.setattr(Checkpoint, "read", with_a_fault)
    with pytest.raises(
        CheckpointError, match=r"not zero where its masks say so, in decoder\.layers\.2\.mlp\.linear_fc2"
    ):
        distill.distill(settings(inputs, tmp_path / "run"))


def test_a_negative_zero_is_a_zero(inputs, tmp_path, monkeypatch):
    read = Checkpoint.read

    def negative(self, param, index):
        tensor = read(self, param, index)
        return torch.where(tensor == 0, -0.0, tensor) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(Checkpoint, "read", negative)
    distill.distill(settings(inputs, tmp_path / "run", steps=1, save_every=None))


def test_zeros_that_get_lost_are_noticed_before_anything_is_saved(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(Masks, "mask_gradients", lambda self: None)
    with pytest.raises(TrainingError, match="no longer zero"):
        distill.distill(settings(inputs, tmp_path / "run"))
    assert not list((tmp_path / "run" / "checkpoints").glob("iter_*"))


def test_a_layout_that_splits_bytes_is_refused(inputs, tmp_path):
    import_hf(tmp_path, hf_model(**LLAMA))  # 44 neurons
    dense, sparse = tmp_path / "checkpoint", tmp_path / "sparse"
    sparsify(SparsifyConfig(str(dense), str(sparse), method=SparsifyMethod.MAGNITUDE, refit=False))
    config = replace(settings(inputs, tmp_path / "run"), teacher=str(dense), student=str(sparse))
    run_on_ranks(2, refused, config)


def refused(config):
    with pytest.raises(ConfigError, match=r"parallel\.tensor = 2 gives every rank 36 columns of .*linear_proj"):
        run_in(config, ParallelConfig(tensor=2))


@pytest.mark.parametrize(("step", "share"), [(1, None), (2, 0.0), (5, None), (6, 0.6 * (1 - (2 / 3) ** 3)), (14, 0.6)])
def test_the_schedule_is_zhu_and_guptas(step, share):
    found = share_of_zeros(MasksConfig(sparsity=0.6, first_step=2, last_step=14, every=4), step)
    assert found == (None if share is None else pytest.approx(share))
