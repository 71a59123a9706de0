"""Plans for any network, layout and target."""

import re
import tempfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.schema import ParallelConfig, TargetConfig, Unit
from minitron_megatron.errors import ConfigError
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP
from minitron_megatron.model.network import Network, layout_problems, pad_vocab, transformer
from minitron_megatron.model.norms import NormKind
from minitron_megatron.model.parameters import parameters
from minitron_megatron.parallel.layout import layers_per_stage
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.ranges import from_ranges, to_ranges
from minitron_megatron.pruning.scores import DepthSettings, Scores
from minitron_megatron.pruning.slicing import Pruned, write_pruned
from minitron_megatron.pruning.target import resolve_target
from tests.tiny import without_sublayers

PROPERTIES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def networks(draw, tensor):
    """Of layers that are alike, or each of sizes of its own, and then some sublayers are missing."""
    gated, bias, head_dim = draw(st.booleans()), draw(st.booleans()), draw(st.sampled_from([2, 4]))
    switches = {"bias": bias, "qkv_bias": draw(st.booleans()), "qk_norm": draw(st.booleans())}

    def layer():
        groups, per_group = draw(st.integers(1, 4)) * tensor, draw(st.integers(1, 4))
        if tensor > 1 and draw(st.booleans()):  # two ranks share a group
            groups, per_group = tensor // 2, 2 * per_group
        attention = Attention(groups * per_group, groups, head_dim, **switches)
        return attention, MLP(draw(st.integers(2, 40)) * tensor, gated=gated, bias=bias)

    layers, are_alike = draw(st.integers(1, 5)), draw(st.booleans())
    network = Network(
        transformer(layers, layer()) if are_alike else sum((layer() for _ in range(layers)), ()),
        hidden_size=draw(st.integers(4, 80)),
        vocab_size=100,
        padded_vocab_size=pad_vocab(100, 4),
        norm=draw(st.sampled_from(NormKind)),
        tie_embeddings=draw(st.booleans()),
    )
    # There is one of each kind in any case.
    gone = () if are_alike else draw(st.sets(st.integers(2, 2 * layers + 1), max_size=3))
    return without_sublayers(network, *gone)


def size_of(has):
    return st.none() | st.integers(1, has) | st.floats(0.01, 0.99)


def sizes_of(setting, has):
    """What may be asked for of an axis, of which the sublayers have so many: one size for all, or one for each."""
    if len(set(has)) == 1:
        one = size_of(has[0])
    else:
        # Few numbers of heads are a multiple of every layer's query groups.
        one = st.none() | st.floats(0.01, 0.99) | (st.nothing() if setting == "heads" else st.integers(1, min(has)))
    shares = [st.floats(0.01, 0.99)] * len(has)
    numbers = shares if setting == "heads" else [st.integers(1, own) for own in has]
    return one | st.tuples(*(number | share for number, share in zip(numbers, shares, strict=True))).map(list)


@st.composite
def problems(draw):
    """A network, a layout that can split it, a target and scores; few different ones, so that many are equal."""
    tensor = draw(st.sampled_from([1, 2, 4]))
    network = draw(networks(tensor))
    layers = len(network.layers)
    sizes = {"hidden": draw(size_of(network.hidden_size))}
    for kind in network.kinds:
        for axis in kind.prunable:
            has = [network.sublayers[position].total(axis) for position in network.positions(kind)]
            sizes[axis.setting] = draw(sizes_of(axis.setting, has))
    by = draw(st.sampled_from(["layers", "keep_layers", "sublayers"]))
    if by == "keep_layers":
        depth = {by: sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1)))}
    elif by == "layers":
        depth = {by: draw(size_of(layers))}
    else:
        depth = {kind.name: draw(size_of(len(network.positions(kind)))) for kind in (Attention, MLP)}
    target = TargetConfig(**sizes, **depth, round_to=draw(st.none() | st.sampled_from([2, 8, 16])))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))

    def random(*size):
        return torch.randint(0, 9, size, generator=generator).double()

    attentions, mlps = ([network.sublayers[p] for p in network.positions(kind)] for kind in (Attention, MLP))
    elements = {
        "ffn": [random(mlp.ffn_hidden_size) for mlp in mlps],
        "heads": [random(own.num_query_groups, own.heads_per_group) for own in attentions],
    }
    unit = Unit.SUBLAYER if by == "sublayers" else Unit.LAYER
    of_units = random(len(network.sublayers) if by == "sublayers" else layers)
    scores = Scores(network, random(network.hidden_size), elements, {"loss": of_units}, DepthSettings(unit))
    pipeline, virtual = draw(st.integers(1, 3)), draw(st.sampled_from([None, 2]))
    return scores, ParallelConfig(tensor, pipeline, virtual_pipeline=virtual), target, draw(st.booleans())


