"""A tiny checkpoint, text and questions, and the settings to score it by."""

import json

import numpy as np
import pytest

from minitron_megatron.config.schema import (
    DataConfig,
    DType,
    ScoreConfig,
)
from tests.tiny import LLAMA, hf_model, import_hf

NUM_SAMPLES, MICRO_BATCH = 13, 2
QUESTIONS = [("abc", ["d", "efgh"], 1), ("x", ["yz", "ab"], 0), ("hello", ["w", "o", "p"], 1)]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    import_hf(folder, hf_model(**LLAMA))
    generator = np.random.default_rng(0)
    documents = ("".join(generator.choice(list("abcdefgh"), 60)) for _ in range(40))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    questions = (dict(zip(("context", "choices", "answer"), question, strict=True)) for question in QUESTIONS)
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))
    return folder


@pytest.fixture
def settings(inputs, tmp_path):
    def settings(output="scores", **changes):
        return ScoreConfig(
            **{
                "checkpoint": str(inputs / "checkpoint"),
                "output": str(tmp_path / output),
                "num_samples": NUM_SAMPLES,
                "micro_batch": MICRO_BATCH,
                "save_every": 2,
                "dtype": DType.FP32,
                "data": DataConfig([str(inputs / "text.jsonl")], str(inputs / "corpora"), 16),
                **changes,
            }
        )

    return settings
