import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.config.schema import DepthSearch, InspectConfig, Unit
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.pruning.ranges import to_ranges
from minitron_megatron.pruning.scores import DepthSettings
from minitron_megatron.report.inspect import inspect
from tests.tiny import LLAMA, hf_model, import_hf
from tests.unit.report.conftest import UNLIKE, RandomSource


@pytest.fixture
def show(capsys):
    def show(path):
        inspect(InspectConfig(str(path)))
        return [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]

    return show


def test_a_checkpoint(shared_run, show):
    run, _ = shared_run
    lines = show(run / "teacher")
    assert lines[0] == f"{run / 'teacher'}: checkpoint"
    # Counted by hand: per layer norms 24, qkv 12 * 20, proj 12 * 12, fc1 12 * 20, fc2 12 * 10; final norm 12.
    body = 5 * (24 + 12 * 20 + 12 * 12 + 12 * 20 + 12 * 10) + 12
    assert f"parameters {body + 2 * 12 * 7:,}" in lines and f"without embeddings {body:,}" in lines
    assert "iteration release" in lines and "dtype bfloat16" in lines
    assert "layers 5" in lines and "attention.num_query_groups 2" in lines and "norm_eps 1e-05" in lines
    # 6 of every layer, the two tables and the final norm.
    stored = sum(path.stat().st_size for path in (run / "teacher/release").glob("__[0-9]*.distcp"))
    [weights] = [line for line in lines if line.startswith("weights ")]
    assert weights.startswith(f"weights {stored:,} bytes in 9 tensors, 33 chunks and ")
    assert weights.endswith(" files; all layers in one tensor")
    size = sum(path.stat().st_size for path in (run / "teacher").rglob("*") if path.is_file())
    assert f"on disk {size:,} bytes" in lines
    # Matrix products of a token, 2 operations for each weight, with the 8 padded rows of the output; and causal
    # attention over (2048 + 1) / 2 positions in 6 heads of 2 channels.
    flops = 2 * 5 * (12 * 20 + 12 * 12 + 12 * 20 + 12 * 10) + 2 * 8 * 12 + 5 * 4 * 6 * 2 * 2049 / 2
    assert f"forward FLOPs per token of 2048 {flops / 1000:.4g}K" in lines
    # Per layer a key and a value of 2 channels in each of 2 groups, of 2 bytes.
    assert f"bytes of KV cache per token in bf16 {5 * 2 * 2 * 2 * 2}" in lines
    assert "missing" not in " ".join(lines)  # all layers are alike
    assert f"source: {run.parent / 'model.gguf'}" in lines[-1]


def test_a_pruned_checkpoint_shows_both_networks(shared_run, show, kept_numbers):
    run, _ = shared_run
    lines = show(run / "pruned")
    assert lines[0].endswith(": pruned checkpoint")
    assert "before after" in lines and "hidden 12 8" in lines and "layers 5 3" in lines
    gone = sorted({0, 1, 2, 3, 4} - set(kept_numbers))
    assert f"dropped layers {to_ranges(gone)}" in lines and "merges heads no" in lines
    number = lines.index("rounded target.ffn = 0.55 of 10 became 6")
    assert lines[number + 1] == "target.heads = 0.7 of 6 became 4"


@pytest.fixture(scope="module")
def unlike_run(tmp_path_factory, unlike_plan):
    """Checkpoints of a network of unlike layers, whole and pruned."""
    folder = tmp_path_factory.mktemp("unlike")
    plans = {"whole": lambda folder: None, "pruned": unlike_plan.write}
    for (name, write_plan), network in zip(plans.items(), (UNLIKE, unlike_plan.target), strict=True):
        write_checkpoint(folder / name, RandomSource(network), torch.bfloat16, Manifest("checkpoint"), None, write_plan)
    return folder


def test_a_network_of_unlike_layers_has_a_row_for_each(unlike_run, show):
    lines = show(unlike_run / "whole")
    assert "attention sublayers 4" in lines and "mlp.ffn_hidden_size 4 to 10" in lines and "pattern *--*-**-" in lines
    table = lines[lines.index("layers") + 1 :][:6]
    assert table == [
        "layer groups heads ffn missing",
        "0 2 6 10",
        "1 – – 7 attention",
        "2 4 4 9",
        "3 3 6 – MLP",
        "4 2 6 4",
    ]


