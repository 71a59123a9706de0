import json

import pytest

from minitron_megatron.config.schema import Tracker, TrackingConfig
from minitron_megatron.training.metrics import WANDB_ID, Metrics, read_metrics


def log_steps(folder, first, last, tracking=None, step=0):
    with Metrics(folder, step, tracking or TrackingConfig(), {"lr": 1.0}) as metrics:
        for step in range(first, last + 1):
            metrics.log({"progress/step": step, "loss/total": 1 / step})


def test_lines_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    with Metrics(tmp_path, 0, TrackingConfig(), {}) as metrics:
        metrics.log({"progress/step": 1, "loss/total": 2.5})
        assert read_metrics(tmp_path) == [{"progress/step": 1, "loss/total": 2.5}]


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path):
    log_steps(tmp_path, 1, 5)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"progress/step": 6, "loss/to')  # the run was killed here
    log_steps(tmp_path, 4, 6, step=3)
    assert [line["progress/step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_one_wandb_run_over_all_restarts(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    tracking = TrackingConfig(tracker=Tracker.WANDB, project="test", mode="offline")
    log_steps(tmp_path, 1, 2, tracking)
    first_id = (tmp_path / WANDB_ID).read_text()
    log_steps(tmp_path, 3, 4, tracking, step=2)
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{first_id}/run-{first_id}.wandb"))
    assert len(files) >= 1
    assert any(b"loss/total" in file.read_bytes() for file in files)
    assert (tmp_path / WANDB_ID).read_text() == first_id


def test_the_tracker_does_not_replace_the_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    log_steps(tmp_path, 1, 2, TrackingConfig(tracker=Tracker.WANDB, mode="disabled"))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss/total"] for line in lines] == pytest.approx([1, 0.5])
