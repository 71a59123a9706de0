"""Pruning against slicing written out by hand, and against the whole network with the removed parts silenced."""

import itertools
import os
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.multiprocessing import ProcessExitedException
from transformers import AutoModelForCausalLM

from minitron_megatron.artifacts.fingerprint import fingerprint
from minitron_megatron.checkpoint.convert import export
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.parallel import Builder
from minitron_megatron.config.schema import DType, ExportConfig, ParallelConfig, PruneConfig, TargetConfig
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.model import build
from minitron_megatron.model.build import build_model
from minitron_megatron.model.count import forward_flops_per_token, num_parameters
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.prune import prune
from minitron_megatron.pruning.scores import Scores
from minitron_megatron.pruning.slicing import Pruned
from tests.in_memory import as_transformers_model
from tests.ranks import run_on_ranks
from tests.tiny import FAMILIES, LLAMA, changed, hf_model, import_hf, random_scores
from tests.unit.pruning.direct import sliced_by_hand

LAYERS, HIDDEN, FFN, GROUPS, HEADS, HEAD_DIM = 4, 48, 44, 2, 3, 12
TOKENS = torch.randint(0, 101, (2, 20), generator=torch.Generator().manual_seed(0))


class Source:
    """A transformers model, its checkpoint and random scores of it."""

    def __init__(self, folder, config):
        self.model = hf_model(**config)
        self.checkpoint = import_hf(folder, self.model)
        self.scores = folder / "scores"
        random_scores(self.scores, Checkpoint(self.checkpoint).network)

    def prune(self, output, parallel=None, **target):
        config = self.config(output, target=TargetConfig(**target), parallel=parallel or ParallelConfig())
        return Checkpoint(prune(config)), Plan.read(output)

    def config(self, output, **settings):
        scores = None if "plan" in settings else str(self.scores)
        return PruneConfig(str(self.checkpoint), str(output), **{"scores": scores, **settings})


@pytest.fixture(scope="module", params=FAMILIES)
def source(request, tmp_path_factory):
    return Source(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Source(tmp_path_factory.mktemp("llama"), LLAMA)


@pytest.mark.oldest
@pytest.mark.parametrize("attention", [dict(heads=4), dict(groups=1), dict(groups=1, heads=2)], ids=str)
def test_pruning_is_slicing(llama, tmp_path, attention):
    pruned, plan = llama.prune(tmp_path / "pruned", layers=3, hidden=40, ffn=30, **attention)
    assert len(plan.sublayers) == 6 and plan.sublayers != list(range(6))  # a layer in the middle went
    expected = sliced_by_hand(llama.model.state_dict(), plan)
    found = as_transformers_model(pruned).state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_plan_that_was_carried_out_is_the_one_of_the_scores(llama, tmp_path):
    _, plan = llama.prune(tmp_path / "pruned", hidden=40)
    assert plan.hidden == sorted(Scores.read(llama.scores).hidden.topk(40).indices.tolist())


def killed(config):
    """Prunes until some parameters have been read."""
    count, read = itertools.count(), Pruned.read

    def read_or_die(*arguments):
        if next(count) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*arguments)

    Pruned.read = read_or_die
    prune(config)


def test_a_pruning_that_was_killed_is_done_again(llama, tmp_path):
    expected, plan = llama.prune(tmp_path / "expected", layers=3, ffn=30)
    config = llama.config(tmp_path / "pruned", target=TargetConfig(layers=3, ffn=30))
    before = fingerprint(llama.checkpoint)
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_on_ranks(1, killed, config)
    assert not (tmp_path / "pruned").exists()
    found = Checkpoint(prune(config))
    for name, tensor in as_transformers_model(expected).state_dict().items():
        assert torch.equal(as_transformers_model(found).state_dict()[name], tensor), name
    assert Plan.read(tmp_path / "pruned") == plan
    assert found.manifest.details["optimizer_state"] == "left out"
    assert fingerprint(llama.checkpoint) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["expected", "pruned"]


def test_a_pruned_model_is_the_same_here_and_exported(source, tmp_path):
    """The width is no multiple of the heads, so that a Llama has to be exported as a Mistral."""
    pruned, _ = source.prune(tmp_path / "pruned", layers=3, hidden=46, ffn=30, heads=4)
    exported = AutoModelForCausalLM.from_pretrained(
        export(ExportConfig(str(tmp_path / "pruned"), str(tmp_path / "exported")))
    )
    assert exported.num_parameters() == num_parameters(pruned.network) == pruned.manifest.details["parameters"]
    with parallel_context(ParallelConfig()) as ctx, torch.no_grad():
        [ours] = build_model(pruned.network, ctx, DType.FP32)
        load_weights([ours], pruned, ctx)
        logits = ours(TOKENS, torch.arange(20).expand(2, -1), attention_mask=None)[..., :101]
        expected = exported(TOKENS).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("target", [dict(ffn=30, heads=4), dict(groups=1), dict(layers=2, groups=1, heads=2)], ids=str)
