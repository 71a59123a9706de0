"""Steps, runs and evaluations without one token that counts."""

import dataclasses
import json
import math

import pytest
import torch
from megatron.core.dist_checkpointing import load_plain_tensors

from minitron_megatron.checkpoint.dist_reader import iteration_folder, latest_folder
from minitron_megatron.config.schema import (
    DataConfig,
    DistillConfig,
    DType,
    EvaluateConfig,
    OptimizerConfig,
    ParallelConfig,
    ScoreConfig,
)
from minitron_megatron.data.samples import TrainingSamples
from minitron_megatron.errors import DataError, TrainingError
from minitron_megatron.evaluation.evaluate import evaluate
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.pruning.score import score
from minitron_megatron.tracking.metrics import read_metrics
from minitron_megatron.training import distill
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf, literate

BATCH = 4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    import_hf(folder, literate(hf_model(**LLAMA)))
    import_hf(folder / "narrow", hf_model(seed=1, **{**LLAMA, "hidden_size": 36, "num_hidden_layers": 2}))
    lines = ["abcdefgh"[number % 8] * (50 + number) for number in range(20)]
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    template = "{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}<eos>{% endif %}{% endfor %}"
    (folder / "checkpoint/huggingface/chat_template.jinja").write_text(template)
    turns = [{"role": "user", "content": "a" * 500}, {"role": "assistant", "content": "b"}]
    chat = [{"messages": [{**turns[0], "content": letter * 500}, turns[1]]} for letter in "abcdefgh"]
    (folder / "chat.jsonl").write_text("".join(json.dumps(line) + "\n" for line in chat))
    return folder


def settings(inputs, output, **changes):
    return DistillConfig(
        str(inputs / "checkpoint"),
        str(inputs / "narrow/checkpoint"),
        str(output),
        **{"steps": 4, "global_batch": BATCH, "micro_batch": 2, "dtype": DType.FP32, "save_every": 1, **changes},
        optimizer=OptimizerConfig(warmup_steps=0),
        data=DataConfig([str(inputs / "text.jsonl")], str(inputs / "corpora"), 16, seed=1),
    )


class Masked(TrainingSamples):
    """Samples whose loss mask is zero in some steps."""

    def __init__(self, samples, steps):
        self.__dict__.update(samples.__dict__)
        self.steps = steps

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        is_empty = index // BATCH + 1 in self.steps
        return {**sample, "loss_mask": torch.zeros_like(sample["loss_mask"])} if is_empty else sample


def run_without_tokens_in(steps, config, parallel=None):
    """Trains with a mask of zeros in some steps, counted from 1."""
    with pytest.MonkeyPatch.context() as patch:
        make = distill.training_samples
        patch.setattr(distill, "training_samples", lambda *args: Masked(make(*args), steps))
        distill.distill(dataclasses.replace(config, parallel=parallel) if parallel else config)


def state_of(output, step):
    """Weights and moments in a checkpoint of a run."""
    with parallel_context(ParallelConfig()):
        values = load_plain_tensors(str(output / "checkpoints" / iteration_folder(step)))
    return {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}


def test_a_step_without_tokens_changes_nothing_and_is_counted(inputs, tmp_path):
    run_without_tokens_in({2, 3}, settings(inputs, tmp_path / "run", keep_checkpoints=9))
    lines = read_metrics(tmp_path / "run")
    assert [line["progress/skipped_steps"] for line in lines] == [0, 1, 2, 2]
    assert [math.isnan(line["loss/total"]) for line in lines] == [False, True, True, False]
    before, after = (state_of(tmp_path / "run", step) for step in (1, 3))
    assert any("exp_avg" in key for key in before)
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert any(not torch.equal(value, after[key]) for key, value in state_of(tmp_path / "run", 4).items())
    run_without_tokens_in(set(), settings(inputs, tmp_path / "whole"))
    whole = read_metrics(tmp_path / "whole")
    assert [line["optim/lr"] for line in whole[:2]] == [lines[0]["optim/lr"], lines[3]["optim/lr"]]


