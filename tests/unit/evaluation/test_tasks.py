"""Tasks of lm-eval on a checkpoint, against lm-eval's own transformers backend on the exported model."""

import json
import math
import os
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.config.schema import DataConfig, DType, EvaluateConfig, ExportConfig, ParallelConfig
from minitron_megatron.errors import ConfigError, DataError
from tests.local_tasks import TASKS, write_tasks
from tests.tiny import LLAMA, hf_model, import_hf

pytest.importorskip("lm_eval")

TEMPLATE = "{% for m in messages %}{{ 'e' if m.role == 'user' else 'f' }}{{ m.content }}{% endfor %}g"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a checkpoint and as a Hugging Face folder, tasks, and some text."""
    from minitron_megatron.checkpoint.convert import export

    folder = tmp_path_factory.mktemp("tasks")
    import_hf(folder, hf_model(**LLAMA))
    export(ExportConfig(str(folder / "checkpoint"), str(folder / "exported")))
    write_tasks(folder / "tasks")
    (folder / "text").mkdir()
    for i in range(10):
        (folder / "text" / f"{i}.txt").write_text("abcdefgh"[i % 8 :] * 5 + "abcdefgh"[:i])
    return folder


def settings(folder, model, output, **changes):
    data = DataConfig([str(folder / "text")], str(folder / "corpora"), sequence_length=32, heldout_pct=20.0)
    options = dict(tasks=TASKS, task_dir=str(folder / "tasks"), micro_batch=4, generate_tokens=64, dtype=DType.FP32)
    return EvaluateConfig(str(folder / model), str(folder / output), data=data, **{**options, **changes})


def measure(config):
    from minitron_megatron.evaluation.evaluate import evaluate

    return json.loads((evaluate(config) / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def result(folder):
    return measure(settings(folder, "checkpoint", "ours"))


def assert_equal_tasks(one, other):
    """The same tasks, with numbers that are equal but for rounding."""
    assert flat(one) == pytest.approx(flat(other), rel=1e-5)


def flat(values, name=""):
    if not isinstance(values, dict):
        return {name: -1.0 if values is None else values}
    return {key: value for part in values for key, value in flat(values[part], f"{name}.{part}").items()}


def test_a_checkpoint_and_its_export_have_the_same_scores(folder, result):
    theirs = measure(settings(folder, "exported", "theirs"))
    assert_equal_tasks(result["tasks"], theirs["tasks"])
    assert result["generation"]["text"] == theirs["generation"]["text"]
    # Of models that know something and not all.
    values = {name: task["metrics"] for name, task in result["tasks"].items()}
    assert 0 < values["letter_choice"]["acc"]["value"] < 1 and values["letter_choice"]["acc"]["stderr"] > 0
    assert 0 < values["letter_writing"]["lower"]["value"] < values["letter_writing"]["length"]["value"]
    assert values["letter_text"]["byte_perplexity"]["value"] > 1
    assert values["letter_text"]["byte_perplexity"]["higher_is_better"] is False
    assert [task["num_samples"] for task in result["tasks"].values()] == [14, 9, 7]
    assert [task["num_fewshot"] for task in result["tasks"].values()] == [2, 0, 0]
    # The questions of what is a mean of them, by which recoveries are compared; a perplexity is none.
    questions = json.loads((folder / "ours" / "questions.json").read_text())
    assert {name: list(own) for name, own in questions.items()} == {
        "letter_choice": ["acc", "acc_norm"],
        "letter_writing": ["lower", "length"],
        "letter_text": [],
    }
    assert {len(own) for own in questions["letter_choice"].values()} == {14}
    assert sum(questions["letter_choice"]["acc"]) / 14 == pytest.approx(values["letter_choice"]["acc"]["value"])


def test_settings_reach_the_tasks(folder, result):
    """Other examples, fewer questions, and a chat template, which both ways read from the tokenizer."""
    for name in ("exported", "checkpoint/release/huggingface", "checkpoint/huggingface"):
        if (file := folder / name / "tokenizer_config.json").exists():
            file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    changes = dict(num_fewshot=1, limit=5, chat_template=True, generate_tokens=0)
    ours, theirs = (
        measure(settings(folder, model, f"chat_{model}", **changes)) for model in ("checkpoint", "exported")
    )
    assert_equal_tasks(ours["tasks"], theirs["tasks"])
    assert [task["num_samples"] for task in ours["tasks"].values()] == [5, 5, 5]
    assert ours["tasks"]["letter_choice"]["num_fewshot"] == 1
    assert ours["tasks"]["letter_writing"]["metrics"] != result["tasks"]["letter_writing"]["metrics"]


@pytest.mark.parametrize(
    "changes, error, named",
    [
        ({"tasks": ["broken"]}, DataError, r"tasks = \['broken'\] cannot be loaded: .*nowhere"),
        ({"task_dir": "nowhere"}, ConfigError, "task_dir = nowhere is not a folder"),
    ],
)
def test_a_task_that_cannot_be_loaded_is_named_before_any_work(folder, monkeypatch, changes, error, named):
    from minitron_megatron.evaluation import evaluate

    text = (folder / "tasks" / "letter_choice.yaml").read_text()
    text = text.replace("task: letter_choice", "task: broken").replace("test.jsonl", "nowhere.jsonl")
    (folder / "tasks" / "broken.yaml").write_text(text)
    monkeypatch.setattr(evaluate, "build_model", None)
    monkeypatch.setattr(evaluate, "prepare_corpus", None)
    with pytest.raises(error, match=named):
        measure(settings(folder, "checkpoint", "unknown", **changes))
    os.remove(folder / "tasks" / "broken.yaml")


def test_an_unknown_task_is_named_with_those_that_may_be_meant():
    from minitron_megatron.evaluation.tasks import _unknown

    assert _unknown("arc_esay", ["arc_easy", "mmlu"]).endswith("not a task: did you mean arc_easy?")
    assert "`lm-eval ls tasks`" in _unknown("xyzzy", ["arc_easy", "mmlu"])


# Not periodic: lm-eval's own backend takes windows with the same input for one, and then scores a wrong part of it.
def test_a_perplexity_beyond_the_largest_number_is_infinite_and_loses_no_work(folder, tmp_path):
    """Of a model that is sure of itself and wrong: a word of 150 letters has a likelihood below exp(-710)."""
    shutil.copytree(folder / "exported", tmp_path / "sure")
    tensors = load_file(tmp_path / "sure/model.safetensors")
    tensors["lm_head.weight"] *= 1e3
    save_file(tensors, tmp_path / "sure/model.safetensors", {"format": "pt"})
    found = measure(settings(folder, str(tmp_path / "sure"), str(tmp_path / "out"), tasks=["letter_text"]))
    metrics = found["tasks"]["letter_text"]["metrics"]
    assert metrics["word_perplexity"]["value"] == math.inf
    assert 0 < metrics["bits_per_byte"]["value"] < math.inf


LONG = "".join(random.Random(0).choice("abcdefgh") for _ in range(160))
REQUESTS = {
    "loglikelihood": [
        ("abcabc", "d"),
        ("abcabc", "e"),
        ("a", "bcdef"),
        ("", "abc"),
        ("abc ", "d"),
        ("abcdefgh" * 9, "abcde"),  # longer than the model's 64 positions
        ("ab", "h" * 70),
    ],
    "loglikelihood_rolling": [("abc",), ("a" * 64,), (LONG,)],
    "generate_until": [
        ("abc", {"until": ["4 4", "]"], "max_gen_toks": 30}),
        ("abcdefghabc", {"until": ["4 4", "]"], "max_gen_toks": 30}),
        ("a", {"until": "b c", "max_gen_toks": 5, "do_sample": False, "temperature": 0.0}),
        ("abcdefgh" * 9, {"until": ["f"], "max_gen_toks": 30}),
    ],
}


@pytest.fixture(scope="module")
def backends(folder):
    """The checkpoint and the exported model, as language models of lm-eval."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, GenerationConfig

    from minitron_megatron.data.tokens import load_tokenizer
    from minitron_megatron.evaluation.lm import MegatronLM
    from minitron_megatron.parallel.context import parallel_context
    from tests.unit.evaluation.test_inference import open_inference

    tokenizer = load_tokenizer(folder / "exported")
    model = AutoModelForCausalLM.from_pretrained(folder / "exported", dtype=torch.float32)
    with parallel_context(ParallelConfig()) as ctx:
        inference = open_inference(folder / "checkpoint", ctx)
        inference.tokenizer = tokenizer
        inference.end_tokens = [model.generation_config.eos_token_id]

        def call(method, *arguments):
            return getattr(inference, method)(*arguments)

        ours = MegatronLM(call, tokenizer, LLAMA["max_position_embeddings"], GenerationConfig())
        yield ours, HFLM(model, "causal", tokenizer=tokenizer, batch_size=3, softmax_dtype="float32")


