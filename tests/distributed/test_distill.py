"""What the verb `distill` does around its steps, on one rank and on four."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from megatron.core.utils import unwrap_model

from minitron_megatron.checkpoint.dist_reader import TEACHER, TRACKER, Checkpoint
from minitron_megatron.checkpoint.load import local_parameters
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.loss import (
    Balance,
    Divergence,
    HiddenConfig,
    LogitsConfig,
    LossConfig,
    Projection,
)
from minitron_megatron.config.schedule import Schedule
from minitron_megatron.config.schema import OptimizerConfig, ParallelConfig
from minitron_megatron.errors import ConfigError, DataError
from minitron_megatron.model.count import forward_flops_per_token
from minitron_megatron.model.parameters import by_key, layer_key, parameters
from minitron_megatron.tracking.metrics import read_metrics
from minitron_megatron.training import distill, saver, setup, state
from minitron_megatron.training.loop import Trainer
from tests.distributed.distilling import run_in, settings, weights_of
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf, literate


def random_weights_of_a_rank(inputs, folder, parallel):
    def keep(trainer):
        network = Checkpoint(trainer.config.student).network
        found = [
            (layer_key(param), index, parameter.detach().clone())
            for chunk in unwrap_model(trainer.models[""].model_chunks)
            for parameter, param, index in local_parameters(chunk, network, trainer.ctx)
        ]
        torch.save(found, folder / f"{dist.get_rank()}.pt")

    Trainer.train = keep
    distill.distill(settings(inputs, folder / "run", random_init=True, parallel=parallel))


def test_random_weights_do_not_depend_on_the_layout(inputs, tmp_path):
    run_on_ranks(4, random_weights_of_a_rank, inputs, tmp_path, ParallelConfig(tensor=2, pipeline=2))
    network = Checkpoint(inputs / "checkpoint").network
    expected = RandomWeights(network, settings(inputs, "").seed)
    table, seen = by_key(parameters(network)), Counter()
    for rank in range(4):
        for key, index, weight in torch.load(tmp_path / f"{rank}.pt", weights_only=False):
            assert torch.equal(weight, expected.read(table[key], index)), key
            seen[key] += weight.numel()
    for key, param in table.items():
        assert seen[key] == (1 if param.split else 2) * np.prod(param.shape)


def error_of_a_rank(inputs, folder):
    def fails(*arguments):
        raise ConfigError(["tracking.trackers = [wandb]: wandb does not start"])

    def loaded(*arguments):
        raise AssertionError("a model was built before the tracker had started")

    distill.Metrics, setup.build_model = fails, loaded
    with pytest.raises(ConfigError, match="wandb does not start"):
        distill.distill(settings(inputs, folder / "run", parallel=ParallelConfig(data=2)))


def test_no_rank_goes_on_when_the_first_ones_tracker_does_not_start(inputs, tmp_path):
    run_on_ranks(2, error_of_a_rank, inputs, tmp_path)


def test_a_teacher_that_counts_nothing_is_neither_built_nor_counted(inputs, tmp_path, monkeypatch):
    trainers = []
    monkeypatch.setattr(Trainer, "train", lambda trainer: trainers.append(trainer))
    forward = forward_flops_per_token(Checkpoint(inputs / "checkpoint").network, 16)
    for weights in ((0.0, 1.0), (1.0, 0.0)):
        distill.distill(settings(inputs, tmp_path / str(weights), loss=LossConfig(*weights)))
    without, with_teacher = trainers
    assert without.step.teachers == [] and without.flops_per_token(1) == 3 * forward
    assert len(with_teacher.step.teachers) == 1 and with_teacher.flops_per_token(1) == 4 * forward


def test_a_run_with_every_kind_of_loss_goes_on_exactly_where_it_was_interrupted(inputs, tmp_path, stop_after_saving):
    """With the weights that had moved, and the projections that are no part of the student."""
    hidden = HiddenConfig(0.5, Balance.DYNAMIC, projection=Projection.SHARED)
    logits = LogitsConfig(Divergence.JENSEN_SHANNON, temperature=2.0, top_k=20, tail=True)
    loss = LossConfig(0.7, schedule={"lm_weight": Schedule([[1, 0.5], [3, 0.1]])}, logits=logits, hidden=hidden)
    config = replace(
        settings(inputs, tmp_path / "whole", loss=loss),
        student=str(inputs / "narrow/checkpoint"),
        steps=4,
        save_every=2,
    )
    distill.distill(config)

    parts = replace(config, output=str(tmp_path / "parts"))
    with stop_after_saving():
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
    for param in parameters(whole.network):
        index = [np.arange(size) for size in param.shape]
        assert torch.equal(found.read(param, index), whole.read(param, index)), layer_key(param)


def test_a_teacher_is_trained_beside_its_student_as_it_would_be_alone(inputs, tmp_path):
    """By cross-entropy on the same batches; the student learns from what the teacher knew before each step."""
    both = replace(
        settings(inputs, tmp_path / "both"), student=str(inputs / "narrow/checkpoint"), steps=3, teacher_lr=1e-2
    )
    distill.distill(both)
    alone = replace(
        settings(inputs, tmp_path / "alone", loss=LossConfig(0.0, 1.0)),
        teacher=None,
        steps=3,
        optimizer=OptimizerConfig(lr=1e-2, min_lr=1e-3, warmup_steps=0),
    )
    distill.distill(alone)
    distill.distill(replace(both, output=str(tmp_path / "frozen"), teacher_lr=None))
    (both, alone, frozen) = (read_metrics(tmp_path / run) for run in ("both", "alone", "frozen"))
    for ours, theirs in zip(both, alone, strict=True):
        assert ours["teacher/lm"] == theirs["loss/lm"]
        assert ours["teacher/lr"] == pytest.approx(theirs["optim/lr"])
        assert ours["teacher/grad_norm"] == theirs["optim/grad_norm"]
    assert both[0]["teacher/first_lm"] == pytest.approx(both[0]["teacher/lm"], rel=1e-6)
    assert both[0]["loss/kd_logits"] == frozen[0]["loss/kd_logits"]
    assert both[1]["loss/kd_logits"] != frozen[1]["loss/kd_logits"]
    found, expected = weights_of(tmp_path / "both", 3, TEACHER), weights_of(tmp_path / "alone", 3)
    assert len(expected) > 5 and found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    # The student's checkpoint is still one of the student alone.
    assert Checkpoint(tmp_path / "both").network.hidden_size == 36


def test_a_teacher_in_fp16_is_not_trained(inputs, tmp_path):
    half = import_hf(tmp_path, literate(hf_model(**LLAMA)).half())
    config = replace(settings(inputs, tmp_path / "run"), teacher=str(half), teacher_lr=1e-3)
    with pytest.raises(ConfigError, match="is in fp16, and teacher_lr = 0.001 trains it"):
        distill.distill(config)


def test_a_teacher_no_better_than_chance_is_refused(inputs, tmp_path):
    config = replace(settings(inputs, tmp_path / "run"), teacher=str(inputs / "narrow/checkpoint"))
    with pytest.raises(DataError, match=r"narrow/checkpoint has a loss of .* and chance over 101 tokens has 4\.615"):
        distill.distill(config)
    assert not (tmp_path / "run/checkpoints" / TRACKER).exists()


def run_first_half_in(config, parallel):
    def save_and_stop(*arguments):
        state.save_state(*arguments)
        raise KeyboardInterrupt

    saver.save_state = save_and_stop
    with pytest.raises(KeyboardInterrupt):
        run_in(config, parallel)


EVERYTHING = LossConfig(0.7, 0.4, hidden=HiddenConfig(0.5, Balance.DYNAMIC, projection=Projection.PER_PAIR))


@pytest.fixture(scope="module")
def whole(inputs):
    """The settings of a run of everything at once, and its metrics."""
    config = replace(
        settings(inputs, inputs / "whole", loss=EVERYTHING),
        student=str(inputs / "deep/checkpoint"),
        steps=4,
        save_every=2,
        teacher_lr=1e-3,
        micro_batch=2,
    )
    run_in(config, ParallelConfig())
    return config, read_metrics(inputs / "whole")


def test_a_step_says_where_its_time_went_and_what_it_did(whole):
    config, lines = whole
    networks = [Checkpoint(folder).network for folder in (config.student, config.teacher)]
    # Both networks are trained: a backward pass costs two forward passes.
    flops = 3 * sum(forward_flops_per_token(network, config.data.sequence_length) for network in networks)
    for line in lines:
        seconds = {name[len("time/") : -len("_s")]: value for name, value in line.items() if name.startswith("time/")}
        step, check = seconds.pop("step"), seconds.pop("teacher_check", 0.0)
        assert seconds.keys() == {"data", "teacher", "student", "optimizer"} and all(s > 0 for s in seconds.values())
        assert sum(seconds.values()) + check == pytest.approx(step)
        assert (check > 0) == (line["progress/step"] == 1)
        tokens = config.global_batch * config.data.sequence_length
        assert line["progress/tokens"] == line["progress/step"] * tokens
        tokens_per_s = line["throughput/tokens_per_s"]
        assert line["throughput/tokens_per_s_per_rank"] == tokens_per_s == pytest.approx(tokens / step)
        assert line["throughput/tflops_per_rank"] == pytest.approx(tokens_per_s * flops / 1e12)
        assert line["memory/rss_gib"] > 0


INTERLEAVED = ParallelConfig(pipeline=2, data=2, virtual_pipeline=2)


@pytest.mark.parametrize(
    "student, layout, optimizer",
    [
        ("deep", ParallelConfig(tensor=2, pipeline=2), {}),
        ("tied", INTERLEAVED, {"distributed": True, "overlap": True}),
    ],
    ids=["tp2_pp2", "interleaved, distributed"],
)
def test_a_run_of_several_ranks_goes_on_exactly_in_its_layout(inputs, whole, tmp_path, student, layout, optimizer):
    """With a projection that all pairs share, and a table, of which several stages have copies."""
    loss = replace(EVERYTHING, hidden=replace(EVERYTHING.hidden, projection=Projection.SHARED))
    config = replace(whole[0], loss=loss, optimizer=replace(whole[0].optimizer, **optimizer))
    config = replace(config, student=str(inputs / student / "checkpoint"))
    run_on_ranks(4, run_in, replace(config, output=str(tmp_path / "at_once")), layout)
    parts = replace(config, output=str(tmp_path / "parts"))
    run_on_ranks(4, run_first_half_in, parts, layout)
    run_on_ranks(4, run_in, parts, layout)
    found, expected = (read_metrics(tmp_path / run) for run in ("parts", "at_once"))
    for ours, theirs in zip(found, expected, strict=True):
        for key, value in theirs.items():
            if key.startswith(("loss/", "optim/", "teacher/")):
                assert ours[key] == value, (ours["progress/step"], key)
    found, expected = (weights_of(tmp_path / run, 4) for run in ("parts", "at_once"))
    assert all(torch.equal(found[key], weight) for key, weight in expected.items())


@pytest.mark.parametrize(
    "optimizer, before, after",
    [
        ({}, ParallelConfig(tensor=2, pipeline=2), ParallelConfig(pipeline=2, data=2)),
        ({"distributed": True}, ParallelConfig(pipeline=2, data=2), ParallelConfig(tensor=2, data=2, sequence=True)),
        ({}, INTERLEAVED, ParallelConfig(pipeline=4)),
        ({"distributed": True, "overlap": True}, ParallelConfig(tensor=2, data=2), INTERLEAVED),
    ],
    ids=["plain", "distributed", "interleaved before", "interleaved after, distributed"],
)
def test_a_run_goes_on_in_another_layout(whole, tmp_path, optimizer, before, after):
    config, expected = whole
    parts = replace(config, output=str(tmp_path / "parts"), optimizer=replace(config.optimizer, **optimizer))
    run_on_ranks(4, run_first_half_in, parts, before)
    run_on_ranks(4, run_in, replace(parts, recompute=True), after)
    found = read_metrics(tmp_path / "parts")
    assert len(found) == len(expected) == 4
    for ours, theirs in zip(found, expected, strict=True):
        for key in theirs:
            if key.startswith(("loss/", "optim/", "teacher/")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (ours["progress/step"], key)
