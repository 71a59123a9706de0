"""Evaluation in a layout against evaluation in one process."""

import json

import pytest

from minitron_megatron.config.parallel import InferenceParallelConfig
from minitron_megatron.config.schema import DataConfig, DType, EvaluateConfig
from tests.local_tasks import TASKS, write_tasks
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, hf_model, import_hf

pytest.importorskip("lm_eval")

LAYOUTS = {
    "tensor": InferenceParallelConfig(tensor=2),
    "shared groups": InferenceParallelConfig(tensor=4),
    "pipeline_data": InferenceParallelConfig(pipeline=2, data=2),
}


def config(folder, output, parallel):
    return EvaluateConfig(
        str(folder / "checkpoint"),
        str(folder / output),
        micro_batch=3,
        tasks=TASKS,
        task_dir=str(folder / "tasks"),
        dtype=DType.FP32,
        data=DataConfig([str(folder / "text.jsonl")], str(folder / "corpora"), sequence_length=32, heldout_pct=30.0),
        parallel=parallel,
    )


def measure(config):
    from minitron_megatron.evaluation.evaluate import evaluate

    evaluate(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    import_hf(folder, hf_model(**{**LLAMA, "num_attention_heads": 8}))
    write_tasks(folder / "tasks")
    lines = [{"text": "abcdefgh"[i:] * 8} for i in range(8)]
    (folder / "text.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    measure(config(folder, "alone", InferenceParallelConfig()))
    return folder


def flat(values, name=""):
    """The numbers and texts in nested values, by path."""
    if not isinstance(values, dict):
        return {name: values}
    return {key: value for part in values for key, value in flat(values[part], f"{name}.{part}").items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_measures_what_one_process_does(folder, layout):
    parallel = LAYOUTS[layout]
    run_on_ranks(parallel.tensor * parallel.pipeline * (parallel.data or 1), measure, config(folder, layout, parallel))
    found, expected = (flat(json.loads((folder / name / "evaluation.json").read_text())) for name in (layout, "alone"))
    assert found.pop(".generation.tokens_per_s") > 0 and expected.pop(".generation.tokens_per_s") > 0
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