def test_what_goes_is_as_if_silenced(source, tmp_path, target):
    pruned, plan = source.prune(tmp_path / "pruned", **target)
    masked = hf_model(**source.model.config.to_dict())
    masked.load_state_dict(source.model.state_dict())
    with torch.no_grad():
        for number, layer in enumerate(masked.model.layers):
            nothing = {"ffn": [], "groups": [], "heads": []}
            attention, mlp = (plan.elements.get(position, nothing) for position in (2 * number, 2 * number + 1))
            layer.mlp.down_proj.weight[:, np.setdiff1d(np.arange(FFN), mlp["ffn"])] = 0
            heads = layer.self_attn.o_proj.weight.view(HIDDEN, GROUPS, HEADS, HEAD_DIM)
            kept = dict(zip(attention["groups"], attention["heads"], strict=True))
            for group in range(GROUPS):
                heads[:, group, np.setdiff1d(np.arange(HEADS), kept.get(group, []))] = 0
        expected, whole = masked(TOKENS).logits, source.model(TOKENS).logits
        found = as_transformers_model(pruned)(TOKENS).logits
    assert (whole - expected).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "target, parallel, problems",
    [
        (dict(ffn=45), None, ["target.ffn = 45 is larger than the source's 44: pruning only removes"]),
        (
            dict(heads=3),
            None,
            ["target.heads = 3 is not a multiple of the 2 query groups: every query group keeps the same"],
        ),
        (
            dict(ffn=31, layers=3),
            ParallelConfig(tensor=2, pipeline=4),
            [
                "target.ffn = 31 does not divide by parallel.tensor = 2",
                "target has 3 layers, too few for the 4 stages of parallel.pipeline x virtual_pipeline = 4 x 1",
            ],
        ),
        (
            dict(ffn=30),
            ParallelConfig(tensor=3),
            [
                "target.attention.num_query_groups = 2 does not divide by parallel.tensor = 3",
                "target.padded_vocab_size = 128 does not divide by parallel.tensor = 3",
            ],
        ),
    ],
    ids=["larger", "heads and groups", "neurons and layers and layout", "groups and vocabulary and layout"],
)
def test_targets_that_do_not_fit_name_field_and_value(target, parallel, problems, llama, tmp_path):
    with pytest.raises(ConfigError) as raised:
        llama.prune(tmp_path / "pruned", parallel, **target)
    for found, expected in zip(raised.value.problems, problems, strict=True):
        assert found.startswith(expected)
    assert list(tmp_path.iterdir()) == []


def test_scores_of_another_network_are_refused(llama, tmp_path):
    random_scores(tmp_path / "scores", Checkpoint(llama.checkpoint).network.replace(vocab_size=100))
    config = llama.config(tmp_path / "p", scores=str(tmp_path / "scores"), target=TargetConfig(ffn=30))
    with pytest.raises(
        CheckpointError, match=r"scores = .*/scores is of another network than checkpoint = .*: score that"
    ):
        prune(config)
    assert not (tmp_path / "p").exists()