def test_a_pruned_network_of_unlike_layers(unlike_run, show):
    lines = show(unlike_run / "pruned")
    assert "dropped layers 4" in lines and "layers 5 4" in lines and "attention.num_heads 4 to 6 2 to 4" in lines
    assert lines[lines.index("layers before") + 1 :][4:6] == ["3 3 6 – MLP", "4 2 6 4"]
    assert lines[lines.index("layers after") + 1 :][1:5] == ["0 2 4 5", "1 – – 7 attention", "2 3 3 2", "3 1 2 – MLP"]


def test_a_plan_alone(shared_run, show):
    run, _ = shared_run
    lines = show(run / "pruned" / "plan.json")
    assert (
        lines[0].endswith("plan.json: plan")
        and "mlp.ffn_hidden_size 10 6" in lines
        and "attention.num_heads 6 4" in lines
    )


def test_scores(shared_run, show):
    run, _ = shared_run
    lines = show(run / "scores")
    assert lines[0].endswith(": scores") and "corpus c0ffee" in lines and "hidden 12" in lines
    assert "num_samples: 9" in lines


def test_scores_say_what_was_left_out_and_what_is_missed_least(shared_run, show, scores):
    lines = show(shared_run[0] / "scores")
    assert "depth criteria block_influence, kl" in lines and "depth search single: each layer by itself" in lines
    assert "protected the first 1 and the last 0 layers" in lines
    for name, values in scores.depth.items():
        order = sorted(range(5), key=values.tolist().__getitem__)
        assert f"least important ({name}) {', '.join(map(str, order))}" in lines
    assert not any("scored last" in line for line in lines)


def written(folder, scores):
    folder.mkdir()
    scores.write(folder)
    Manifest("scores").write(folder)
    return folder


def test_scores_of_a_greedy_search_say_the_order(scores, show, tmp_path):
    settings = DepthSettings(Unit.SUBLAYER, DepthSearch.GREEDY, 3, 0, 0)
    rounds = {"depth": torch.tensor([4, 4, 4, 1, 3, 4, 2, 4, 4, 4])}
    searched = replace(scores, depth={"kl": torch.rand(10)}, depth_settings=settings, rounds=rounds)
    lines = show(written(tmp_path / "greedy", searched))
    assert "depth search greedy: one sublayer after another, 3 in all" in lines
    assert "left out, in this order layer 1's MLP, layer 3's attention, layer 2's attention" in lines


def test_scores_of_a_search_for_blocks_say_where_they_begin(scores, show, tmp_path):
    settings = DepthSettings(search=DepthSearch.BLOCK, drop=2, protect_first=1)
    nan = float("nan")
    searched = replace(scores, depth={"loss": torch.tensor([nan, 3, 1, 2, nan])}, depth_settings=settings)
    lines = show(written(tmp_path / "blocks", searched))
    assert "least important blocks begin at (loss) 2, 3, 1" in lines  # not where nothing was measured


def test_scores_of_several_rounds_say_how_much_each_decided(scores, show, tmp_path):
    rounds = {"hidden": torch.tensor([2] * 8 + [1] * 4)}
    elements = {name: [torch.full(own.shape, 2) for own in rows] for name, rows in scores.elements.items()}
    elements["ffn"][3][:7] = 1
    lines = show(written(tmp_path / "rounds", replace(scores, rounds=rounds, element_rounds=elements)))
    assert "hidden: scored last 4 in round 1, 8 in round 2" in lines
    assert "ffn: scored last 7 in round 1, 43 in round 2" in lines and "heads: scored last 30 in round 2" in lines


