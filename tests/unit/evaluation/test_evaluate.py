import json
import math
import random
import shutil

import pytest
import torch

from minitron_megatron.config.schema import DataConfig, DType, EvaluateConfig, ExportConfig
from minitron_megatron.errors import CheckpointError
from tests.tiny import LLAMA, hf_model, import_hf


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model as a checkpoint and as a Hugging Face folder, and some text."""
    from minitron_megatron.checkpoint.convert import export

    folder = tmp_path_factory.mktemp("evaluate")
    import_hf(folder, hf_model(**LLAMA))
    export(ExportConfig(str(folder / "checkpoint"), str(folder / "exported")))
    choose = random.Random(0)
    (folder / "text").mkdir()
    for i in range(40):
        letters = "".join(choose.choice("abcdefgh") for _ in range(100))
        (folder / "text" / f"{i:02d}.txt").write_text(letters)
    return folder


def run(folder, model, output, sequence_length=32, **options):
    from minitron_megatron.evaluation.evaluate import evaluate

    text, cache = [str(folder / "text")], str(folder / "corpora")
    data = DataConfig(text, cache, sequence_length=sequence_length, heldout_pct=20.0, **options)
    config = EvaluateConfig(
        str(folder / model), str(folder / output), generate_tokens=5, micro_batch=3, dtype=DType.FP32, data=data
    )
    return json.loads((evaluate(config) / "evaluation.json").read_text())


def test_a_checkpoint_and_its_export_have_the_same_loss(folder):
    ours, theirs = run(folder, "checkpoint", "ours"), run(folder, "exported", "theirs")
    assert ours["heldout"]["loss"] == pytest.approx(theirs["heldout"]["loss"], rel=1e-5)
    assert ours["heldout"]["num_tokens"] == theirs["heldout"]["num_tokens"] == 8 * 101 - 1
    assert ours["parameters"] == theirs["parameters"]
    assert ours["parameters_without_embeddings"] == theirs["parameters_without_embeddings"]
    assert ours["generation"]["text"] == theirs["generation"]["text"]


def test_documents_apart_have_the_same_loss_in_both(folder):
    ours, theirs = (run(folder, model, f"{model}_apart", document_mask=True) for model in ("checkpoint", "exported"))
    assert ours["heldout"]["loss"] == pytest.approx(theirs["heldout"]["loss"], rel=1e-5)
    # Of each of eight documents the first token is not predicted.
    assert ours["heldout"]["num_tokens"] == theirs["heldout"]["num_tokens"] == 8 * 100
    assert ours["heldout"]["loss"] != pytest.approx(run(folder, "checkpoint", "ours")["heldout"]["loss"], rel=1e-5)


@pytest.mark.parametrize("model", ["checkpoint", "exported"])
def test_sequences_longer_than_the_network_has_positions_are_said(folder, model, caplog):
    run(folder, model, f"{model}_long", sequence_length=80)
    assert "data.sequence_length = 80 is longer than the 64 positions of the model" in caplog.text


def test_a_folder_with_an_adapter_is_to_be_merged_first(folder, tmp_path):
    shutil.copytree(folder / "exported", tmp_path / "hf")
    (tmp_path / "hf/adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="adapter_config.json is of an adapter over other weights: merge it"):
        run(folder, tmp_path / "hf", "adapter")


def test_perplexity_is_the_exponential_of_the_loss(folder):
    result = run(folder, "checkpoint", "ours")["heldout"]
    assert result["perplexity"] == pytest.approx(math.exp(result["loss"]))


def test_a_perplexity_beyond_the_largest_number_is_infinite(folder, monkeypatch):
    from minitron_megatron.checkpoint.model_card import read_json
    from minitron_megatron.evaluation import evaluate
    from minitron_megatron.report.compare import model_measures
    from minitron_megatron.report.descriptions import read_evaluation
    from minitron_megatron.report.results import Evaluation
    from minitron_megatron.report.table import cells

    run(folder, "checkpoint", "ours")
    monkeypatch.setattr(evaluate, "_megatron_loss", lambda *args: (1000.0, 5))
    assert run(folder, "checkpoint", "bad")["heldout"] == {"loss": 1000.0, "perplexity": math.inf, "num_tokens": 5}
    assert read_json(folder / "bad/evaluation.json", "an evaluation") == read_evaluation(folder / "bad")
    bad, good = Evaluation.read(folder / "bad", "bad"), Evaluation.read(folder / "ours", "ours")
    for models in ([bad, bad], [bad, good], [good, bad]):
        [row] = [measure.cells for measure in model_measures(models) if measure.name == "held-out perplexity"]
        assert "inf" in row[1 + models.index(bad)] and "nan" not in str(row)
    assert "inf" in cells([bad])[0]


def test_greedy_text_is_what_the_logits_say(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(folder, "checkpoint", "ours")["generation"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "exported")
    model = AutoModelForCausalLM.from_pretrained(folder / "exported")
    tokens = torch.tensor([tokenizer.convert_tokens_to_ids(result["prompt"].split())])
    start = tokens.size(1)
    for _ in range(5):
        logits = model(tokens).logits[0, -1]
        logits[tokenizer.eos_token_id] = -torch.inf  # the length is asked for
        tokens = torch.cat([tokens, logits.argmax().view(1, 1)], dim=1)
    assert tokenizer.decode(tokens[0, start:]) == result["text"]
