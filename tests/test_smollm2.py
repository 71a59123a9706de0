"""The built-in model, SmolLM2-135M: what Megatron-Core makes of it against what transformers does."""

import copy
import importlib.util
import json
import math
import shutil
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from minitron_megatron.checkpoint.convert import BUILTIN, export, import_checkpoint
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.schema import (
    DataConfig,
    DType,
    EvaluateConfig,
    ExportConfig,
    ImportConfig,
    ParallelConfig,
)
from minitron_megatron.data.builtin import builtin_documents
from tests.local_tasks import write_tasks
from tests.rounding import assert_as_precise, between_means

NAME = "builtin:smollm2-135m"
PACKAGE, FILE = BUILTIN[NAME]
TASKS = ["letter_choice", "letter_text"]

pytestmark = pytest.mark.skipif(importlib.util.find_spec(PACKAGE) is None, reason=f"{PACKAGE} is not installed")


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """The model as a checkpoint, as a Hugging Face folder, and as transformers reads it out of the GGUF file."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("smollm2")
    import_checkpoint(ImportConfig(NAME, str(folder / "checkpoint"), DType.FP32))
    export(ExportConfig(str(folder / "checkpoint"), str(folder / "exported")))
    write_tasks(folder / "tasks")
    (folder / "text").mkdir()
    for i, document in enumerate(islice(builtin_documents(), 40)):
        (folder / "text" / f"{i:02d}.txt").write_text(document)
    package = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0])
    theirs = AutoModelForCausalLM.from_pretrained(package, gguf_file=FILE, dtype=torch.float32)
    yield SimpleNamespace(folder=folder, transformers=theirs)
    shutil.rmtree(folder)  # a gigabyte, which pytest would keep


def text_of(folder):
    return DataConfig([str(folder / "text")], str(folder / "corpora"), sequence_length=512, heldout_pct=40.0)


def measure(folder, model, dtype, **changes):
    from minitron_megatron.evaluation.evaluate import evaluate

    output = folder / f"{model}_{dtype.name}"
    config = EvaluateConfig(str(folder / model), str(output), data=text_of(folder), dtype=dtype, **changes)
    return json.loads((evaluate(config) / "evaluation.json").read_text())


@contextmanager
def built(checkpoint, dtype):
    """From tokens `[batch, length]` to logits, under Megatron-Core."""
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context

    with parallel_context(ParallelConfig()) as ctx, torch.no_grad():
        [model] = build_model(checkpoint.network, ctx, dtype)
        load_weights([model], checkpoint, ctx)
        vocab = checkpoint.network.vocab_size
        yield lambda tokens: model(tokens, torch.arange(tokens.size(1))[None], attention_mask=None)[..., :vocab]


def token_losses(logits_of, samples):
    """The loss of every token, sequence by sequence."""
    with torch.no_grad():
        logits = (logits_of(sample["tokens"][None])[0].float() for sample in samples)
        return torch.cat([F.cross_entropy(z, s["labels"], reduction="none") for z, s in zip(logits, samples)])


def test_its_logits_are_those_of_transformers(smollm2):
    from minitron_megatron.data.tokens import load_tokenizer

    checkpoint = Checkpoint(smollm2.folder / "checkpoint")
    network = checkpoint.network
    assert (len(network.layers), network.hidden_size, network.sublayers[0].num_heads) == (30, 576, 9)
    assert smollm2.transformers.num_parameters() == checkpoint.manifest.details["parameters"]
    tokenizer = load_tokenizer(checkpoint.huggingface_folder)
    tokens = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with built(checkpoint, DType.FP32) as ours:
        logits = ours(tokens)
        in_float32 = smollm2.transformers(tokens).logits
        # Its norms stay in float32, all else is in float64.
        expected = copy.deepcopy(smollm2.transformers).double()(tokens).logits
    assert_as_precise(logits, in_float32, expected, torch.float32)
    assert tokenizer.decode(logits[0, -1].argmax()).strip() == "Paris"


@pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="transformers takes minutes in bf16 on this processor"
)
def test_its_perplexity_in_bf16_is_that_of_transformers(smollm2):
    from transformers import AutoModelForCausalLM

    from minitron_megatron.data.samples import heldout_samples
    from minitron_megatron.data.tokens import prepare_corpus

    ours, theirs = (
        measure(smollm2.folder, model, DType.BF16, num_samples=8, generate_tokens=0)["heldout"]
        for model in ("checkpoint", "exported")
    )
    assert ours["num_tokens"] == theirs["num_tokens"] > 4000

    # What bf16 does to the loss of a token is known from transformers' model with weights of bf16, whose loss in
    # float32 is the exact one.
    checkpoint = Checkpoint(smollm2.folder / "checkpoint")
    data = text_of(smollm2.folder)
    samples = heldout_samples(prepare_corpus(data, checkpoint.huggingface_folder), data, 4)
    samples = [samples[number] for number in range(4)]
    with built(checkpoint, DType.BF16) as model:
        found = token_losses(model, samples)
    model = AutoModelForCausalLM.from_pretrained(smollm2.folder / "exported", dtype=torch.bfloat16)
    in_bf16 = token_losses(lambda tokens: model(tokens).logits, samples)
    model.float()
    exact = token_losses(lambda tokens: model(tokens).logits, samples)
    assert_as_precise(found, in_bf16, exact, torch.bfloat16)
    error = between_means(in_bf16 - exact, ours["num_tokens"])
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=0, abs=error)
    assert ours["perplexity"] == pytest.approx(math.exp(ours["loss"]))


def test_its_text_and_its_scores_in_fp32_are_those_of_transformers(smollm2, monkeypatch):
    from minitron_megatron.evaluation import evaluate

    monkeypatch.setattr(evaluate, "_GENERATION_REPEATS", 1)  # which make its speed known and its text no other
    options = dict(num_samples=1, tasks=TASKS, task_dir=str(smollm2.folder / "tasks"), limit=5)
    ours, theirs = (measure(smollm2.folder, model, DType.FP32, **options) for model in ("checkpoint", "exported"))
    assert ours["generation"]["text"] == theirs["generation"]["text"]
    for task in TASKS:
        scores = [found["tasks"][task]["metrics"] for found in (ours, theirs)]
        assert scores[0].keys() == scores[1].keys()
        for metric, score in scores[0].items():
            assert score["value"] == pytest.approx(scores[1][metric]["value"], rel=1e-4)