def test_a_plan_that_drops_sublayers_names_them_apart(plan, show, tmp_path):
    """In a file of any name, as a dry run writes it."""
    gone = plan.sublayers[2]
    edited = replace(plan, sublayers=[p for p in plan.sublayers if p != gone])
    edited.write_file(tmp_path / "mine.json")
    lines = show(tmp_path / "mine.json")
    attention = sorted({0, 1, 2, 3, 4} - {p // 2 for p in edited.sublayers if p % 2 == 0})
    mlp = sorted({0, 1, 2, 3, 4} - {p // 2 for p in edited.sublayers if p % 2})
    assert f"dropped attention sublayers {to_ranges(attention)}" in lines
    assert f"dropped MLP sublayers {to_ranges(mlp)}" in lines and len(attention) == len(mlp) + 1
    assert "attention sublayers – 2" in lines and "layers 5 3" in lines and "pattern – *--*-" in lines


@pytest.mark.parametrize(
    "path, names",
    [
        ("scores", ["ffn", "groups", "heads", "hidden", "layers"]),
        ("pruned", ["ffn", "groups", "heads", "hidden", "kept", "layers"]),
        ("pruned/plan.json", ["ffn", "groups", "heads", "hidden", "kept", "layers"]),
        ("distilled", ["loss"]),
    ],
)
def test_figures_of_one_result(shared_run, tmp_path, capsys, path, names):
    inspect(InspectConfig(str(shared_run[0] / path), figures=str(tmp_path / "figures")))
    assert sorted(file.stem for file in (tmp_path / "figures").iterdir()) == names
    assert str(tmp_path / "figures" / f"{names[0]}.png") in capsys.readouterr().out


@pytest.mark.parametrize("path, kind", [("teacher", "checkpoint"), ("evaluate/teacher", "evaluation")])
def test_what_has_no_figures_says_so(shared_run, tmp_path, path, kind):
    with pytest.raises(ConfigError, match=rf"figures = .*figures: {kind} has none"):
        inspect(InspectConfig(str(shared_run[0] / path), figures=str(tmp_path / "figures")))
    assert not (tmp_path / "figures").exists()


def test_an_evaluation(shared_run, show):
    run, _ = shared_run
    lines = show(run / "evaluate" / "pruned")
    assert lines[0].endswith(": evaluation")
    assert {"parameters 4,321,987", "held-out loss 5.5000 nats per token", "generation 32.5 tokens/s"} <= set(lines)


def test_a_training_run(shared_run, show):
    run, _ = shared_run
    lines = show(run / "distilled")
    assert lines[0].endswith(": training run")
    assert "last step 6 (6K tokens)" in lines and "loss/lm 2.6667" in lines and "val/total 0.7667" in lines


def test_a_run_that_is_not_finished(finished_run, show):
    """Its manifest is still to come, and that of its checkpoints says how it is made."""
    run, _ = finished_run
    (run / "distilled" / "manifest.json").unlink()
    lines = show(run / "distilled")
    assert lines[0].endswith(": training run, not finished")
    assert any(line.startswith("forward FLOPs per token of 16 ") for line in lines)


def test_a_hugging_face_folder(tmp_path, show):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, vocab_size=32)
    LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes)).to(torch.bfloat16).save_pretrained(tmp_path)
    lines = show(tmp_path)
    assert lines[0].endswith(": Hugging Face folder") and "dtype bfloat16" in lines and "layers 2" in lines
    assert "made from" not in lines  # another program wrote it


def test_the_lineage_goes_back_to_the_beginning(shared_run, show):
    run, _ = shared_run
    lines = show(run / "distilled")
    tree = lines[lines.index("made from") + 2 : lines.index("settings") - 1]
    assert [line.lstrip("│├└─ ").rsplit(" ", 1)[0] for line in tree] == [
        f"student: {run / 'pruned'}",
        f"checkpoint: {run / 'teacher'}",
        f"source: {run.parent / 'model.gguf'}",
        f"scores: {run / 'scores'}",
        f"checkpoint: {run / 'teacher'}",
        f"teacher: {run / 'teacher'}",
    ]


def test_parents_that_are_gone_or_changed_are_not_followed(finished_run, show):
    run, _ = finished_run
    shutil.rmtree(run / "scores")
    (run / "teacher" / "note.txt").write_text("another model lies here now")
    lines = show(run / "pruned")
    assert any("scores: " in line and line.endswith("not there any more") for line in lines)
    assert any("checkpoint: " in line and line.endswith("changed since") for line in lines)
    assert not any("source: " in line for line in lines)


def test_brackets_in_a_path_are_text(shared_run, show, tmp_path):
    """rich would read them as markup, and leave them out."""
    folder = tmp_path / "[red]scores"
    shutil.copytree(shared_run[0] / "scores", folder)
    assert show(folder)[0] == f"{folder}: scores"


def test_an_unknown_folder_is_an_error_that_says_what_was_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(CheckpointError) as raised:
            inspect(InspectConfig(str(path)))
        message = str(raised.value)
        assert str(path) in message and "latest_checkpointed_iteration.txt" in message
        assert all(f"{name}.json" in message for name in ("evaluation", "config", "plan")) and "scores." in message


def test_a_path_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        inspect(InspectConfig(str(tmp_path / "nowhere")))


def test_a_broken_result_is_a_users_error(finished_run):
    run, _ = finished_run
    index = json.loads((run / "pruned" / "plan.json").read_text())
    index["source"]["hidden_size"] = 0
    (run / "pruned" / "plan.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="hidden_size = 0"):
        inspect(InspectConfig(str(run / "pruned")))


@pytest.fixture
def compare(capsys):
    def compare(path, other):
        inspect(InspectConfig(str(path), other=str(other)))
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        return lines[lines.index(f"compared with {other}") + 1 :]

    return compare


def test_networks_that_are_not_the_same(shared_run, compare):
    run, _ = shared_run
    lines = compare(run / "teacher", run / "pruned")
    assert {"hidden 12 8 66.7%", "layers 5 3 60.0%", "mlp.ffn_hidden_size 10 6 60.0%"} <= set(lines)
    assert not any(line.startswith(("vocab", "norm", "attention.head_dim")) for line in lines)  # which are


def test_layers_that_are_not_the_same(unlike_run, tmp_path, compare):
    """The ranges over all layers are equal: layers 1 and 2 have changed their MLPs."""
    sublayers = list(UNLIKE.sublayers)
    sublayers[2], sublayers[4] = sublayers[4], sublayers[2]
    source = RandomSource(UNLIKE.replace(sublayers=tuple(sublayers)))
    write_checkpoint(tmp_path / "other", source, torch.bfloat16, Manifest("checkpoint"), None)
    assert compare(unlike_run / "whole", tmp_path / "other")[-1] == "layers that differ: 1-2"


def test_networks_for_texts_of_two_lengths_are_compared(tmp_path, compare):
    """By the operations of one of the two lengths."""
    first = import_hf(tmp_path / "a", hf_model(**LLAMA))
    longer = import_hf(tmp_path / "b", hf_model(**LLAMA | {"max_position_embeddings": 128}))
    assert compare(first, longer)[1:] == ["max_positions 64 128 200.0%", "all tensors are equal"]


def test_the_largest_difference_of_each_tensor(tmp_path, compare, monkeypatch):
    """Of a checkpoint and of what transformers' own tensors say, changed by hand in one layer."""
    monkeypatch.setattr("minitron_megatron.report.differences._ELEMENTS", 100)  # a few rows at a time
    checkpoint = import_hf(tmp_path, hf_model(**LLAMA))
    assert compare(checkpoint, tmp_path / "hf") == ["all tensors are equal"]
    tensors = load_file(tmp_path / "hf/model.safetensors")
    tensors["model.layers.2.mlp.down_proj.weight"][47, 43] += 0.5
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 0.25
    tensors["model.norm.weight"][3] = torch.nan
    save_file(tensors, tmp_path / "hf/model.safetensors", metadata={"format": "pt"})
    lines = compare(checkpoint, tmp_path / "hf")
    assert "decoder.layers.mlp.linear_fc2.weight 0.5 2 2" in lines
    assert "decoder.final_layernorm.weight nan" in lines
    assert len([line for line in lines if line.endswith(" none")]) == len(lines) - 3  # and the header


def test_what_is_no_network_cannot_be_compared(shared_run):
    run, _ = shared_run
    with pytest.raises(CheckpointError, match="scores is not a checkpoint"):
        inspect(InspectConfig(str(run / "teacher"), other=str(run / "scores")))