def same_tensors(one, other):
    first, second = as_transformers_model(one).state_dict(), as_transformers_model(other).state_dict()
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def test_a_dry_run_shows_what_would_be_done_and_writes_the_plan_alone(llama, tmp_path, capsys):
    target = TargetConfig(layers=3, hidden=0.85, ffn=30, groups=1)
    file = prune(llama.config(tmp_path / "folder/pruned", target=target, dry_run=True))
    assert file == tmp_path / "folder/pruned.plan.json"
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (
        ["attention", "sublayers", "4", "3", "75.0%"],
        ["hidden", "48", "41", "85.4%"],
        ["neurons", "44", "30", "68.2%"],
        ["query", "groups", "2", "1", "50.0%"],
        ["query", "heads", "6", "3", "50.0%"],
    ):
        assert row in lines
    plan, scores = Plan.read(file), Scores.read(llama.scores)
    before, after = num_parameters(plan.source), num_parameters(plan.target)
    assert ["parameters", f"{before:,}", f"{after:,}", f"{after / before:.1%}"] in lines
    before, after = (forward_flops_per_token(s, s.max_positions) for s in (plan.source, plan.target))
    [flops] = [line for line in lines if line[:2] == ["forward", "FLOPs"]]
    assert flops[-3:] == [f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.1%}"]
    dropped = (set(range(0, 8, 2)) - set(Plan.read(file).sublayers)).pop() // 2
    assert ["dropped", "MLP", "sublayers:", str(dropped)] in lines
    [shares] = [line for line in lines if line and line[0] == str(dropped)]
    assert shares[1:] == ["dropped", "dropped"]
    layer = plan.sublayers[0] // 2
    [shares] = [line for line in lines if line and line[0] == str(layer)]
    ffn, of_heads = scores.elements["ffn"][layer], scores.elements["heads"][layer]
    kept = ffn[plan.elements[2 * layer + 1]["ffn"]].sum() / ffn.sum()
    [group], [heads] = (plan.elements[2 * layer][name] for name in ("groups", "heads"))
    kept_heads = of_heads[group, heads].sum() / of_heads.sum()
    assert shares[1:] == [f"{kept:.1%}", f"{kept_heads:.1%}"]
    channels = scores.hidden[plan.hidden].sum() / scores.hidden.sum()
    assert f"hidden channels kept hold {channels:.1%} of all scores".split() in lines
    # Another plan does not write over one that somebody may have changed.
    edited = file.read_text().replace('"layer"', '"layer" ', 1)
    file.write_text(edited)
    for _ in range(2):
        prune(llama.config(tmp_path / "folder/pruned", target=replace(target, hidden=40), dry_run=True))
    assert len(Plan.read(file).hidden) == 40
    assert sorted(path.name for path in file.parent.iterdir()) == ["pruned.plan.1.json", "pruned.plan.json"]
    assert (file.parent / "pruned.plan.1.json").read_text() == edited
    # Afterwards the same words prune.
    assert Checkpoint(prune(llama.config(tmp_path / "folder/pruned", target=target))).network.hidden_size == 41


def test_a_plan_gives_what_its_scores_gave(source, tmp_path):
    target = TargetConfig(layers=3, hidden=40, ffn=30, heads=4)
    expected = Checkpoint(prune(source.config(tmp_path / "scores", target=target, merge_heads=True)))
    dry = prune(source.config(tmp_path / "dry", target=target, merge_heads=True, dry_run=True))
    for number, plan in enumerate((dry, expected.root, expected.root / "plan.json")):
        found = Checkpoint(prune(source.config(tmp_path / f"{number}", plan=str(plan))))
        assert found.network == expected.network and same_tensors(found, expected)
        assert Plan.read(found.root) == Plan.read(expected.root)
    parents = {parent.role: parent.path for parent in found.manifest.parents}
    assert parents == {"checkpoint": str(source.checkpoint), "plan": str(plan)}


def test_a_dry_run_of_an_edited_plan_shows_what_it_keeps_of_the_scores(llama, tmp_path, capsys):
    file = prune(llama.config(tmp_path / "dry", target=TargetConfig(ffn=30), dry_run=True))
    plan, scores = Plan.read(file), Scores.read(llama.scores)
    ffn = scores.elements["ffn"][1]
    least = ffn.argsort()[:30].sort().values.tolist()
    replace(plan, elements={**plan.elements, 3: {"ffn": least}}, merge={}).write_file(file)
    capsys.readouterr()
    prune(llama.config(tmp_path / "dry", plan=str(file), scores=str(llama.scores), dry_run=True))
    [share] = [line.split()[1] for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["1"]]
    assert share == f"{ffn[least].sum() / ffn.sum():.1%}"


def test_an_edited_plan_is_carried_out(llama, tmp_path, monkeypatch, caplog):
    file = prune(llama.config(tmp_path / "dry", target=TargetConfig(ffn=30), dry_run=True))
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if '"layer": 1' not in line))
    found = Checkpoint(prune(llama.config(tmp_path / "pruned", plan=str(file))))
    assert len(found.network.layers) == 3 and found.network.sublayers[1].ffn_hidden_size == 30
    expected = sliced_by_hand(llama.model.state_dict(), Plan.read(file))
    tensors = as_transformers_model(found).state_dict()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    # Half of a layer may go. What takes a class that this release of Megatron-Core lacks is refused.
    file.write_text("\n".join(line for line in lines if '"position": 3' not in line))
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    hybrid = ParallelConfig(builder=Builder.HYBRID)
    with pytest.raises(ConfigError, match=r"parallel.builder = hybrid, and .* has none: install megatron-core 0.18"):
        prune(llama.config(tmp_path / "half", plan=str(file), parallel=hybrid))
    assert not (tmp_path / "half").exists()
    shown = prune(llama.config(tmp_path / "half", plan=str(file), parallel=hybrid, dry_run=True))
    assert "this plan could not be carried out: parallel.builder = hybrid" in caplog.text
    assert Plan.read(shown) == Plan.read(file)
    half = Checkpoint(prune(llama.config(tmp_path / "half", plan=str(file))))
    assert half.network == Plan.read(file).target and half.network.pattern == "*-**-*-"