def plan_or_nothing(scores, parallel, target, merge):
    try:
        return make_plan(scores, target, parallel, merge_heads=merge)
    except ConfigError as error:
        # Of sizes within those of the source, only a whole number of heads can be wrong, or too few to merge, or what
        # must be a multiple of more than there is.
        multiples = [re.search(r"a multiple of (\d+), and the source has (\d+)", p) for p in error.problems]
        assert all(int(found[1]) > int(found[2]) for found in multiples if found)
        others = [problem for problem, found in zip(error.problems, multiples, strict=True) if not found]
        assert all("target.heads" in problem or (merge and "merge_heads" in problem) for problem in others)
        assert not others or merge or isinstance(target.sizes.get("heads"), int)
        assume(False)


def ascends_within(indices, size):
    return indices and all(0 <= i < size for i in indices) and all(a < b for a, b in pairwise(indices))


def keeps_the_best(kept, values):
    """Whether what stays has no lower score than what goes."""
    gone = [i for i in range(len(values)) if i not in kept]
    return not gone or values[kept].min() >= values[gone].max()


@PROPERTIES
@given(problems())
def test_a_plan_is_whole_and_survives_its_file(tmp_path, problem):
    scores, _, target, merge = problem
    plan = plan_or_nothing(*problem)
    source, cut = scores.network, plan.target
    assert plan.problems() == []
    assert ascends_within(plan.sublayers, len(source.sublayers)) and list(plan.elements) == plan.sublayers
    assert ascends_within(plan.hidden, source.hidden_size) and len(plan.hidden) == cut.hidden_size
    assert cut.pattern == "".join(source.pattern[position] for position in plan.sublayers)
    attentions = [position for position in plan.sublayers if source.pattern[position] == "*"]
    assert list(plan.merge) == (attentions if merge else [])
    if scores.depth_settings.unit is Unit.LAYER:
        assert all(len(set(layer) & set(plan.sublayers)) in (0, len(layer)) for layer in source.layers)
    if target.keep_layers is not None:
        assert plan.sublayers == [position for layer in target.keep_layers for position in source.layers[layer]]
    for position, left in zip(plan.sublayers, cut.sublayers, strict=True):
        own, has = plan.elements[position], source.sublayers[position]
        number = source.pattern[:position].count(source.pattern[position])
        if source.pattern[position] == "-":
            assert own.keys() == {"ffn"} and ascends_within(own["ffn"], has.ffn_hidden_size)
            assert len(own["ffn"]) == left.ffn_hidden_size
            assert keeps_the_best(own["ffn"], scores.elements["ffn"][number])
            continue
        values = scores.elements["heads"][number]
        assert own.keys() == {"groups", "heads"} and ascends_within(own["groups"], has.num_query_groups)
        assert len(own["groups"]) == len(own["heads"]) == left.num_query_groups
        assert keeps_the_best(own["groups"], values.sum(1))
        for group, heads in zip(own["groups"], own["heads"], strict=True):
            assert ascends_within(heads, has.heads_per_group) and len(heads) == left.heads_per_group
            assert keeps_the_best(heads, values[group])
        if merge:
            for kept, partners in zip(own["heads"], plan.merge[position], strict=True):
                gone = set(range(has.heads_per_group)) - set(kept)
                assert {partner for head, partner in zip(kept, partners, strict=True) if partner != head} == gone
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan


def sizes_found(problem, plan):
    """Name, what was asked for, number before and number after, of everything that can be asked for."""
    scores, _, target, _ = problem
    source, cut = scores.network, plan.target
    asked = {**target.sizes, "layers": target.layers}
    if scores.depth_settings.unit is Unit.LAYER:
        left = [layer for layer in source.layers if set(layer) <= set(plan.sublayers)]
        yield "layers", asked["layers"], len(source.layers), len(left)
    else:
        for kind in (Attention, MLP):
            yield kind.name, asked.get(kind.name), len(source.positions(kind)), len(cut.positions(kind))
    yield "hidden", asked.get("hidden"), source.hidden_size, cut.hidden_size
    for position, after in zip(plan.sublayers, cut.sublayers, strict=True):
        before = source.sublayers[position]
        if source.pattern[position] == "-":
            own = {"ffn": (before.ffn_hidden_size, after.ffn_hidden_size)}
        else:
            own = {
                "groups": (before.num_query_groups, after.num_query_groups),
                "heads": (before.num_heads, after.num_heads),
            }
        for name, sizes in own.items():
            wanted = asked.get(name)
            if isinstance(wanted, list):
                wanted = wanted[source.pattern[:position].count(source.pattern[position])]
            yield name, wanted, *sizes


