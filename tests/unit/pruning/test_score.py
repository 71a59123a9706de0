"""The verb `score`: interrupted and gone on with, left alone where it is done, and given what it cannot use."""

import shutil
from dataclasses import replace

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

import minitron_megatron
from minitron_megatron.config.schema import (
    Criterion,
    DataConfig,
    DepthConfig,
    DepthCriterion,
    DepthSearch,
    ParallelConfig,
    TargetConfig,
)
from minitron_megatron.data.encoding import load_tokenizer
from minitron_megatron.errors import ConfigError, DataError
from minitron_megatron.pruning.score import score
from minitron_megatron.pruning.scores import Scores
from minitron_megatron.pruning.skip_runner import SkipRunner
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf
from tests.unit.pruning.direct import assert_same


@pytest.fixture
def long(inputs):
    """A scoring of several sweeps and several rounds' worth of sums."""
    return {
        "greedy": dict(
            depth=DepthConfig(
                [DepthCriterion.LOSS, DepthCriterion.ACCURACY],
                search=DepthSearch.GREEDY,
                protect_first=0,
                choices=str(inputs / "questions.jsonl"),
            ),
            target=TargetConfig(layers=2),
        ),
        "rounds": dict(rounds=2, target=TargetConfig(layers=2, hidden=40, ffn=36)),
    }


class Counted:
    """Lets so many micro-batches run, and then does something else."""

    def __init__(self, limit, then):
        self.limit, self.then, self.calls, self.run = limit, then, 0, SkipRunner.run

    def __enter__(self):
        def run(ablation, *arguments):
            if self.calls == self.limit:
                self.then()
            self.calls += 1
            return self.run(ablation, *arguments)

        SkipRunner.run = run
        return self

    def __exit__(self, *exception):
        SkipRunner.run = self.run


def interrupt():
    raise KeyboardInterrupt


# 13 samples are seven micro-batches, so that sums are kept after 2, 4, 6 and 7 of every sweep; 7 choices are four,
# kept after 2 and 4. The last interruption comes in the second sweep or round.
@pytest.mark.parametrize("kind, total, limits", [("greedy", 2 * (7 + 4), (1, 5, 12)), ("rounds", 2 * 7, (1, 5, 6))])
def test_an_interrupted_scoring_goes_on_from_its_last_sums(settings, long, tmp_path, kind, total, limits):
    with Counted(None, None) as whole:
        expected = Scores.read(score(settings("expected", **long[kind])))
    assert whole.calls == total
    config, sums = settings(**long[kind]), tmp_path / ".scores.sums"
    left = total
    for limit in limits:
        with pytest.raises(KeyboardInterrupt), Counted(limit, interrupt) as counted:
            score(config)
        left -= limit - 1  # one more than was kept
        assert counted.calls == limit and sums.exists() == (left < total) and not (tmp_path / "scores").exists()
    with Counted(None, None) as counted:
        found = Scores.read(score(config))
    assert counted.calls == left
    assert_same(found, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "scores"]


def killed(config, limit):
    import os
    import signal

    with Counted(limit, lambda: os.kill(os.getpid(), signal.SIGKILL)):
        score(config)


def resumed(config, most):
    with Counted(most, interrupt) as counted:
        score(config)
    assert counted.calls == most


# Two at a time and replica; then three, which read what is left of the sweep or round, and all behind it.
@pytest.mark.parametrize(
    "kind, before, limit, after, most",
    [
        # Eight samples are done. What is left are 5, and 7 choices, then 13 and 7 again.
        ("greedy", ParallelConfig(), 5, ParallelConfig(pipeline=2), 2 + 3 + 5 + 3),
        ("greedy", ParallelConfig(tensor=2, sequence=True), 5, ParallelConfig(data=2), 1 + 2 + 3 + 2),
        # All of the first round, in four steps, and eight samples of the second.
        ("rounds", ParallelConfig(data=2), 4 + 3, ParallelConfig(tensor=2, sequence=True), 2),
        ("rounds", ParallelConfig(pipeline=2), 7 + 5, ParallelConfig(tensor=2), 2),
    ],
    ids=["one to pp2", "tp2 with sequence to dp2", "dp2 to tp2 with sequence", "pp2 to tp2"],
)
def test_a_killed_scoring_goes_on_in_another_layout(settings, long, tmp_path, kind, before, limit, after, most):
    expected = Scores.read(score(settings("expected", **long[kind])))
    config = settings(**long[kind])
    ranks = [p.tensor * p.pipeline * (p.data or 1) for p in (before, after)]
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_on_ranks(ranks[0], killed, replace(config, parallel=before), limit)
    assert (tmp_path / ".scores.sums").is_file()
    run_on_ranks(ranks[1], resumed, replace(config, micro_batch=3, parallel=after), most)
    assert_same(Scores.read(tmp_path / "scores"), expected, tolerance=1e-5)


@pytest.mark.parametrize("what", ["other settings", "damaged"])
def test_sums_of_something_else_are_not_taken_over(settings, tmp_path, what):
    config, sums = settings(), tmp_path / ".scores.sums"
    with pytest.raises(KeyboardInterrupt), Counted(5, interrupt):
        score(config)
    if what == "damaged":
        sums.write_bytes(sums.read_bytes()[:-9])
    else:
        config = settings(depth=DepthConfig([DepthCriterion.LOSS]))
    with Counted(None, None) as counted:
        found = Scores.read(score(config))
    assert counted.calls == 7
    assert_same(found, Scores.read(score(replace(config, output=str(tmp_path / "expected")))))


