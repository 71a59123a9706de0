"""A tracked training run as a whole: what its trackers know in the end, and what they must never know."""

import json
import sys
from dataclasses import replace

import pytest
import wandb

from minitron_megatron import distill
from minitron_megatron.config.schema import DataConfig, DistillConfig, DType, OptimizerConfig, Tracker, TrackingConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.tracking.metrics import Metrics, read_metrics
from minitron_megatron.training import setup
from tests.offline_wandb import artifacts, history, rows, sessions
from tests.tiny import LLAMA, hf_model, import_hf, literate

SECRETS = {"WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567", "SOME_TOKEN": "hf_WhatNobodyMayRead"}


@pytest.fixture
def config(tmp_path):
    import_hf(tmp_path / "model", literate(hf_model(**LLAMA)))
    (tmp_path / "text").mkdir()
    for number in range(20):
        (tmp_path / f"text/{number}.txt").write_text("abcdefgh"[number % 8] * (50 + number))
    return DistillConfig(
        str(tmp_path / "model/checkpoint"),
        str(tmp_path / "model/checkpoint"),
        str(tmp_path / "runs/tiny"),
        steps=4,
        save_every=2,
        global_batch=4,
        dtype=DType.FP32,
        optimizer=OptimizerConfig(warmup_steps=0),
        data=DataConfig([str(tmp_path / "text")], str(tmp_path / "corpora"), 16, seed=1),
        tracking=TrackingConfig([Tracker.WANDB, Tracker.TENSORBOARD], mode="offline"),
    )


def test_an_interrupted_run_is_one_run_without_secrets(config, tmp_path, monkeypatch, caplog, capfd):
    wandb.teardown()  # W&B reads the environment once
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    log = Metrics.log

    def interrupted(metrics, values):
        log(metrics, values)
        if values["progress/step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Metrics, "log", interrupted)
        distill(config)
    run = distill(config)
    wandb.teardown()

    ids, found = history(run)
    assert len(ids) == 1 and found == read_metrics(run) and len(found) == config.steps
    assert {"loss/total", "optim/lr", "throughput/tokens_per_s", "time/step_s", "memory/rss_gib"} < found[0].keys()
    first, last = sessions(run)
    assert len(rows(first)) == 3
    assert "figures/loss/width" in rows(last)[-1]
    names = [artifact.name.rpartition("-")[0] for artifact in artifacts(last)]
    assert names.index("hf") < names.index("checkpoint") and "text" in names and names[-1] == "tiny"
    assert list((run / "tensorboard").iterdir())

    texts = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert any(b"loss/total" in text for file, text in texts.items() if file.suffix == ".wandb")
    texts |= {"log": caplog.text.encode(), "screen": "".join(capfd.readouterr()).encode()}
    for secret in SECRETS.values():
        assert not [file for file, text in texts.items() if secret.encode() in text]


def test_a_tracker_that_does_not_start_is_found_before_a_model_is_built(config, monkeypatch):
    monkeypatch.setattr(setup, "build_model", None)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="wandb does not start"):
        distill(config)
    monkeypatch.undo()
    # What it left is no hindrance once that is mended.
    run = distill(replace(config, tracking=TrackingConfig()))
    assert json.loads((run / "manifest.json").read_text())["kind"] == "run"