@PROPERTIES
@given(problems())
def test_sizes_are_what_was_asked_for(problem):
    scores, parallel, target, _ = problem
    plan = plan_or_nothing(*problem)
    source, cut = scores.network, plan.target
    found = list(sizes_found(problem, plan))
    rounded = {"hidden", "ffn"} if target.round_to else set()
    for name, asked, has, size in found:
        if name == "layers" and target.keep_layers is not None:
            assert size == len(target.keep_layers)
        elif asked is None:
            if name != "heads":
                assert size == has
        elif isinstance(asked, int) and name not in rounded:
            assert size == asked
    attentions = [
        (source.sublayers[position], after)
        for position, after in zip(plan.sublayers, cut.sublayers, strict=True)
        if source.pattern[position] == "*"
    ]
    if target.sizes.get("heads") is None:
        assert all(before.heads_per_group == after.heads_per_group for before, after in attentions)
    # Fractions always divide; whole numbers are the user's own, and named where they do not.
    names = {
        "groups": ["num_query_groups", "num_heads"],
        "heads": ["num_query_groups", "num_heads"],
        "ffn": ["ffn_hidden_size"],
    }
    whole = {name for name, asked, *_ in found if name in names and isinstance(asked, int)} - rounded
    left = [p for p in layout_problems(cut, parallel) if not any(name in p for n in whole for name in names[n])]
    # Layers are left to the target alone: every stage has some, as many as any other but for one, or there are too few.
    layers, stages = len(cut.layers), parallel.pipeline * (parallel.virtual_pipeline or 1)
    assert [f"has {layers} layers, too few for the {stages} stages" in p for p in left] == [True] * (layers < stages)
    counts = layers_per_stage(layers, stages)
    assert sum(counts) == layers and max(counts) - min(counts) <= 1 and counts[-1] == min(counts)
    # A fraction is off by at most half of what it is rounded to, unless that is more than there is.
    shares = [case for case in found if isinstance(case[1], float)]
    for name, asked, has, size in shares:
        if name in ("layers", "attention", "mlp"):
            assert abs(size - asked * has) <= 0.5 or size == 1
        if name == "ffn":
            options = {target.round_to} if target.round_to else {64, 8, 1}
            steps = [np.lcm(n, parallel.tensor) for n in options]
            assert size == has or any(
                abs(size - asked * has) <= step / 2 or size in (step, has // step * step) for step in steps
            )
    asked_heads = [asked for name, asked, *_ in found if name == "heads"]
    for asked, (before, after) in zip(asked_heads, attentions, strict=True):
        if isinstance(asked, float):
            most = after.num_query_groups * before.heads_per_group
            step = np.lcm(after.num_query_groups, parallel.tensor)
            assert abs(after.num_heads - asked * before.num_heads) <= step / 2 or after.num_heads in (
                step,
                most // step * step,
            )


class Nothing:
    """A source of zeros, that checks what it is asked for."""

    dtype = torch.float32

    def __init__(self, network):
        self.network = network

    def read(self, param, index):
        for positions, size in zip(index, param.shape, strict=True):
            assert (np.diff(positions) > 0).all() and positions[0] >= 0 and positions[-1] < size
        assert any(param is one for one in parameters(self.network))
        return torch.zeros([]).expand([len(positions) for positions in index])


def whole(param):
    """Every position of a parameter."""
    return [np.arange(size) for size in param.shape]


def num_padding(network):
    """Numbers in the rows that pad the vocabulary."""
    tables = 1 if network.tie_embeddings else 2
    return (network.padded_vocab_size - network.vocab_size) * network.hidden_size * tables


@PROPERTIES
@given(problems())
def test_a_pruned_network_has_the_parameters_of_its_sizes(problem):
    scores, *_ = problem
    pruned = Pruned(Nothing(scores.network), plan_or_nothing(*problem))
    network = pruned.network
    found = [pruned.read(param, whole(param)).numel() for param in parameters(network)]
    assert sum(found) - num_padding(network) == num_parameters(network)

    # The same, counted by hand.
    hidden, vectors = network.hidden_size, 2 if network.norm is NormKind.LAYERNORM else 1
    total = network.vocab_size * hidden * (1 if network.tie_embeddings else 2) + vectors * hidden
    for own in network.sublayers:
        if own.symbol == "*":
            width = own.num_heads * own.head_dim
            qkv = width + 2 * own.num_query_groups * own.head_dim
            matrices, of_heads = (qkv + width) * hidden, 2 * own.head_dim * own.qk_norm * vectors
            biases = qkv * (own.qkv_bias or own.bias) + hidden * own.bias
        else:
            neurons = own.ffn_hidden_size * (2 if own.gated else 1)
            matrices, of_heads = (neurons + own.ffn_hidden_size) * hidden, 0
            biases = (neurons + hidden) * own.bias
        total += matrices + biases + of_heads + vectors * hidden
    assert num_parameters(network) == total


@settings(PROPERTIES, max_examples=25)
@given(problems())
def test_a_pruned_checkpoint_holds_what_its_plan_leaves(tmp_path, problem):
    """On disk: torch's own reader finds as many numbers as the network has, and they are those of the source."""
    scores, parallel, *_ = problem
    plan = plan_or_nothing(*problem)
    network = plan.target
    assume(not layout_problems(network, ParallelConfig(parallel.tensor)))
    folder = Path(tempfile.mkdtemp(dir=tmp_path))
    weights = RandomWeights(scores.network, seed=1)
    write_checkpoint(
        folder / "source", weights, torch.float32, Manifest("checkpoint"), None, tensor_ranks=parallel.tensor
    )
    write_pruned(
        folder / "pruned", Checkpoint(folder / "source"), plan, Manifest("checkpoint"), tensor_ranks=parallel.tensor
    )
    metadata = FileSystemReader(folder / "pruned/release").read_metadata().state_dict_metadata
    tensors = [entry for entry in metadata.values() if isinstance(entry, TensorStorageMetadata)]
    assert sum(tensor.size.numel() for tensor in tensors) - num_padding(network) == num_parameters(network)
    for tensor in tensors:
        assert sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel()
    found, expected = Checkpoint(folder / "pruned"), Pruned(weights, plan)
    assert found.network == network
    for param in parameters(network):
        assert torch.equal(found.read(param, whole(param)), expected.read(param, whole(param)))


@PROPERTIES
@given(st.sets(st.integers(0, 300), min_size=1))
@example({0})
def test_ranges_are_read_back(indices):
    text = to_ranges(sorted(indices))
    assert from_ranges(text, 301) == sorted(indices)
    assert from_ranges(text.replace(",", " ,  "), 301) == sorted(indices)
    assert text.count(",") + 1 == sum(i - 1 not in indices for i in indices)
    first, last = min(indices), max(indices)
    with pytest.raises(ValueError, match=f"^here names {first} to {last}, and there are 0 to {last - 1}$"):
        from_ranges(text, last, "here")


@pytest.mark.parametrize(
    "target, tensor, sizes",
    [
        (dict(ffn=0.5), 1, dict(ffn=7168)),
        (dict(ffn=0.643), 4, dict(ffn=9216)),  # a multiple of 64 x 4
        (dict(hidden=0.75, ffn=0.75), 1, dict(hidden=3072, ffn=10752)),
        (dict(hidden=3000), 1, dict(hidden=3000)),
        (dict(hidden=3000, round_to=128), 1, dict(hidden=2944)),
        (dict(hidden=0.01), 1, dict(hidden=64)),
        (dict(ffn=9999, round_to=96), 4, dict(ffn=9984)),
        (dict(groups=0.5), 1, dict(groups=4, heads_per_group=4)),
        (dict(groups=0.3), 4, dict(groups=2)),  # each shared by two ranks
        (dict(groups=0.3), 16, dict(groups=4)),  # not 2, whose eight heads 16 ranks could not share
        (dict(heads=0.3), 16, dict(heads_per_group=2)),
        (dict(heads=0.5), 1, dict(groups=8, heads_per_group=2)),
        (dict(heads=0.3), 1, dict(heads_per_group=1)),
        # Of the source's heads, of which the four groups have half.
        (dict(groups=4, heads=0.25), 1, dict(groups=4, heads_per_group=2)),
        (dict(layers=0.5), 1, dict(attention=16, mlp=16)),
        (dict(attention=0.5, mlp=0.8), 1, dict(attention=16, mlp=26)),
        (dict(keep_layers=[0, 5, 31]), 1, dict(attention=3, mlp=3, keep_layers=[0, 5, 31])),
    ],
    ids=str,
)
def test_fractions_become_what_the_field_would_take(target, tensor, sizes):
    llama_3_8b = Network(transformer(32, [Attention(32, 8, 128), MLP(14336)]), 4096, 128256, 128256)
    found = resolve_target(llama_3_8b, TargetConfig(**target), ParallelConfig(tensor=tensor))
    whole = dict(attention=32, mlp=32, keep_layers=None, hidden=4096, ffn=14336, groups=8, heads_per_group=4)
    assert found.sizes == whole | sizes
    was_rounded = any(isinstance(size, float) for size in target.values()) or "round_to" in target
    assert bool(found.rounded) == was_rounded