def test_a_run_with_such_steps_goes_on_as_if_it_had_not_ended(inputs, tmp_path, monkeypatch):
    config = settings(inputs, tmp_path / "whole")
    run_without_tokens_in({2, 3}, config)
    parts = settings(inputs, tmp_path / "parts")
    stop_after = iter([False, False, True])
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        save = distill.Saver.save

        def save_and_end(*args):
            save(*args)
            if next(stop_after):
                raise InterruptedError

        patch.setattr(distill.Saver, "save", save_and_end)
        run_without_tokens_in({2, 3}, parts)
    run_without_tokens_in({2, 3}, parts)
    whole, resumed = read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts")
    for ours, theirs in zip(resumed, whole, strict=True):
        assert {key: repr(v) for key, v in ours.items() if key.startswith(("loss", "optim", "progress"))} == {
            key: repr(v) for key, v in theirs.items() if key.startswith(("loss", "optim", "progress"))
        }


def run_in(config, parallel):
    run_without_tokens_in({1, 3}, config, parallel)


def test_such_steps_are_the_same_in_every_layout(inputs, tmp_path):
    """The first one, too: the teacher is looked at in the first step with tokens."""
    run_without_tokens_in({1, 3}, settings(inputs, tmp_path / "one"))
    run_on_ranks(2, run_in, settings(inputs, tmp_path / "two"), ParallelConfig(data=2))
    one, two = read_metrics(tmp_path / "one"), read_metrics(tmp_path / "two")
    assert [line["progress/skipped_steps"] for line in one] == [1, 1, 2, 2]
    assert ["teacher/first_lm" in line for line in one] == [False, True, False, False]
    for ours, theirs in zip(two, one, strict=True):
        for key in theirs:
            if key.startswith(("loss/", "optim/", "teacher/", "progress/")):
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4, nan_ok=True), key


def test_too_many_steps_without_tokens_end_the_run(inputs, tmp_path):
    config = settings(inputs, tmp_path / "run", steps=9, max_skipped_steps=3)
    with pytest.raises(TrainingError, match=r"no token counts in the last 3 steps, .* step 4, of sequences 12 to 15:"):
        run_without_tokens_in({2, 3, 4}, config)
    assert latest_folder(tmp_path / "run/checkpoints").name == iteration_folder(3)


def test_nothing_to_learn_or_to_measure_is_refused_before_any_work(inputs, tmp_path):
    """Sequences are shorter than what is asked, and none of the held-out ones has an answer."""
    with pytest.raises(DataError, match="none of the 16 training sequences has a token that counts"):
        run_without_tokens_in(set(range(99)), settings(inputs, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    data = DataConfig([str(inputs / "chat.jsonl")], str(inputs / "corpora"), 32, heldout_pct=15)
    common = {"data": data, "dtype": DType.FP32}
    config = EvaluateConfig(str(inputs / "checkpoint"), str(tmp_path / "evaluation"), num_samples=2, **common)
    with pytest.raises(DataError, match="none of the 2 held-out sequences has a token that counts"):
        evaluate(config)
    assert not (tmp_path / "evaluation").exists()
    validated = settings(inputs, tmp_path / "validated", validate_every=1, validate_batches=1)
    chat = dataclasses.replace(data, text=[str(inputs / "chat.jsonl")], weights=None)
    with pytest.raises(DataError, match="none of the 4 first held-out sequences has a token that counts"):
        distill.distill(dataclasses.replace(validated, student=str(inputs / "checkpoint"), data=chat))
    with pytest.MonkeyPatch.context() as patch:
        from minitron_megatron.pruning import score as verb

        make = verb.training_samples
        patch.setattr(verb, "training_samples", lambda *args: Masked(make(*args), set(range(99))))
        scoring = ScoreConfig(str(inputs / "checkpoint"), str(tmp_path / "scores"), num_samples=4, **common)
        with pytest.raises(DataError, match="none of the 4 calibration sequences has a token that counts"):
            score(scoring)
