"""Plans for any network, layout and target."""

import re
import tempfile
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from minitron_megatron.checkpoint.manifest import Manifest
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.checkpoint.sharded import Checkpoint
from minitron_megatron.checkpoint.source import instances
from minitron_megatron.checkpoint.writer import write_checkpoint
from minitron_megatron.config.schema import ParallelConfig, TargetConfig, Unit
from minitron_megatron.errors import ConfigError
from minitron_megatron.model.axes import axis_sizes, parameters
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.network import (
    ATTENTION,
    MLP,
    Network,
    NormKind,
    layers_pattern,
    layout_problems,
    pad_vocab,
)
from minitron_megatron.parallel.layout import layers_per_stage
from minitron_megatron.pruning.plan import Plan, from_ranges, make_plan, to_ranges
from minitron_megatron.pruning.scores import DepthSettings, Scores
from minitron_megatron.pruning.slicing import Pruned, write_pruned
from minitron_megatron.pruning.target import resolve_target

PROPERTIES = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@st.composite
def networks(draw, tensor):
    groups, per_group = draw(st.integers(1, 4)) * tensor, draw(st.integers(1, 4))
    if tensor > 1 and draw(st.booleans()):  # two ranks share a group
        groups, per_group = tensor // 2, 2 * per_group
    gated = draw(st.booleans())
    return Network(
        pattern=layers_pattern(draw(st.integers(1, 5))),
        hidden=draw(st.integers(4, 80)),
        ffn=draw(st.integers(2, 40)) * tensor,
        num_heads=groups * per_group,
        num_query_groups=groups,
        head_dim=draw(st.sampled_from([2, 4])),
        vocab=100,
        padded_vocab=pad_vocab(100, 4),
        norm=draw(st.sampled_from(NormKind)),
        gated=gated,
        qkv_bias=draw(st.booleans()),
        linear_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        tied=draw(st.booleans()),
    )


def size_of(has):
    return st.none() | st.integers(1, has) | st.floats(0.01, 0.99)


@st.composite
def problems(draw):
    """A network, a layout that can split it, a target and scores; few different ones, so that many are equal."""
    tensor = draw(st.sampled_from([1, 2, 4]))
    network = draw(networks(tensor))
    layers = len(network.layers)
    names = {"hidden": network.hidden_size, "ffn": network.ffn, "groups": network.num_query_groups, "heads": network.num_heads}
    by = draw(st.sampled_from(["layers", "keep_layers", "sublayers"]))
    if by == "keep_layers":
        depth = {by: sorted(draw(st.sets(st.integers(0, layers - 1), min_size=1)))}
    else:
        depth = {name: draw(size_of(layers)) for name in ([by] if by == "layers" else ["attention", "mlp"])}
    target = TargetConfig(
        **{name: draw(size_of(has)) for name, has in names.items()},
        **depth,
        round_to=draw(st.none() | st.sampled_from([2, 8, 16])),
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))
    unit = Unit.SUBLAYER if by == "sublayers" else Unit.LAYER
    units = len(network.sublayers) if by == "sublayers" else layers
    sizes = [(network.hidden_size,), (layers, network.ffn), (layers, network.num_query_groups, network.heads_per_group), (units,)]
    *width, depth = (torch.randint(0, 9, size, generator=generator).double() for size in sizes)
    scores = Scores(network, *width, {"loss": depth}, DepthSettings(unit))
    pipeline, virtual = draw(st.integers(1, 3)), draw(st.sampled_from([None, 2]))
    return scores, ParallelConfig(tensor, pipeline, virtual_pipeline=virtual), target, draw(st.booleans())


def plan_or_nothing(scores, parallel, target, merge):
    try:
        return make_plan(scores, target, parallel, merge_heads=merge)
    except ConfigError as error:
        # Of sizes within those of the source, only a whole number of heads can be wrong, or too few to merge, or what
        # shall be a multiple of more than there is.
        multiples = [re.search(r"a multiple of (\d+), and the source has (\d+)", p) for p in error.problems]
        assert all(int(found[1]) > int(found[2]) for found in multiples if found)
        others = [problem for problem, found in zip(error.problems, multiples, strict=True) if not found]
        assert all("target.heads" in problem or (merge and "merge_heads" in problem) for problem in others)
        assert not others or merge or isinstance(target.heads, int)
        assume(False)


