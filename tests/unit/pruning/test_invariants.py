"""What must hold whatever the weights: order means nothing, what goes is as if silenced, and plans compose."""

import copy
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.source import instances, take
from minitron_megatron.config.schema import Criterion, DType, ParallelConfig, TargetConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.model.axes import axis_sizes, parameters
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import shape_from_config
from minitron_megatron.model.shape import Activation
from minitron_megatron.parallel.groups import process_groups
from minitron_megatron.pruning.calibration import score_model
from minitron_megatron.pruning.plan import Plan, make_plan
from minitron_megatron.pruning.scores import Scores
from minitron_megatron.pruning.slicing import Pruned
from tests.tiny import LLAMA, NEMOTRON, Samples
from tests.unit.pruning.direct import NUM_SAMPLES, SEQUENCE, score_config

LAYERS, HIDDEN, FFN, GROUPS, HEADS, HEAD_DIM = 4, 48, 44, 3, 4, 12
SIZES = {"num_attention_heads": GROUPS * HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD_DIM}
LLAMA_SHAPE = shape_from_config({**LLAMA, **SIZES})
SHAPES = {
    "llama": LLAMA_SHAPE,
    "nemotron": shape_from_config({**NEMOTRON, **SIZES}),
    "nemotron with biases": shape_from_config({**NEMOTRON, **SIZES}).replace(linear_bias=True),
    "biases of q, k and v": LLAMA_SHAPE.replace(qkv_bias=True),
    "norms of q and k": LLAMA_SHAPE.replace(qk_norm=True),
    "all biases": LLAMA_SHAPE.replace(linear_bias=True, gated=False, activation=Activation.GELU),
}
needs_hybrid_model = pytest.mark.skipif(
    find_spec("megatron.core.models.hybrid") is None, reason="HybridModel comes with megatron-core 0.18"
)
TOKENS = torch.randint(0, 101, (2, SEQUENCE), generator=torch.Generator().manual_seed(0))


class Source:
    """Random weights in memory, by key and layer."""

    dtype = torch.float32

    def __init__(self, shape):
        self.shape = shape
        generator = torch.Generator().manual_seed(2)
        # Larger biases would make tokens alike, and whether a neuron is ever active would hang on them alone.
        self.tensors = {}
        for param in parameters(shape):
            scale, size = 0.02 if param.name.endswith(".bias") else 0.15, param.size(axis_sizes(shape))
            for layer in instances(param, shape):
                self.tensors[param.name, layer] = scale * torch.randn(*size, generator=generator)

    def read(self, param, layer, index):
        return take(self.tensors[param.name, layer], index)


@pytest.fixture(params=SHAPES)
def source(request):
    return Source(SHAPES[request.param])


@pytest.fixture(scope="module")
def groups():
    with process_groups(ParallelConfig()) as groups:
        yield groups


@pytest.fixture
def build(groups):
    def build(source):
        [model] = build_model(source.shape, groups, DType.FP32)
        load_weights([model], source, groups)
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


