"""What must hold whatever the weights: order means nothing, what goes is as if silenced, and plans compose."""

import copy
from contextlib import ExitStack, contextmanager

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.schema import Criterion, DType, ParallelConfig, TargetConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.layers.mlp import Activation
from minitron_megatron.model.parameters import parameters
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.score_model import score_model
from minitron_megatron.pruning.slicing import Pruned
from tests.tiny import LLAMA, NEMOTRON, Samples, changed, scores_by_chance
from tests.unit.pruning.direct import NUM_SAMPLES, SEQUENCE, RandomSource, score_config

LAYERS, HIDDEN, FFN, GROUPS, HEADS, HEAD_DIM = 4, 48, 44, 3, 4, 12
SIZES = {"num_attention_heads": GROUPS * HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD_DIM}
LLAMA_NETWORK = network_from_config({**LLAMA, **SIZES})
NEMOTRON_NETWORK = network_from_config({**NEMOTRON, **SIZES})
NETWORKS = {
    "llama": LLAMA_NETWORK,
    "nemotron": NEMOTRON_NETWORK,
    "nemotron with biases": changed(NEMOTRON_NETWORK, bias=True),
    "biases of q, k and v": changed(LLAMA_NETWORK, qkv_bias=True),
    "norms of q and k": changed(LLAMA_NETWORK, qk_norm=True),
    "all biases": changed(LLAMA_NETWORK, bias=True, gated=False, activation=Activation.GELU),
}
TOKENS = torch.randint(0, 101, (2, SEQUENCE), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=NETWORKS)
def source(request):
    return RandomSource(NETWORKS[request.param])


@pytest.fixture(scope="module")
def ctx():
    with parallel_context(ParallelConfig()) as ctx:
        yield ctx


@pytest.fixture
def build(ctx):
    def build(source):
        [model] = build_model(source.network, ctx, DType.FP32)
        load_weights([model], source, ctx)
        return model

    return build


@pytest.fixture
def logits(build):
    """Of what a plan leaves of a source, or of a model."""

    def logits(source, plan=None):
        model = source if isinstance(source, torch.nn.Module) else build(Pruned(source, plan) if plan else source)
        with torch.no_grad():
            return model(TOKENS, torch.arange(SEQUENCE).expand(2, -1), attention_mask=None)

    return logits