def ascends_within(indices, size):
    return indices and all(0 <= i < size for i in indices) and all(a < b for a, b in pairwise(indices))


@PROPERTIES
@given(problems())
def test_a_plan_is_whole_and_survives_its_file(tmp_path, problem):
    scores, _, target, merge = problem
    plan = plan_or_nothing(*problem)
    source, cut = scores.network, plan.target
    assert plan.problems() == [] and bool(plan.merge) == merge
    assert ascends_within(plan.sublayers, len(source.pattern)) and ascends_within(plan.hidden, source.hidden)
    attention, mlp = ([p for p in plan.sublayers if source.pattern[p] == kind] for kind in (ATTENTION, MLP))
    assert mlp == sorted(plan.ffn) and attention == sorted(plan.group) == sorted(plan.head)
    if scores.depth_settings.unit is Unit.LAYER:
        assert [p + 1 for p in attention] == mlp
    if target.keep_layers is not None:
        assert mlp == [2 * layer + 1 for layer in target.keep_layers]
    for kept in plan.ffn.values():
        assert ascends_within(kept, source.ffn) and len(kept) == cut.ffn
    for position, groups in plan.group.items():
        assert ascends_within(groups, source.num_query_groups) and len(groups) == cut.num_query_groups
        assert len(plan.head[position]) == len(groups)
        for heads in plan.head[position]:
            assert ascends_within(heads, source.heads_per_group) and len(heads) == cut.heads_per_group
    # What stays has no lower score than what goes.
    for position in mlp:
        own = scores.ffn[position // 2]
        gone = [i for i in range(source.ffn) if i not in plan.ffn[position]]
        assert not gone or own[plan.ffn[position]].min() >= own[gone].max()
    for position, partners in plan.merge.items():
        for kept, own in zip(plan.head[position], partners, strict=True):
            gone = set(range(source.heads_per_group)) - set(kept)
            assert {partner for head, partner in zip(kept, own, strict=True) if partner != head} == gone
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan


@PROPERTIES
@given(problems())
def test_sizes_are_what_was_asked_for(problem):
    scores, parallel, target, _ = problem
    plan = plan_or_nothing(*problem)
    source, cut = scores.network, plan.target
    found = {
        **{
            name: (len(source.sublayers(kind)), len(cut.sublayers(kind)))
            for name, kind in (("layers", ATTENTION), ("layers", MLP), ("attention", ATTENTION), ("mlp", MLP))
            if (name in ("attention", "mlp")) == (scores.depth_settings.unit is Unit.SUBLAYER)
        },
        "hidden": (source.hidden, cut.hidden),
        "ffn": (source.ffn, cut.ffn),
        "groups": (source.num_query_groups, cut.num_query_groups),
        "heads": (source.num_heads, cut.num_heads),
    }
    rounded = {"hidden", "ffn"} if target.round_to else set()
    for name, (has, size) in found.items():
        asked = getattr(target, name)
        if name == "layers" and target.keep_layers is not None:
            assert size == len(target.keep_layers)
        elif asked is None:
            if name != "heads":
                assert size == has
        elif isinstance(asked, int) and name not in rounded:
            assert size == asked
    if target.heads is None:
        assert cut.heads_per_group == source.heads_per_group
    # Fractions always divide; whole numbers are the user's own, and named where they do not.
    names = {"groups": ["num_query_groups", "num_heads"], "heads": ["num_query_groups", "num_heads"], "ffn": ["ffn"]}
    whole = {name for name in names if isinstance(getattr(target, name), int)} - rounded
    left = [p for p in layout_problems(cut, parallel) if not any(name in p for n in whole for name in names[n])]
    # Layers are left to the target alone: every stage has some, as many as any other but for one, or there are too few.
    layers, stages = len(cut.megatron_layers), parallel.pipeline * (parallel.virtual_pipeline or 1)
    assert [f"has {layers} layers, too few for the {stages} stages" in p for p in left] == [True] * (layers < stages)
    counts = layers_per_stage(layers, stages)
    assert sum(counts) == layers and max(counts) - min(counts) <= 1 and counts[-1] == min(counts)
    # A fraction is off by at most half of what it is rounded to, unless that is more than there is.
    for name in ("layers", "attention", "mlp"):
        if isinstance(asked := getattr(target, name), float):
            has, size = found[name]
            assert abs(size - asked * has) <= 0.5 or size == 1
    if isinstance(target.ffn, float):
        options = {target.round_to} if target.round_to else {64, 8, 1}
        assert any(
            abs(cut.ffn - target.ffn * source.ffn) <= np.lcm(n, parallel.tensor) / 2
            or cut.ffn
            in (np.lcm(n, parallel.tensor), source.ffn // np.lcm(n, parallel.tensor) * np.lcm(n, parallel.tensor))
            or cut.ffn == source.ffn
            for n in options
        )
    if isinstance(target.heads, float):
        nearest = target.heads * source.num_heads
        most = cut.num_query_groups * source.heads_per_group
        step = np.lcm(cut.num_query_groups, parallel.tensor)
        assert abs(cut.num_heads - nearest) <= step / 2 or cut.num_heads in (step, most // step * step)


class Nothing:
    """A source of zeros, that checks what it is asked for."""

    dtype = torch.float32

    def __init__(self, network):
        self.shape = network

    def read(self, param, layer, index):
        for positions, size in zip(index, param.size(axis_sizes(self.shape)), strict=True):
            assert (np.diff(positions) > 0).all() and positions[0] >= 0 and positions[-1] < size
        assert layer in instances(param, self.shape)
        return torch.zeros([]).expand([len(positions) for positions in index])


@PROPERTIES
@given(problems())
def test_a_pruned_network_has_the_parameters_of_its_shape(problem):
    scores, *_ = problem
    pruned = Pruned(Nothing(scores.network), plan_or_nothing(*problem))
    network, found = pruned.network, {}
    for param in parameters(network):
        for layer in instances(param, network):
            index = [np.arange(size) for size in param.size(axis_sizes(network))]
            found[param.name, layer] = pruned.read(param, layer, index).numel()
    padding = (network.padded_vocab_size - network.vocab_size) * network.hidden_size * (1 if network.tie_embeddings else 2)
    assert sum(found.values()) - padding == num_parameters(network)

    # The same, counted by hand.
    norm = network.hidden_size * (2 if network.norm is NormKind.LAYERNORM else 1)
    width = network.num_heads * network.head_dim
    qkv = width + 2 * network.num_query_groups * network.head_dim
    neurons = network.ffn * (2 if network.gated else 1)
    matrices = (qkv + width + neurons + network.ffn) * network.hidden_size
    of_heads = 2 * network.head_dim * network.qk_norm * (2 if network.norm is NormKind.LAYERNORM else 1)
    biases = qkv * (network.qkv_bias or network.linear_bias) + (2 * network.hidden_size + neurons) * network.linear_bias
    tables = network.vocab_size * network.hidden_size * (1 if network.tie_embeddings else 2)
    if network.is_uniform:
        assert num_parameters(network) == len(network.layers) * (matrices + biases + of_heads + 2 * norm) + norm + tables


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
    padding = (network.padded_vocab_size - network.vocab_size) * network.hidden_size * (1 if network.tie_embeddings else 2)
    assert sum(tensor.size.numel() for tensor in tensors) - padding == num_parameters(network)
    for tensor in tensors:
        assert sum(chunk.sizes.numel() for chunk in tensor.chunks) == tensor.size.numel()
    found, expected = Checkpoint(folder / "pruned"), Pruned(weights, plan)
    assert found.network == network
    for param in parameters(network):
        for layer in instances(param, network):
            index = [np.arange(size) for size in param.size(axis_sizes(network))]
            assert torch.equal(found.read(param, layer, index), expected.read(param, layer, index))


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
    llama_3_8b = Network(layers_pattern(32), 4096, 14336, 32, 8, 128, 128256, 128256)
    found = resolve_target(llama_3_8b, TargetConfig(**target), ParallelConfig(tensor=tensor))
    whole = dict(attention=32, mlp=32, keep_layers=None, hidden=4096, ffn=14336, groups=8, heads_per_group=4)
    names = [f.name for f in fields(found) if f.name != "rounded"]
    assert {name: getattr(found, name) for name in names} == whole | sizes
    was_rounded = any(isinstance(size, float) for size in target.values()) or "round_to" in target
    assert bool(found.rounded) == was_rounded
