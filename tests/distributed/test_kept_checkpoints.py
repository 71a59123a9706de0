"""Which checkpoints of a run stay: those seen to work, and the best, whatever comes after."""

from dataclasses import replace

import pytest
import torch

from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import Checkpoint, iteration_folder, latest_folder
from minitron_megatron.config.schema import ExportConfig
from minitron_megatron.distillation.result import EntryResult, StepResult
from minitron_megatron.errors import TrainingError
from minitron_megatron.training import distill, loop, saver, state
from minitron_megatron.training.optimizer import TrainableModel
from tests.distributed.distilling import settings


def measured(num_tokens, **losses):
    """The result of a step, as if its losses had been these."""
    entries = {name: EntryResult(1.0, {name: loss * num_tokens}, {name: num_tokens}) for name, loss in losses.items()}
    return StepResult(entries, num_tokens)


@pytest.mark.parametrize("validate_every", [None, 2])
def test_a_checkpoint_stays_until_the_next_one_is_seen_to_work(inputs, tmp_path, monkeypatch, validate_every):
    """Step 4 ruins the weights, and saves them: only what comes after shows it, or its validation."""
    step = TrainableModel.step

    def ruining(model):
        lr = step(model)
        if model.schedule.num_steps == 4:
            next(iter(model.model_chunks[0].parameters())).data.fill_(torch.nan)
        return lr

    config = replace(settings(inputs, tmp_path / "run"), steps=9, save_every=2, max_skipped_steps=3)
    monkeypatch.setattr(TrainableModel, "step", ruining)
    with pytest.raises(TrainingError, match="in the last 3 steps"):
        distill.distill(replace(config, validate_every=validate_every))
    folders = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("iter_*"))
    assert folders == [iteration_folder(step) for step in ([2, 4] if validate_every is None else [2])]
    assert Checkpoint(tmp_path / "run").iteration == 2
    # It goes on from there, and what it goes on from stays until it has saved another.
    monkeypatch.setattr(TrainableModel, "step", step)
    saved, save = [], saver.save_state

    def watched(root, *arguments):
        saved.append(latest_folder(root).is_dir())
        save(root, *arguments)

    monkeypatch.setattr(saver, "save_state", watched)
    distill.distill(replace(config, validate_every=validate_every))
    assert all(saved) and len(saved) == 4 and Checkpoint(tmp_path / "run").iteration == 9


def test_the_best_checkpoint_stays_whatever_comes_after(inputs, tmp_path, monkeypatch):
    losses = iter([3.0, float("nan"), 2.0, 1.0, 2.0, 1.5])
    monkeypatch.setattr(loop, "validate", lambda *arguments: measured(1, kd_logits=next(losses), lm=9.0))
    config = replace(
        settings(inputs, tmp_path / "run"), steps=6, save_every=3, validate_every=1, keep_checkpoints=2, micro_batch=2
    )
    announced = []
    announce = state._announce
    monkeypatch.setattr(state, "_announce", lambda *a: (announced.append((a[1].name, a[2])), announce(*a)))
    distill.distill(config)
    # Beside those of every third step and the last, those that were the best so far.
    assert announced == [(iteration_folder(n), best) for n, best in ((1, True), (3, True), (4, True), (6, False))]
    folders = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("iter_*"))
    assert folders == [iteration_folder(4), iteration_folder(6)]
    best = Checkpoint(tmp_path / "run/best")
    assert best.iteration == 4 and best.manifest.kind == "checkpoint"
    assert (best.huggingface_folder / "tokenizer.json").is_file()
    assert sorted(path.name for path in (tmp_path / "run").iterdir() if path.name.startswith(".")) == []
    exported = export(ExportConfig(str(tmp_path / "run/best"), str(tmp_path / "exported")))
    assert (exported / "config.json").is_file()


def test_the_best_loss_so_far_outlives_an_interruption(inputs, tmp_path, monkeypatch, stop_after_saving):
    config = replace(settings(inputs, tmp_path / "run"), steps=3, save_every=None, validate_every=1, micro_batch=2)
    losses = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(loop, "validate", lambda *arguments: measured(1, kd_logits=next(losses), lm=0.0))
    with stop_after_saving():
        distill.distill(config)
    distill.distill(config)
    assert Checkpoint(tmp_path / "run/best").iteration == 1 and Checkpoint(tmp_path / "run").iteration == 3