@pytest.mark.parametrize("method", REQUESTS)
def test_both_backends_answer_alike(backends, method):
    from lm_eval.api.instance import Instance

    requests = REQUESTS[method]
    if method == "loglikelihood":
        requests = [pair for pair in requests if len(pair[1]) <= 64]  # which lm-eval's own backend refuses
    instances = [Instance(method, {}, arguments, 0) for arguments in requests]
    found, expected = (getattr(lm, method)(instances, disable_tqdm=True) for lm in backends)
    if method == "generate_until":
        assert found == expected and len(set(found)) > 2
    elif method == "loglikelihood":
        assert [total for total, _ in found] == pytest.approx([total for total, _ in expected], rel=1e-5)
        assert [best for _, best in found] == [best for _, best in expected]
    else:
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"num_beams": 4}, "supported are until, max_gen_toks"),
        ({"repetition_penalty": 1.2}, "repetition_penalty"),
        ({"max_gen_toks": 64}, "max_gen_toks = 64 of a task leaves no room for its questions in the model's 64"),
    ],
)
def test_what_a_task_may_not_ask_for_is_named(backends, arguments, named):
    from lm_eval.api.instance import Instance

    with pytest.raises(ConfigError, match=named):
        backends[0].generate_until([Instance("generate_until", {}, ("abc", {"max_gen_toks": 5} | arguments), 0)])


def test_sampling_is_what_the_task_or_the_model_says(backends):
    """transformers' own default is to draw from the 50 likeliest."""
    ours = backends[0]
    drawn = ours._params({"do_sample": True, "temperature": 0.7, "max_gen_toks": 5, "top_p": 0.9})
    assert (drawn.sample, drawn.temperature, drawn.top_p, drawn.top_k, drawn.min_p) == (True, 0.7, 0.9, 50, None)
    assert ours._params({"do_sample": False, "max_gen_toks": 5}).sample is False