def test_finished_scores_are_left_alone_and_good_for_any_target(settings):
    first = score(settings())
    before = first.joinpath("manifest.json").stat().st_mtime_ns
    assert score(settings(target=TargetConfig(ffn=30))) == first
    assert score(settings(parallel=ParallelConfig(), micro_batch=5)) == first
    assert first.joinpath("manifest.json").stat().st_mtime_ns == before


def test_a_text_that_changed_is_not_taken_for_the_same(inputs, settings, tmp_path):
    text = tmp_path / "text.jsonl"
    shutil.copy(inputs / "text.jsonl", text)
    config = settings(data=DataConfig([str(text)], str(tmp_path / "corpora"), 16))
    score(config)
    text.write_text(text.read_text().replace("a", "b"))
    with pytest.raises(ConfigError, match="holds a result of other settings or inputs .*text 1"):
        score(config)


def test_an_order_decided_by_one_criterion_is_not_used_for_another(settings, tmp_path):
    depth = DepthConfig([DepthCriterion.BLOCK_INFLUENCE, DepthCriterion.KL], search=DepthSearch.GREEDY)
    scores = Scores.read(score(settings(depth=depth, target=TargetConfig(layers=3))))
    minitron_megatron.make_plan(scores, TargetConfig(layers=3), depth_criterion=DepthCriterion.BLOCK_INFLUENCE)
    with pytest.raises(ConfigError, match="depth_criterion = kl, and the order .* decided by block_influence"):
        minitron_megatron.make_plan(scores, TargetConfig(layers=3), depth_criterion=DepthCriterion.KL)


def test_questions_that_overflow_are_named(inputs, settings, tmp_path):
    """The tokens of the questions alone are broken, so that nothing else notices."""
    model = hf_model(**LLAMA)
    with torch.no_grad():
        [token] = load_tokenizer(inputs / "checkpoint/huggingface")("x", add_special_tokens=False)["input_ids"]
        model.model.embed_tokens.weight[token] = torch.inf
    checkpoint = import_hf(tmp_path / "broken", model)
    depth = DepthConfig([DepthCriterion.ACCURACY], choices=str(inputs / "questions.jsonl"))
    with pytest.raises(DataError, match="of the network are not finite in "):
        score(settings(checkpoint=str(checkpoint), criterion=Criterion.RANDOM, depth=depth))


def test_a_choice_that_is_no_question_names_its_line(settings, tmp_path):
    file = tmp_path / "questions.jsonl"
    good = '{"context": "a", "choices": ["b", "c"], "answer": 1}\n'
    depth = DepthConfig([DepthCriterion.ACCURACY], choices=str(file))
    for bad, message in (
        ("{", r"questions.jsonl, line 2 is not JSON with context, choices and answer: "),
        ('{"context": "a", "choices": ["b", "c"]}', "line 2 is not JSON with .*: KeyError\\('answer'\\)"),
        ("[1]", "line 2 is not JSON with context, choices and answer"),
        ('{"context": "", "choices": ["b", "c"], "answer": 1}', "line 2: context = '' must be text, and more than"),
        ('{"context": " ", "choices": ["b", "c"], "answer": 1}', "line 2: context = ' ' must be text, and more than"),
        (
            '{"context": "a", "choices": ["b"], "answer": 0}',
            r"line 2: choices = \['b'\] must be a list of at least two",
        ),
        ('{"context": "a", "choices": ["b", ""], "answer": 0}', "line 2: choices = .* none empty"),
        ('{"context": "a", "choices": "bc", "answer": 0}', "line 2: choices = 'bc' must be a list"),
        (
            '{"context": "a", "choices": ["b", "c"], "answer": 2}',
            "line 2: answer = 2 must be the index of one of the 2",
        ),
        ('{"context": "a", "choices": ["b", "c"], "answer": true}', "line 2: answer = True must be the index"),
    ):
        file.write_text(good + bad + "\n" + good)
        with pytest.raises(DataError, match=message):
            score(settings(depth=depth))
    # What ends a line elsewhere may stand in a text of JSON.
    file.write_text(f"{good} \n" + good.replace('"a"', '"a\u2028b"') + "[1]", encoding="utf-8")
    with pytest.raises(DataError, match="line 4 is not JSON"):
        score(settings(depth=depth))
    file.write_text("\n")
    with pytest.raises(DataError, match=r"questions.jsonl is empty: give a line of JSON"):
        score(settings(depth=depth))
    file.unlink()
    with pytest.raises(DataError, match="cannot be read: "):
        score(settings(depth=depth))
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_end_a_scoring_with_nothing_written(inputs, settings, tmp_path):
    model = hf_model(**LLAMA)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[1, 1] = torch.inf
    checkpoint = import_hf(tmp_path / "broken", model)
    message = r"activations of layer 3 \(hidden\) are not finite in samples 0 to 1: score in another dtype, or look at"
    with pytest.raises(DataError, match=message):
        score(settings(checkpoint=str(checkpoint)))
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_a_text_that_is_shorter_than_a_sequence_is_named(inputs, settings, tmp_path):
    data = DataConfig([str(inputs / "text.jsonl")], str(inputs / "corpora"), 5000)
    with pytest.raises(DataError, match="tokens, but data.sequence_length = 5000 needs 5001: add text, shorten"):
        score(settings(data=data))
    assert list(tmp_path.iterdir()) == []


def test_a_text_with_fewer_sequences_than_asked_for_is_read_once(inputs, settings, caplog):
    found = Scores.read(score(settings("all", num_samples=10**6)))
    count = found.settings["num_samples"]
    assert f"num_samples = 1000000: the text has only {count} sequences" in caplog.text
    assert_same(found, Scores.read(score(settings("counted", num_samples=count))))
    caplog.clear()
    fewer = Scores.read(score(settings("fewer", num_samples=count - 1)))
    assert fewer.settings["num_samples"] == count - 1 and "has only" not in caplog.text
