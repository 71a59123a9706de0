"""Steps that are not finite are skipped by all ranks and counted; step after step of them ends a run."""

from dataclasses import replace
from itertools import count

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.checkpoint.dist_reader import Checkpoint, iteration_folder
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.distillation.step import DistillationStep
from minitron_megatron.errors import TrainingError
from minitron_megatron.tracking.metrics import read_metrics
from minitron_megatron.training import distill
from tests.distributed.distilling import run_in, settings, weights_of
from tests.ranks import run_on_ranks


def poisoned_in(steps, where):
    """A step of training whose gradients, or whose losses, are not finite in some of the steps."""
    train, calls = DistillationStep.train, count(1)

    def poisoned(step, batches, number):
        result = train(step, batches, number)
        if next(calls) in steps:
            if where == "gradient":
                next(iter(step.student[0].parameters())).main_grad.view(-1)[3] = torch.inf
            else:
                result.entries["kd_logits"].numerators["kd_logits"] = torch.nan
        return result

    return poisoned


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_a_step_that_is_not_finite_is_skipped_and_counted(inputs, tmp_path, monkeypatch, where):
    """Nothing moves, not even the learning rate: what follows is as if the step had been left out of the schedule."""
    config = replace(
        settings(inputs, tmp_path / "run"), student=str(inputs / "narrow/checkpoint"), steps=4, save_every=1
    )
    for ended_by, output in ((3, "ended"), (4, "run")):
        with monkeypatch.context() as patch:
            patch.setattr(DistillationStep, "train", poisoned_in({2, 3}, where))
            distill.distill(replace(config, steps=ended_by, output=str(tmp_path / output)))
    lines = read_metrics(tmp_path / "run")
    assert [line["progress/skipped_steps"] for line in lines] == [0, 1, 2, 2]
    # The end is saved in any case, and what was there before a skipped step stays.
    states = {step: weights_of(tmp_path / "ended", step) for step in (1, 3)}
    assert not (tmp_path / "ended/checkpoints" / iteration_folder(2)).exists()
    for key, weight in states[1].items():
        assert torch.equal(weight, states[3][key])
    [last] = (tmp_path / "run/checkpoints").glob("iter_*")
    assert last.name == iteration_folder(4)
    assert any(not torch.equal(weight, states[1][key]) for key, weight in weights_of(tmp_path / "run", 4).items())
    distill.distill(replace(config, output=str(tmp_path / "whole")))
    whole = read_metrics(tmp_path / "whole")
    assert [line["optim/lr"] for line in whole[:2]] == [lines[0]["optim/lr"], lines[3]["optim/lr"]]


def run_poisoned_in(config, parallel):
    """The same, but that one gradient is not finite in the second step, on one rank alone and before it is reduced."""
    train, calls = DistillationStep.train, count(1)

    def poisoned(step, batches, number):
        if next(calls) != 2 or dist.get_rank() != dist.get_world_size() - 1:
            return train(step, batches, number)
        parameter = next(iter(step.student[0].parameters()))
        hook = parameter.register_hook(lambda grad: grad + torch.inf)
        try:
            return train(step, batches, number)
        finally:
            hook.remove()

    DistillationStep.train = poisoned
    run_in(config, parallel)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param({}, id="plain"),
        pytest.param({"distributed": True, "overlap": True}, id="distributed", marks=pytest.mark.oldest),
    ],
)
def test_all_ranks_skip_what_is_not_finite_on_one(inputs, tmp_path, monkeypatch, optimizer):
    config = replace(settings(inputs, tmp_path / "one"), student=str(inputs / "narrow/checkpoint"), steps=3)
    config = replace(config, micro_batch=2, save_every=None)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationStep, "train", poisoned_in({2}, "gradient"))
        distill.distill(config)
    many = replace(config, output=str(tmp_path / "many"), optimizer=replace(config.optimizer, **optimizer))
    run_on_ranks(4, run_poisoned_in, many, ParallelConfig(pipeline=2, data=2))
    one, many = (read_metrics(tmp_path / run) for run in ("one", "many"))
    assert [line["progress/skipped_steps"] for line in many] == [0, 1, 1]
    for ours, theirs in zip(many, one, strict=True):
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=1e-5)
    found, expected = (weights_of(tmp_path / run, 3) for run in ("many", "one"))
    for key, weight in expected.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-4, atol=1e-5)


def test_a_run_stops_when_step_after_step_is_not_finite(inputs, tmp_path, monkeypatch):
    config = replace(settings(inputs, tmp_path / "run"), steps=9, save_every=1, max_skipped_steps=3, global_batch=4)
    with monkeypatch.context() as patch:
        patch.setattr(DistillationStep, "train", poisoned_in({2, 4, 5, 6}, "gradient"))
        with pytest.raises(TrainingError, match="in the last 3 steps.* In step 6, of sequences 20 to 23, the loss was"):
            distill.distill(config)
    assert Checkpoint(tmp_path / "run").iteration == 3  # what came after may be what is wrong
    assert read_metrics(tmp_path / "run")[-1]["progress/skipped_steps"] == 4
    distill.distill(config)  # and goes on from there, should it be lucky now
    assert Checkpoint(tmp_path / "run").iteration == 9