def assert_same(found, expected, other=None):
    """And different from `other`, if that is given, or the test would say nothing."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if other is not None:
        assert (expected - other).abs().max() > 0.02 * expected.abs().max()


def permute(source, scores, axis, order):
    """The same network and the same scores with the elements of one axis in another order."""
    network, source, scores = source.network, copy.deepcopy(source), copy.deepcopy(scores)
    tensors = source.tensors

    if axis == "hidden":
        for (name, layer), tensor in tensors.items():
            dim = 0 if "layernorm" in name or "layer_norm" in name or "proj" in name or "fc2" in name else 1
            # Neither what the rows of other axes add, nor norms of heads.
            if dim < tensor.ndim and tensor.size(dim) == HIDDEN:
                tensors[name, layer] = tensor.index_select(dim, order)
        scores.hidden = scores.hidden[order]
    elif axis == "ffn":
        halves = 2 if network.sublayers[1].gated else 1
        for layer in range(LAYERS):
            for name in ("mlp.linear_fc1.weight", "mlp.linear_fc1.bias"):
                if (name, layer) in tensors:
                    tensor = tensors[name, layer]
                    parts = tensor.view(halves, FFN, *tensor.shape[1:])
                    tensors[name, layer] = parts[:, order].reshape(tensor.shape)
            tensors["mlp.linear_fc2.weight", layer] = tensors["mlp.linear_fc2.weight", layer][:, order]
        scores.elements["ffn"] = [own[order] for own in scores.elements["ffn"]]
    else:
        for layer in range(LAYERS):
            for name in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
                if (name, layer) in tensors:
                    tensor = tensors[name, layer]
                    rows = tensor.view(GROUPS, HEADS + 2, HEAD_DIM, *tensor.shape[1:])
                    if axis == "group":
                        rows = rows[order]
                    else:  # key and value stay where they are
                        rows = rows[:, [*order.tolist(), HEADS, HEADS + 1]]
                    tensors[name, layer] = rows.reshape(tensor.shape)
            name = "self_attention.linear_proj.weight"
            rows = tensors[name, layer].view(HIDDEN, GROUPS, HEADS, HEAD_DIM)
            rows = rows[:, order] if axis == "group" else rows[:, :, order]
            tensors[name, layer] = rows.reshape(HIDDEN, -1)
        heads = scores.elements["heads"]
        scores.elements["heads"] = [own[order] if axis == "group" else own[:, order] for own in heads]
    return source, scores


@pytest.mark.parametrize("axis, size", [("hidden", HIDDEN), ("ffn", FFN), ("group", GROUPS), ("head", HEADS)])
def test_the_order_of_elements_changes_nothing(source, logits, axis, size):
    merge = axis == "head"  # which is of heads alone
    scores, target = scores_by_chance(source.network), TargetConfig(layers=3, hidden=40, ffn=30, groups=2, heads=6)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(3))
    assert not torch.equal(order, torch.arange(size))
    expected = logits(source, make_plan(scores, target, merge_heads=merge))
    permuted, permuted_scores = permute(source, scores, axis, order)
    assert_same(logits(permuted), logits(source), expected)
    assert_same(logits(permuted, make_plan(permuted_scores, target, merge_heads=merge)), expected)
    # Scores that do not move along point at other elements.
    other = logits(permuted, make_plan(scores, target, merge_heads=merge))
    assert (other - expected).abs().max() > 0.02 * expected.abs().max()


@contextmanager
def silenced(model, ffn=None, head=None, gone=()):
    """A model without some of its parts.

    Args:
        ffn: kept neurons, by layer.
        head: kept heads, as pairs of group and head, by layer.
        gone: positions of sublayers that add nothing.
    """

    def mask(module, kept, size):
        gate = torch.zeros(size)
        gate[kept] = 1
        return module.register_forward_pre_hook(lambda m, args: (args[0] * gate, *args[1:]))

    def nothing(m, args, output):
        return torch.zeros_like(output[0]), None

    with ExitStack() as stack:
        for number, layer in enumerate(model.decoder.layers):
            hooks = []
            if ffn:
                hooks.append(mask(layer.mlp.linear_fc2, ffn[number], FFN))
            if head:
                first = [(group * HEADS + head) * HEAD_DIM for group, head in head[number]]
                columns = [column for start in first for column in range(start, start + HEAD_DIM)]
                hooks.append(mask(layer.self_attention.linear_proj, columns, GROUPS * HEADS * HEAD_DIM))
            if 2 * number in gone:
                hooks.append(layer.self_attention.register_forward_hook(nothing))
            if 2 * number + 1 in gone:
                hooks.append(layer.mlp.register_forward_hook(nothing))
            for hook in hooks:
                stack.callback(hook.remove)
        yield model


def heads_of(plan):
    """Kept heads by layer, as pairs of group and head."""
    return {
        position // 2: [(g, h) for g, heads in zip(own["groups"], own["heads"], strict=True) for h in heads]
        for position, own in plan.elements.items()
        if "heads" in own
    }


def neurons_of(plan):
    """Kept neurons by layer."""
    return {position // 2: own["ffn"] for position, own in plan.elements.items() if "ffn" in own}


@pytest.mark.parametrize(
    "target",
    [dict(ffn=30), dict(heads=6), dict(groups=2), dict(groups=1, heads=3), dict(layers=3), dict(layers=2, ffn=20)],
    ids=str,
)
def test_what_goes_is_as_if_silenced(source, build, logits, target):
    plan = make_plan(scores_by_chance(source.network), TargetConfig(**target))
    gone = set(range(2 * LAYERS)) - set(plan.sublayers)
    whole = build(source)
    everything = {p // 2: [] for p in gone}
    with silenced(whole, {**everything, **neurons_of(plan)}, {**everything, **heads_of(plan)}, gone):
        expected = logits(whole)
    assert_same(logits(source, plan), expected, logits(whole))


@pytest.mark.parametrize(
    "kept",
    [
        [0, 3, 4, 5, 6, 7],  # attention and MLP still take turns
        [0, 3, 5, 6, 7],  # *--*-
        [1, 2, 4, 5],  # -**-
    ],
    ids=str,
)
def test_sublayers_may_go_by_themselves(source, build, logits, kept):
    plan = make_plan(scores_by_chance(source.network), TargetConfig(ffn=30, heads=6))
    plan.sublayers = kept
    assert plan.target.pattern == "".join("*-"[position % 2] for position in kept)
    whole = build(source)
    with silenced(whole, neurons_of(plan), heads_of(plan), set(range(2 * LAYERS)) - set(kept)):
        expected = logits(whole)
    assert_same(logits(source, plan), expected, logits(whole))


def test_every_sublayer_of_another_pattern_is_cut_from_its_own_weights(source):
    plan = make_plan(scores_by_chance(source.network), TargetConfig(hidden=40))
    plan.sublayers = [0, 3, 5, 6, 7]
    pruned, channels = Pruned(source, plan), torch.tensor(plan.hidden)
    attention, mlp = "self_attention.linear_qkv.layer_norm_weight", "mlp.linear_fc1.layer_norm_weight"
    for name, position, layer in [
        ("decoder.final_layernorm.weight", None, None),
        (attention, 0, 0),
        (mlp, 1, 1),
        (mlp, 2, 2),
        (attention, 3, 3),
        (mlp, 4, 3),
    ]:
        [param] = [p for p in parameters(pruned.network) if (p.name, p.position) == (name, position)]
        assert torch.equal(pruned.read(param, [np.arange(40)]), source.tensors[name, layer][channels])


def test_two_plans_are_one_after_the_other(source, logits):
    first = make_plan(scores_by_chance(source.network), TargetConfig(layers=3, hidden=44, ffn=36, groups=2, heads=6))
    half_way = Pruned(source, first)
    target = TargetConfig(layers=2, hidden=40, ffn=30, groups=1, heads=2)
    second = make_plan(scores_by_chance(half_way.network, seed=2), target)
    one = first.then(second)
    assert one.target == second.target and one.problems() == [] and one.source == source.network
    expected = logits(half_way, second)
    assert torch.equal(logits(source, one), expected)
    other = Plan(**{**one.__dict__, "hidden": first.hidden[:40]})
    assert one.hidden != other.hidden and not torch.equal(logits(source, other), expected)


@pytest.mark.parametrize(
    "part, target",
    [("neurons", dict(ffn=42)), ("heads", dict(heads=9)), ("groups", dict(groups=2)), ("channels", dict(hidden=46))],
)
def test_what_nothing_reads_goes_first(source, build, ctx, logits, part, target):
    """However large it is. A channel that nothing reads has its part in the norms, so that it is missed if it goes."""
    generator = np.random.default_rng(0)
    dead = {}
    channels = sorted(generator.choice(HIDDEN, 2, replace=False).tolist())
    for layer in range(LAYERS):
        proj = source.tensors["self_attention.linear_proj.weight", layer].view(HIDDEN, GROUPS, HEADS, HEAD_DIM)
        if part == "neurons":
            dead[layer] = sorted(generator.choice(FFN, 2, replace=False).tolist())
            source.tensors["mlp.linear_fc2.weight", layer][:, dead[layer]] = 0
            rows = source.tensors["mlp.linear_fc1.weight", layer].view(-1, FFN, HIDDEN)
            rows[:, dead[layer]] *= 10
        elif part == "channels":
            source.tensors["self_attention.linear_qkv.weight", layer][:, channels] = 0
            source.tensors["mlp.linear_fc1.weight", layer][:, channels] = 0
            source.tensors["mlp.linear_fc2.weight", layer][channels] *= 10
        elif part == "heads":
            dead[layer] = generator.integers(HEADS, size=GROUPS).tolist()
            for group, head in enumerate(dead[layer]):
                proj[:, group, head] = 0
        else:
            dead[layer] = int(generator.integers(GROUPS))
            proj[:, dead[layer]] = 0
    if part == "channels":
        name = "embedding.word_embeddings.weight" if source.network.tie_embeddings else "output_layer.weight"
        source.tensors[name, None][:, channels] = 0
    model = build(source)
    samples = Samples(NUM_SAMPLES, SEQUENCE, 101)
    how = score_config(criterion=Criterion.ACTIVATION_WEIGHT, criteria=[])
    plan = make_plan(score_model([model], source.network, ctx, samples, how), TargetConfig(**target))
    if part == "channels":
        assert plan.hidden == [channel for channel in range(HIDDEN) if channel not in channels]
        return
    for layer in range(LAYERS):
        if part == "neurons":
            assert plan.elements[2 * layer + 1]["ffn"] == [n for n in range(FFN) if n not in dead[layer]]
        elif part == "heads":
            kept = plan.elements[2 * layer]["heads"]
            assert [set(range(HEADS)) - set(own) for own in kept] == [{h} for h in dead[layer]]
        else:
            assert plan.elements[2 * layer]["groups"] == [g for g in range(GROUPS) if g != dead[layer]]
    assert_same(logits(source, plan), logits(model))


@pytest.mark.parametrize("kept", [2, 3, 4])
def test_merged_heads_are_the_papers_formula(source, kept):
    scores = scores_by_chance(source.network)
    plan = make_plan(scores, TargetConfig(heads=kept * GROUPS), merge_heads=True)
    pruned = Pruned(source, plan)
    plain = Pruned(source, make_plan(scores, TargetConfig(heads=kept * GROUPS)))
    for param in parameters(pruned.network):
        index = [np.arange(size) for size in param.shape]
        found = pruned.read(param, index)
        if param.name not in ("self_attention.linear_qkv.weight", "self_attention.linear_qkv.bias"):
            # Nothing else knows of it.
            assert torch.equal(found, plain.read(param, index))
            continue
        tensor = source.tensors[param.name, param.layer]
        rows = tensor.view(GROUPS, HEADS + 2, HEAD_DIM, *tensor.shape[1:])
        expected = []
        for group, of_heads in enumerate(scores.elements["heads"][param.layer]):
            by_importance = of_heads.argsort(descending=True).tolist()
            head = {n: rows[group, by_importance[n - 1]] for n in range(1, HEADS + 1)}  # as the paper counts
            merged = dict(head)
            for i in range(2 * kept - HEADS + 1, kept + 1):
                merged[i] = head[i] + (head[i] - head[2 * kept - i + 1])
            stay = sorted(range(1, kept + 1), key=lambda n: by_importance[n - 1])
            expected += [*(merged[n] for n in stay), rows[group, HEADS], rows[group, HEADS + 1]]
        torch.testing.assert_close(found, torch.cat(expected))
        # Any part of it is the same as that part of the whole.
        part = [index[0][3::5], *index[1:]]
        assert torch.equal(pruned.read(param, part), found[3::5])


def test_more_heads_than_half_cannot_be_merged():
    with pytest.raises(ConfigError) as raised:
        make_plan(scores_by_chance(LLAMA_NETWORK), TargetConfig(heads=GROUPS), merge_heads=True)
    assert raised.value.problems == [
        "merge_heads = true, and 1 of 4 heads stay in each query group: merging needs at least half of them; "
        "keep 6 heads or set merge_heads=false"
    ]


def test_plans_that_merge_do_not_compose():
    first = make_plan(scores_by_chance(LLAMA_NETWORK), TargetConfig(heads=9), merge_heads=True)
    second = make_plan(scores_by_chance(first.target), TargetConfig(hidden=40))
    with pytest.raises(ValueError, match="plans that merge heads change weights: apply them one after the other"):
        first.then(second)
