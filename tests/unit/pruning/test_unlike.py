"""Networks whose layers have sizes of their own, and may lack a half: made, cut again, scored and kept in files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.checkpoint.huggingface import hf_tensors, read_hf_tensor
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.schema import (
    Aggregation,
    Criterion,
    DepthCriterion,
    DType,
    ParallelConfig,
    PruneConfig,
    TargetConfig,
    Unit,
)
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.parameters import parameters
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.prune import prune
from minitron_megatron.pruning.score_model import score_model
from minitron_megatron.pruning.scores import Scores
from minitron_megatron.pruning.slicing import Pruned
from tests.in_memory import StateDict
from tests.tiny import LLAMA, NETWORKS, hf_model, import_hf, random_scores, scores_by_chance, unlike
from tests.unit.pruning.direct import (
    RandomSource,
    direct_activations,
    direct_effects,
    direct_weights,
    samples_for,
    score_config,
    sliced_by_hand,
)

# Of four layers with 44 neurons and two groups of three heads. Of the groups that stay, all keep as many heads.
BY_LAYER = {"ffn": [44, 30, 9, 20], "groups": [2, 1, 2, 1], "heads": [6, 1, 2, 3]}
HEAD_DIM = 12


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    """Layers of 6, 0, 2 and 8 heads in 2, 0, 2 and 4 groups, and of 44, 36, 0 and 20 neurons."""
    return unlike(network_from_config(NETWORKS[request.param]))


def sizes_of(network):
    """What differs, in the order of the sublayers: neurons, or heads and groups."""
    return [
        own.ffn_hidden_size if own.symbol == "-" else (own.num_heads, own.num_query_groups) for own in network.sublayers
    ]


def test_a_target_by_layer_gives_layers_of_these_sizes(tmp_path):
    model = hf_model(**LLAMA)
    checkpoint, output = import_hf(tmp_path, model), tmp_path / "pruned"
    random_scores(tmp_path / "scores", Checkpoint(checkpoint).network)
    target = TargetConfig(layers=3, hidden=40, **BY_LAYER)
    prune(PruneConfig(str(checkpoint), str(output), str(tmp_path / "scores"), target=target))

    scores, plan, pruned = Scores.read(tmp_path / "scores"), Plan.read(output), Checkpoint(output)
    gone = int(scores.depth["loss"].argmin())
    layers = [layer for layer in range(4) if layer != gone]
    expected = [(6, 2), 44, (1, 1), 30, (2, 2), 9, (3, 1), 20]
    assert sizes_of(pruned.network) == sizes_of(plan.target) == expected[: 2 * gone] + expected[2 * gone + 2 :]
    assert pruned.network == plan.target and pruned.network.hidden_size == 40
    for layer in layers:
        best = scores.elements["ffn"][layer].topk(BY_LAYER["ffn"][layer]).indices
        assert plan.elements[2 * layer + 1] == {"ffn": sorted(best.tolist())}
        of_heads = scores.elements["heads"][layer]
        groups = sorted(of_heads.sum(1).topk(BY_LAYER["groups"][layer]).indices.tolist())
        count = BY_LAYER["heads"][layer] // len(groups)
        heads = [sorted(of_heads[group].topk(count).indices.tolist()) for group in groups]
        assert plan.elements[2 * layer] == {"groups": groups, "heads": heads}
    left = sliced_by_hand(model.state_dict(), plan)
    found = {name: read_hf_tensor(pruned, param, part) for name, _, param, part in hf_tensors(pruned.network)}
    assert found.keys() == left.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in left.items())


def test_a_share_is_of_each_layer_s_own_size(network):
    plan = make_plan(scores_by_chance(network), TargetConfig(ffn=0.5, heads=0.5))
    assert sizes_of(plan.target) == [(4, 2), 22, 18, (2, 2), (4, 4), 10]  # 3 of 6 heads become 4
    plan = make_plan(scores_by_chance(network), TargetConfig(ffn=[10, 0.5, 20], groups=[1, 1.0, 0.5]))
    assert sizes_of(plan.target) == [(3, 1), 10, 18, (2, 2), (4, 2), 20]


def whole(param):
    """Every position of a parameter."""
    return [np.arange(size) for size in param.shape]


def assert_same_weights(found, expected):
    assert found.network == expected.network
    for param in parameters(found.network):
        assert torch.equal(found.read(param, whole(param)), expected.read(param, whole(param))), param.name


def test_pruning_what_was_pruned_is_one_plan_bit_for_bit(network, tmp_path):
    def write(source, folder):
        write_checkpoint(folder, source, torch.float32, Manifest("checkpoint"), None)
        return Checkpoint(folder)

    def pruned(source, plan, name):
        plan.write_file(tmp_path / f"{name}.json")
        config = PruneConfig(str(source.root), str(tmp_path / name), plan=str(tmp_path / f"{name}.json"))
        return Checkpoint(prune(config))

    source = write(RandomSource(network), tmp_path / "source")
    target = TargetConfig(hidden=44, ffn=[30, 36, 10], groups=[2, 1, 3], heads=[4, 1, 6])
    first = make_plan(scores_by_chance(network), target)
    first.sublayers.remove(4)  # half of the last layer
    half_way = pruned(source, first, "half_way")
    assert sizes_of(half_way.network) == [(4, 2), 30, 36, (1, 1), 10]
    target = TargetConfig(hidden=40, ffn=[0.5, 7, 10], groups=1, heads=[2, 1])
    second = make_plan(scores_by_chance(half_way.network, seed=2), target)
    second.sublayers.remove(2)
    one = first.then(second)
    found = pruned(half_way, second, "in_two_steps")
    assert sizes_of(found.network) == [(2, 1), 15, (1, 1), 10]
    assert one.problems() == [] and one.target == found.network and one.source == network
    assert_same_weights(pruned(source, one, "in_one_step"), found)
    # And not only by the index: these are numbers of the source, picked one axis after another.
    [param] = [param for param in parameters(found.network) if param.name == "mlp.linear_fc2.weight" and param.layer]
    tensor = RandomSource(network).tensors["mlp.linear_fc2.weight", network.layer_of(5)]
    neurons = [first.elements[5]["ffn"][i] for i in second.elements[4]["ffn"]]
    channels = [first.hidden[i] for i in second.hidden]
    assert torch.equal(found.read(param, whole(param)), tensor[channels][:, neurons])


@pytest.mark.parametrize("merge_heads", [False, True])
def test_a_plan_survives_its_file(network, tmp_path, merge_heads):
    target = TargetConfig(hidden=40, ffn=[30, 36, 10], groups=[2, 1, 4], heads=[4, 1, 4])
    plan = make_plan(scores_by_chance(network, "fingerprint"), target, merge_heads=merge_heads)
    assert sorted(plan.merge) == ([0, 3, 4] if merge_heads else [])
    plan.write(tmp_path)
    found = Plan.read(tmp_path)
    assert found == plan and found.source == network and found.target == plan.target
    source = json.loads((tmp_path / "plan.json").read_text())["source"]
    assert source["pattern"] == "*--**-" and source["mlp"]["ffn_hidden_size"] == [44, 36, 20]


def test_an_index_beyond_a_layer_s_own_size_is_refused(network, tmp_path):
    """Even where it is one in other layers."""
    plan = make_plan(scores_by_chance(network), TargetConfig(ffn=[30, 36, 10]))
    plan.elements[5]["ffn"][-1] = 20
    plan.write(tmp_path)
    with pytest.raises(CheckpointError, match="sublayer 5: ffn names .* to 20, and there are 0 to 19"):
        Plan.read(tmp_path)


@pytest.mark.parametrize("rounds", [False, True], ids=["one round", "several rounds"])
def test_scores_survive_their_file(network, tmp_path, rounds):
    scores = scores_by_chance(network, "fingerprint")
    scores.settings = {"num_samples": 7}
    if rounds:
        generator = torch.Generator().manual_seed(0)

        def draw(values):
            return torch.randint(1, 4, values.shape, generator=generator)

        scores.rounds = {"hidden": draw(scores.hidden), "depth": draw(scores.depth["loss"])}
        scores.element_rounds = {axis: [draw(own) for own in values] for axis, values in scores.elements.items()}
    scores.write(tmp_path)
    Manifest("scores").write(tmp_path)
    found = Scores.read(tmp_path)
    assert [list(own.shape) for own in found.elements["heads"]] == [[2, 3], [2, 1], [4, 2]]
    for name in ("network", "depth_settings", "settings", "checkpoint"):
        assert getattr(found, name) == getattr(scores, name)
    for name in ("hidden", "elements", "depth", "rounds", "element_rounds"):
        torch.testing.assert_close(getattr(found, name), getattr(scores, name), rtol=0, atol=0)
    target = TargetConfig(ffn=0.5, heads=0.5)
    assert make_plan(found, target) == make_plan(scores, target)


@pytest.mark.parametrize(
    "target, problems",
    [
        (dict(ffn=30), ["target.ffn = 30 in layer 3's MLP is larger than the source's 20: pruning only removes"]),
        (
            dict(ffn=40),
            [
                "target.ffn = 40 in layer 1's MLP is larger than the source's 36: pruning only removes",
                "target.ffn = 40 in layer 3's MLP is larger than the source's 20: pruning only removes",
            ],
        ),
        (
            dict(groups=3),
            [
                "target.groups = 3 in layer 0's attention is larger than the source's 2: pruning only removes",
                "target.groups = 3 in layer 2's attention is larger than the source's 2: pruning only removes",
            ],
        ),
        (
            dict(heads=2),
            [
                "target.heads = 2 in layer 3's attention is not a multiple of the 4 query groups: every query group "
                "keeps the same number of heads"
            ],
        ),
        (
            dict(groups=[2, 2, 1], heads=[6, 2, 3]),
            ["target.heads = 3 in layer 3's attention is larger than the kept groups' 2: pruning only removes"],
        ),
        (
            dict(ffn=[44, 36, 21]),
            ["target.ffn = 21 in layer 3's MLP is larger than the source's 20: pruning only removes"],
        ),
        (
            dict(ffn=[44, 36]),
            ["target.ffn has 2 sizes, and the source has 3 MLP sublayers: give one for each, or one for all"],
        ),
        (
            dict(heads=[6, 2, 8, 8]),
            ["target.heads has 4 sizes, and the source has 3 attention sublayers: give one for each, or one for all"],
        ),
    ],
    ids=str,
)
def test_targets_that_a_layer_cannot_reach_name_it(network, target, problems):
    with pytest.raises(ConfigError) as raised:
        make_plan(scores_by_chance(network), TargetConfig(**target))
    assert raised.value.problems == problems


def silence(model, plan):
    """Set all weights of a transformers model to zero that go with what a plan drops of its layers."""
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            halves = [(layer.self_attn, layer.input_layernorm), (layer.mlp, layer.post_attention_layernorm)]
            for position, modules in zip((2 * number, 2 * number + 1), halves, strict=True):
                if position not in plan.sublayers:
                    for parameter in (p for module in modules for p in module.parameters()):
                        parameter.zero_()
            if 2 * number + 1 in plan.sublayers:
                gone = np.setdiff1d(np.arange(44), plan.elements[2 * number + 1]["ffn"])
                layer.mlp.down_proj.weight[:, gone] = 0
                for name in ("gate_proj", "up_proj"):
                    for parameter in getattr(layer.mlp, name).parameters() if hasattr(layer.mlp, name) else ():
                        parameter[gone] = 0
            if 2 * number in plan.sublayers:
                own, attention = plan.elements[2 * number], layer.self_attn
                kept = [group * 3 + head for group, of_group in zip(own["groups"], own["heads"]) for head in of_group]
                gone = np.setdiff1d(np.arange(6), kept)
                attention.o_proj.weight.view(48, 6, HEAD_DIM)[:, gone] = 0
                for parameter in attention.q_proj.parameters():
                    parameter.view(6, HEAD_DIM, -1)[gone] = 0
                for parameter in (*attention.k_proj.parameters(), *attention.v_proj.parameters()):
                    parameter.view(2, HEAD_DIM, -1)[np.setdiff1d(np.arange(2), own["groups"])] = 0


def of_kept(plan, places, kind):
    """Of scores by place of the whole network, `[44]` or `[2, 3]`, those that a plan keeps."""
    for position in plan.sublayers:
        own = plan.elements[position]
        if kind == "ffn" and "ffn" in own:
            yield places[position][own["ffn"]]
        if kind == "heads" and "heads" in own:
            of_groups = zip(own["groups"], own["heads"], strict=True)
            yield torch.stack([places[position].view(2, 3)[group, heads] for group, heads in of_groups])


@pytest.fixture(scope="module", params=NETWORKS)
def pair(request):
    """A transformers model of equal layers and a plan of unlike ones, without what the plan drops."""
    theirs = hf_model(**NETWORKS[request.param])
    network = network_from_config(theirs.config.to_dict())
    plan = make_plan(scores_by_chance(network), TargetConfig(**BY_LAYER))
    for position in (2, 5):
        plan.sublayers.remove(position)
        del plan.elements[position]
    assert plan.target.pattern == "*--**-"
    source = StateDict(network, {name: tensor.clone() for name, tensor in theirs.state_dict().items()})
    silence(theirs, plan)
    return theirs, plan, Pruned(source, plan)


@pytest.fixture(scope="module")
def ctx():
    with parallel_context(ParallelConfig()) as ctx:
        yield ctx


@pytest.fixture(scope="module")
def ours(pair, ctx):
    """The model that is left, by its own weights."""
    *_, source = pair
    model_chunks = build_model(source.network, ctx, DType.FP32)
    load_weights(model_chunks, source, ctx)
    return model_chunks


@pytest.mark.parametrize("criterion", [Criterion.ACTIVATION, Criterion.WEIGHT, Criterion.ACTIVATION_WEIGHT])
def test_elements_have_the_scores_that_they_have_where_the_others_are_silent(pair, ours, ctx, criterion):
    theirs, plan, source = pair
    samples = samples_for(theirs)
    found = score_model(ours, source.network, ctx, samples, score_config(criterion=criterion, criteria=[]))
    activations = direct_activations(theirs, samples, Aggregation.MEAN, Aggregation.L2)
    by_sublayer = direct_weights(theirs, outgoing=criterion is Criterion.ACTIVATION_WEIGHT)
    weights = {
        "hidden": dict(enumerate(by_sublayer["hidden"])),
        "ffn": dict(zip(range(1, 8, 2), by_sublayer["ffn"], strict=True)),
        "heads": dict(zip(range(0, 8, 2), by_sublayer["heads"], strict=True)),
    }
    places = {"hidden": [*plan.sublayers, 8], "ffn": [1, 3, 7], "heads": [0, 4, 6]}
    expected = {axis: {} for axis in places}
    for axis, of_axis in places.items():
        for place in of_axis:
            watched, norms = activations[axis][place], weights[axis][place]
            expected[axis][place] = {
                Criterion.ACTIVATION: watched,
                Criterion.WEIGHT: norms,
                Criterion.ACTIVATION_WEIGHT: watched * norms,
            }[criterion]
    hidden = torch.stack(list(expected["hidden"].values()))
    hidden = hidden.square().sum(0).sqrt() if criterion is Criterion.WEIGHT else hidden.sum(0)
    torch.testing.assert_close(found.hidden, hidden, rtol=1e-4, atol=1e-5)
    for axis in ("ffn", "heads"):
        torch.testing.assert_close(
            found.elements[axis], list(of_kept(plan, expected[axis], axis)), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("unit", Unit)
def test_leaving_out_a_unit_does_what_it_does_where_the_others_are_silent(pair, ours, ctx, unit):
    theirs, plan, source = pair
    samples, network = samples_for(theirs), source.network
    criteria = [criterion for criterion in DepthCriterion if criterion is not DepthCriterion.ACCURACY]
    config = score_config(criterion=Criterion.WEIGHT, criteria=criteria, unit=unit)
    found = score_model(ours, network, ctx, samples, config).depth
    units = network.layers if unit is Unit.LAYER else [(position,) for position in range(6)]
    assert network.layers == [(0, 1), (2,), (3,), (4, 5)]
    missing = {2, 5}
    effects = [
        direct_effects(theirs, samples, missing, {*missing, *(plan.sublayers[p] for p in own)}, missing)
        for own in units
    ]
    assert found.keys() == {criterion.value for criterion in criteria}
    for name, values in found.items():
        expected = torch.tensor([effect[name] for effect in effects], dtype=torch.float64)
        assert expected.abs().max() > 1e-3
        torch.testing.assert_close(values, expected, rtol=2e-4, atol=2e-5)


def test_the_model_that_is_left_predicts_what_the_silenced_one_does(pair, ours):
    theirs, *_ = pair
    tokens = samples_for(theirs).tokens[:, :-1]
    with torch.no_grad():
        found = ours[0](tokens, torch.arange(tokens.size(1)).expand_as(tokens), attention_mask=None)[..., :101]
        expected = theirs(tokens).logits
    assert expected.std() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_plans_of_other_networks_of_the_same_pattern_do_not_fit(network, tmp_path):
    """Only the sizes of one layer differ."""
    write_checkpoint(tmp_path / "source", RandomSource(network), torch.float32, Manifest("checkpoint"), None)
    last = replace(network.sublayers[-1], ffn_hidden_size=22)
    other = network.replace(sublayers=(*network.sublayers[:-1], last))
    make_plan(scores_by_chance(other), TargetConfig(ffn=10)).write_file(tmp_path / "plan.json")
    config = PruneConfig(str(tmp_path / "source"), str(tmp_path / "pruned"), plan=str(tmp_path / "plan.json"))
    with pytest.raises(CheckpointError, match="plan = .* is of another network than checkpoint = "):
        prune(config)