def test_a_fraction_that_another_layout_rounds_otherwise_is_another_target(llama, tmp_path):
    """Seven of 44 neurons become eight for two tensor ranks."""
    target = TargetConfig(ffn=0.16)
    before = fingerprint(llama.checkpoint)
    prune(llama.config(tmp_path / "p", target=target))
    assert Checkpoint(tmp_path / "p").network.sublayers[1].ffn_hidden_size == 7
    with pytest.raises(ConfigError, match="target.ffn"):
        prune(llama.config(tmp_path / "p", target=target, parallel=ParallelConfig(tensor=2)))
    assert fingerprint(llama.checkpoint) == before


def test_merged_heads_are_written(llama, tmp_path):
    """With two of three heads the second one takes a share of the third: `head_2 += head_2 - head_3`."""
    target = TargetConfig(heads=4)
    found = Checkpoint(prune(llama.config(tmp_path / "merged", target=target, merge_heads=True)))
    plain = Checkpoint(prune(llama.config(tmp_path / "plain", target=target)))
    scores, before = Scores.read(llama.scores), llama.model.state_dict()
    after, without = (as_transformers_model(one).state_dict() for one in (found, plain))
    for name, tensor in after.items():
        if "q_proj" not in name:
            assert torch.equal(tensor, without[name]), name
            continue
        heads = before[name].view(GROUPS, HEADS, HEAD_DIM, HIDDEN)
        for group, own in enumerate(tensor.view(GROUPS, 2, HEAD_DIM, HIDDEN)):
            of_heads = scores.elements["heads"][int(name.split(".")[2])][group]
            first, second, third = of_heads.argsort(descending=True).tolist()
            merged = {first: heads[group, first], second: 2 * heads[group, second] - heads[group, third]}
            torch.testing.assert_close(own, torch.stack([merged[head] for head in sorted(merged)]))


def test_what_was_rounded_is_kept(llama, tmp_path):
    pruned, _ = llama.prune(tmp_path / "pruned", ffn=0.7, heads=0.5)
    assert pruned.network == changed(Checkpoint(llama.checkpoint).network, ffn_hidden_size=31, num_heads=4)
    assert pruned.manifest.details["rounded"] == [
        "target.heads = 0.5 of 6 became 4, a multiple of 2",
        "target.ffn = 0.7 of 44 became 31",
    ]


@pytest.mark.parametrize("what", ["scores", "plan"])
def test_scores_and_plans_of_other_weights_are_refused(llama, tmp_path, what):
    """Of the same network."""
    target, own = TargetConfig(ffn=30), fingerprint(llama.checkpoint)
    network = Checkpoint(llama.checkpoint).network
    other = import_hf(tmp_path / "other", hf_model(seed=1, **LLAMA))
    assert Checkpoint(other).network == network
    random_scores(tmp_path / "scores", network, own)
    given = llama.config(tmp_path / "pruned", scores=str(tmp_path / "scores"), target=target)
    if what == "plan":
        given = llama.config(tmp_path / "pruned", plan=str(prune(replace(given, dry_run=True))))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        CheckpointError, match=rf"{what} = .* is of another checkpoint than checkpoint = {other}: .* first"
    ):
        prune(replace(given, checkpoint=str(other)))
    assert sorted(tmp_path.iterdir()) == before
    assert Checkpoint(prune(given)).network == changed(network, ffn_hidden_size=30)


def test_a_plan_of_another_network_is_refused(llama, tmp_path):
    other = import_hf(tmp_path / "other", hf_model(**{**LLAMA, "intermediate_size": 40}))
    file = prune(llama.config(tmp_path / "dry", target=TargetConfig(ffn=30), dry_run=True))
    with pytest.raises(CheckpointError, match=r"plan = .* is of another network than checkpoint = .*: make a plan for"):
        prune(replace(llama.config(tmp_path / "pruned", plan=str(file)), checkpoint=str(other)))
