"""What the verb `distill` does around its steps, on one rank and on four."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from minitron_megatron.checkpoint.load import local_parameters
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.checkpoint.sharded import Checkpoint
from minitron_megatron.checkpoint.source import instances
from minitron_megatron.config.loss import (
    Balance,
    Divergence,
    HiddenConfig,
    LogitsConfig,
    LossConfig,
    Projection,
    Schedule,
)
from minitron_megatron.config.schema import DataConfig, DistillConfig, DType, OptimizerConfig, ParallelConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.model.axes import axis_sizes, parameters
from minitron_megatron.model.count import forward_flops_per_token
from minitron_megatron.training import distill, loop
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    import_hf(folder, hf_model(**LLAMA))
    import_hf(folder / "narrow", hf_model(seed=1, **{**LLAMA, "hidden_size": 36, "num_hidden_layers": 2}))
    for number in range(20):
        (folder / f"{number}.txt").write_text("abcdefgh"[number % 8] * (50 + number))
    return folder


def settings(inputs, output, **changes):
    return DistillConfig(
        str(inputs / "checkpoint"),
        str(inputs / "checkpoint"),
        str(output),
        steps=1,
        dtype=DType.FP32,
        optimizer=OptimizerConfig(warmup_steps=0),
        data=DataConfig([str(inputs / f"{n}.txt") for n in range(20)], str(inputs / "corpora"), 16, seed=1),
        **changes,
    )


def random_weights_of_a_rank(inputs, folder, parallel):
    def keep(config, pair, training, samples, heldout, groups, *rest):
        shape = Checkpoint(config.student).shape
        found = [
            (param.stacked_key, layer, index, parameter.detach().clone())
            for chunk in unwrap_model(training.chunks)
            for parameter, param, layer, index in local_parameters(chunk, shape, groups)
        ]
        torch.save(found, folder / f"{dist.get_rank()}.pt")

    distill.train = keep
    distill.distill(settings(inputs, folder / "run", random_init=True, parallel=parallel))


def test_random_weights_do_not_depend_on_the_layout(inputs, tmp_path):
    run_on_ranks(4, random_weights_of_a_rank, inputs, tmp_path, ParallelConfig(tensor=2, pipeline=2))
    shape = Checkpoint(inputs / "checkpoint").shape
    expected = RandomWeights(shape, settings(inputs, "").seed)
    table, seen = {param.stacked_key: param for param in parameters(shape)}, Counter()
    for rank in range(4):
        for key, layer, index, weight in torch.load(tmp_path / f"{rank}.pt", weights_only=False):
            assert torch.equal(weight, expected.read(table[key], layer, index)), (key, layer)
            seen[key] += weight.numel()
    sizes = axis_sizes(shape)
    for param in table.values():
        copies = (1 if param.split else 2) * (shape.num_layers if param.sublayer else 1)
        assert seen[param.stacked_key] == copies * np.prod(param.size(sizes))


def error_of_a_rank(inputs, folder):
    def fails(*arguments):
        raise ConfigError(["tracking.tracker = wandb does not start"])

    distill.Metrics, distill.train = fails, lambda *arguments: None
    with pytest.raises(ConfigError, match="tracking.tracker = wandb does not start"):
        distill.distill(settings(inputs, folder / "run", parallel=ParallelConfig(data=2)))


def test_no_rank_goes_on_when_the_first_ones_tracker_does_not_start(inputs, tmp_path):
    run_on_ranks(2, error_of_a_rank, inputs, tmp_path)


def test_a_teacher_that_counts_nothing_is_neither_built_nor_counted(inputs, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(distill, "train", lambda *arguments: calls.append(arguments))
    forward = forward_flops_per_token(Checkpoint(inputs / "checkpoint").shape, 16)
    for weights in ((0.0, 1.0), (1.0, 0.0)):
        distill.distill(settings(inputs, tmp_path / str(weights), loss=LossConfig(*weights)))
    (_, without, *_, flops_without), (_, with_teacher, *_, flops_with) = calls
    assert without.teacher is None and flops_without == 3 * forward
    assert with_teacher.teacher and flops_with == 4 * forward


def test_a_run_with_every_kind_of_loss_goes_on_exactly_where_it_was_interrupted(inputs, tmp_path, monkeypatch):
    """With the weights that had moved, and the projections that are no part of the student."""
    hidden = HiddenConfig(0.5, Balance.DYNAMIC, projection=Projection.SHARED)
    logits = LogitsConfig(Divergence.JENSEN_SHANNON, temperature=2.0, top_k=20, tail=True)
    loss = LossConfig(0.7, 0.5, 0.1, Schedule.LINEAR, 3, logits=logits, hidden=hidden)
    config = replace(
        settings(inputs, tmp_path / "whole", loss=loss),
        student=str(inputs / "narrow/checkpoint"),
        steps=4,
        save_every=2,
    )
    distill.distill(config)

    save = loop.save_state

    def save_and_stop(*arguments):
        save(*arguments)
        raise KeyboardInterrupt

    parts = replace(config, output=str(tmp_path / "parts"))
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_state", save_and_stop)
        with pytest.raises(KeyboardInterrupt):
            distill.distill(parts)
    distill.distill(parts)

    def losses(run):
        lines = map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
        return [{k: v for k, v in line.items() if k.startswith(("loss/", "optim/"))} for line in lines]

    expected = losses("whole")
    assert losses("parts") == expected and len(expected) == 4
    for line in expected:
        of_pairs = [line[f"loss/kd_hidden/layer_{pair}"] for pair in ("0_1", "1_3")]
        assert line["loss/kd_hidden"] == pytest.approx(sum(of_pairs) / 2)
    weights = [0.5, 0.3, 0.1, 0.1]
    for line, before, lm_weight in zip(expected[1:], expected, weights[1:], strict=False):
        assert line["loss/alpha"] == pytest.approx(before["loss/kd_logits"] / before["loss/kd_hidden"])
        total = 0.7 * line["loss/kd_logits"] + lm_weight * line["loss/lm"]
        total += 0.5 * line["loss/alpha"] * line["loss/kd_hidden"]
        assert line["loss/total"] == pytest.approx(total)
    assert expected[-1]["loss/kd_hidden"] < expected[0]["loss/kd_hidden"]
    whole, found = (Checkpoint(tmp_path / run) for run in ("whole", "parts"))
    for param in parameters(whole.shape):
        index = [np.arange(size) for size in param.size(axis_sizes(whole.shape))]
        for layer in instances(param, whole.shape):
            assert torch.equal(found.read(param, layer, index), whole.read(param, layer, index)), param.name