def random_scores(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [
        (shape.hidden,),
        (shape.num_layers, shape.ffn),
        (shape.num_layers, shape.num_query_groups, shape.heads_per_group),
        (shape.num_layers,),
    ]
    *width, depth = (torch.rand(*size, generator=generator, dtype=torch.float64) for size in sizes)
    return Scores(shape, *width, {"loss": depth})


def assert_same(found, expected, other=None):
    """And different from `other`, if that is given, or the test would say nothing."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    if other is not None:
        assert (expected - other).abs().max() > 0.02 * expected.abs().max()


def permute(source, scores, axis, order):
    """The same network and the same scores with the elements of one axis in another order."""
    shape, source, scores = source.shape, copy.deepcopy(source), copy.deepcopy(scores)
    tensors = source.tensors

    if axis == "hidden":
        for (name, layer), tensor in tensors.items():
            dim = 0 if "layernorm" in name or "layer_norm" in name or "proj" in name or "fc2" in name else 1
            # Neither what the rows of other axes add, nor norms of heads.
            if dim < tensor.ndim and tensor.size(dim) == HIDDEN:
                tensors[name, layer] = tensor.index_select(dim, order)
        scores.hidden = scores.hidden[order]
    elif axis == "ffn":
        halves = 2 if shape.gated else 1
        for layer in range(LAYERS):
            for name in ("mlp.linear_fc1.weight", "mlp.linear_fc1.bias"):
                if (name, layer) in tensors:
                    tensor = tensors[name, layer]
                    parts = tensor.view(halves, FFN, *tensor.shape[1:])
                    tensors[name, layer] = parts[:, order].reshape(tensor.shape)
            tensors["mlp.linear_fc2.weight", layer] = tensors["mlp.linear_fc2.weight", layer][:, order]
        scores.ffn = scores.ffn[:, order]
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
        scores.head = scores.head[:, order] if axis == "group" else scores.head[:, :, order]
    return source, scores


@pytest.mark.parametrize("axis, size", [("hidden", HIDDEN), ("ffn", FFN), ("group", GROUPS), ("head", HEADS)])
def test_the_order_of_elements_changes_nothing(source, logits, axis, size):
    merge = axis == "head"  # which is of heads alone
    scores, target = random_scores(source.shape), TargetConfig(layers=3, hidden=40, ffn=30, groups=2, heads=6)
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
        position // 2: [(g, h) for g, heads in zip(groups, plan.head[position], strict=True) for h in heads]
        for position, groups in plan.group.items()
    }


@pytest.mark.parametrize(
    "target",
    [dict(ffn=30), dict(heads=6), dict(groups=2), dict(groups=1, heads=3), dict(layers=3), dict(layers=2, ffn=20)],
    ids=str,
)
def test_what_goes_is_as_if_silenced(source, build, logits, target):
    plan = make_plan(random_scores(source.shape), TargetConfig(**target))
    gone = set(range(2 * LAYERS)) - set(plan.sublayers)
    whole = build(source)
    everything = {p // 2: [] for p in gone}
    ffn = {**everything, **{p // 2: kept for p, kept in plan.ffn.items()}}
    with silenced(whole, ffn, {**everything, **heads_of(plan)}, gone):
        expected = logits(whole)
    assert_same(logits(source, plan), expected, logits(whole))


@pytest.mark.parametrize(
    "kept",
    [
        [0, 3, 4, 5, 6, 7],  # attention and MLP still take turns
        pytest.param([0, 3, 5, 6, 7], marks=needs_hybrid_model),  # *--*-
        pytest.param([1, 2, 4, 5], marks=needs_hybrid_model),  # -**-
    ],
    ids=str,
)
def test_sublayers_may_go_by_themselves(source, build, logits, kept):
    plan = make_plan(random_scores(source.shape), TargetConfig(ffn=30, heads=6))
    plan.sublayers = kept
    assert plan.target.pattern == "".join("*-"[position % 2] for position in kept)
    ffn = {p // 2: neurons for p, neurons in plan.ffn.items()}
    whole = build(source)
    with silenced(whole, ffn, heads_of(plan), set(range(2 * LAYERS)) - set(kept)):
        expected = logits(whole)
    assert_same(logits(source, plan), expected, logits(whole))


def test_every_sublayer_of_another_pattern_is_cut_from_its_own_weights(source):
    """Also the final norm, whose name depends on the pattern."""
    plan = make_plan(random_scores(source.shape), TargetConfig(hidden=40))
    plan.sublayers = [0, 3, 5, 6, 7]
    pruned, channels = Pruned(source, plan), torch.tensor(plan.hidden)
    for name, layer, origin in [
        ("decoder.final_norm.weight", None, ("decoder.final_layernorm.weight", None)),
        ("self_attention.linear_qkv.layer_norm_weight", 1, ("self_attention.linear_qkv.layer_norm_weight", 3)),
        ("mlp.linear_fc1.layer_norm_weight", 1, ("mlp.linear_fc1.layer_norm_weight", 2)),
    ]:
        [param] = [p for p in parameters(pruned.shape) if p.name == name]
        assert torch.equal(pruned.read(param, layer, [np.arange(40)]), source.tensors[origin][channels])


def test_two_plans_are_one_after_the_other(source, logits):
    first = make_plan(random_scores(source.shape), TargetConfig(layers=3, hidden=44, ffn=36, groups=2, heads=6))
    half_way = Pruned(source, first)
    second = make_plan(random_scores(half_way.shape, 1), TargetConfig(layers=2, hidden=40, ffn=30, groups=1, heads=2))
    one = first.then(second)
    assert one.target == second.target and one.problems() == [] and one.source == source.shape
    expected = logits(half_way, second)
    assert torch.equal(logits(source, one), expected)
    other = Plan(**{**one.__dict__, "hidden": first.hidden[:40]})
    assert one.hidden != other.hidden and not torch.equal(logits(source, other), expected)


@pytest.mark.parametrize(
    "part, target",
    [("neurons", dict(ffn=42)), ("heads", dict(heads=9)), ("groups", dict(groups=2)), ("channels", dict(hidden=46))],
)
def test_what_nothing_reads_goes_first(source, build, groups, logits, part, target):
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
        name = "embedding.word_embeddings.weight" if source.shape.tied else "output_layer.weight"
        source.tensors[name, None][:, channels] = 0
    model = build(source)
    samples = Samples(NUM_SAMPLES, SEQUENCE, 101)
    how = score_config(criterion=Criterion.ACTIVATION_WEIGHT, criteria=[])
    plan = make_plan(score_model([model], source.shape, groups, samples, how), TargetConfig(**target))
    if part == "channels":
        assert plan.hidden == [channel for channel in range(HIDDEN) if channel not in channels]
        return
    for layer in range(LAYERS):
        if part == "neurons":
            assert plan.ffn[2 * layer + 1] == [n for n in range(FFN) if n not in dead[layer]]
        elif part == "heads":
            assert [set(range(HEADS)) - set(kept) for kept in plan.head[2 * layer]] == [{h} for h in dead[layer]]
        else:
            assert plan.group[2 * layer] == [g for g in range(GROUPS) if g != dead[layer]]
    assert_same(logits(source, plan), logits(model))


@pytest.mark.parametrize("kept", [2, 3, 4])
def test_merged_heads_are_the_papers_formula(source, kept):
    scores = random_scores(source.shape)
    plan = make_plan(scores, TargetConfig(heads=kept * GROUPS), merge_heads=True)
    pruned = Pruned(source, plan)
    for param in parameters(source.shape):
        if not param.name.startswith("self_attention.linear_qkv."):
            continue
        for layer in instances(param, source.shape) if "layer_norm" not in param.name else ():
            tensor = source.tensors[param.name, layer]
            rows = tensor.view(GROUPS, HEADS + 2, HEAD_DIM, *tensor.shape[1:])
            expected = []
            for group in range(GROUPS):
                by_importance = scores.head[layer, group].argsort(descending=True).tolist()
                head = {n: rows[group, by_importance[n - 1]] for n in range(1, HEADS + 1)}  # as the paper counts
                merged = dict(head)
                for i in range(2 * kept - HEADS + 1, kept + 1):
                    merged[i] = head[i] + (head[i] - head[2 * kept - i + 1])
                stay = sorted(range(1, kept + 1), key=lambda n: by_importance[n - 1])
                expected += [*(merged[n] for n in stay), rows[group, HEADS], rows[group, HEADS + 1]]
            index = [np.arange(n) for n in param.size(axis_sizes(pruned.shape))]
            found = pruned.read(param, layer, index)
            torch.testing.assert_close(found, torch.cat(expected))
            # Any part of it is the same as that part of the whole.
            part = [index[0][3::5], *index[1:]]
            assert torch.equal(pruned.read(param, layer, part), found[3::5])
    # Nothing else knows of it.
    plain = Pruned(source, make_plan(scores, TargetConfig(heads=kept * GROUPS)))
    for param in parameters(source.shape):
        if not param.has_queries:
            index = [np.arange(n) for n in param.size(axis_sizes(pruned.shape))]
            for layer in instances(param, source.shape):
                assert torch.equal(pruned.read(param, layer, index), plain.read(param, layer, index))


def test_more_heads_than_half_cannot_be_merged():
    with pytest.raises(ConfigError) as raised:
        make_plan(random_scores(LLAMA_SHAPE), TargetConfig(heads=GROUPS), merge_heads=True)
    assert raised.value.problems == [
        "merge_heads = true, and 1 of 4 heads stay in each query group: merging needs at least half of them; "
        "keep 6 heads or set merge_heads=false"
    ]


def test_plans_that_merge_do_not_compose():
    first = make_plan(random_scores(LLAMA_SHAPE), TargetConfig(heads=9), merge_heads=True)
    second = make_plan(random_scores(first.target), TargetConfig(hidden=40))
    with pytest.raises(ValueError, match="plans that merge heads change weights: apply them one after the other"):
        first.then(second)
