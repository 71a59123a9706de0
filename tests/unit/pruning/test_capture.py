"""Scores against a direct version: hooks on the transformers model, and the papers' words in a few lines."""

import copy

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp

from minitron_megatron.config.schema import Aggregation, ParallelConfig
from minitron_megatron.model import build
from minitron_megatron.parallel.groups import process_groups
from minitron_megatron.pruning.calibration import score_model
from minitron_megatron.pruning.capture import Capture
from minitron_megatron.pruning.scores import WIDTH
from tests.tiny import FAMILIES, hf_model
from tests.unit.pruning.direct import build_ours, samples_for, score_config

OVER_LIST = {
    Aggregation.MEAN: lambda x: x.abs().mean(0),
    Aggregation.L2: lambda x: x.square().sum(0).sqrt(),
    Aggregation.VARIANCE: lambda x: x.var(0, correction=0),
}


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request):
    return hf_model(**FAMILIES[request.param])


@pytest.fixture
def groups():
    with process_groups(ParallelConfig()) as groups:
        yield groups


def activations_of(theirs, samples):
    """Everything that is scored, `[sequence, token, element]`, by axis and then by place in the network."""
    seen = {"hidden": {}, "ffn": {}, "before": {}, "head": {}}
    hooks = []

    def keep_input(module, axis, name, change=lambda x: x):
        hooks.append(module.register_forward_pre_hook(lambda m, args: seen[axis].update({name: change(args[0])})))

    def keep_output(module, axis, name):
        def hook(module, args, output):
            seen[axis][name] = output[0] if isinstance(output, tuple) else output

        hooks.append(module.register_forward_hook(hook))

    for number, layer in enumerate(theirs.model.layers):
        keep_output(layer.input_layernorm, "hidden", (number, 0))
        keep_output(layer.post_attention_layernorm, "hidden", (number, 1))
        keep_input(layer.mlp.down_proj, "ffn", number)
        keep_input(layer.self_attn.o_proj, "head", number, lambda x: x.unflatten(-1, (6, 12)).square().sum(-1).sqrt())
        keep_output(layer.mlp.gate_proj if hasattr(layer.mlp, "gate_proj") else layer.mlp.up_proj, "before", number)
    keep_output(theirs.model.norm, "hidden", "final")
    with torch.no_grad():
        theirs(samples.tokens[:, :-1])
    for hook in hooks:
        hook.remove()
    return {axis: {name: x.double() for name, x in places.items()} for axis, places in seen.items()}


def direct_scores(theirs, samples, over_tokens, over_sequences, neurons="ffn"):
    seen = activations_of(theirs, samples)
    valid = [mask > 0 for mask in samples.mask]

    def score(x):
        of_sequences = [OVER_LIST[over_tokens](row[v]) for row, v in zip(x, valid, strict=True) if v.any()]
        return OVER_LIST[over_sequences](torch.stack(of_sequences))

    return {
        "hidden": sum(map(score, seen["hidden"].values())),
        "ffn": torch.stack([score(seen[neurons][n]) for n in range(4)]),
        "head": torch.stack([score(seen["head"][n]) for n in range(4)]).view(4, 2, 3),
    }


def assert_same(scores, expected):
    for name in WIDTH:
        found = getattr(scores, name)
        assert found.shape == expected[name].shape
        assert (found - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize("over_sequences", Aggregation, ids=lambda how: f"batch {how.value}")
@pytest.mark.parametrize("over_tokens", Aggregation, ids=lambda how: f"sequence {how.value}")
def test_scores_are_those_of_a_direct_version(theirs, groups, over_tokens, over_sequences):
    chunks, shape = build_ours(theirs, groups)
    samples = samples_for(theirs)
    how = score_config(sequence_aggregation=over_tokens, batch_aggregation=over_sequences, criteria=[])
    scores = score_model(chunks, shape, groups, samples, how)
    assert_same(scores, direct_scores(theirs, samples, over_tokens, over_sequences))


class FusedLinear(ColumnParallelLinear):
    """A norm and the projection behind it in one module, with the names of Transformer Engine's."""

    def __init__(self, input_size, output_size, *, config, **options):
        super().__init__(input_size, output_size, config=config, **options)
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size))
        has_bias = config.normalization == "LayerNorm"
        self.register_parameter("layer_norm_bias", torch.nn.Parameter(torch.empty(input_size)) if has_bias else None)

    def forward(self, x):
        weight, eps = self.layer_norm_weight, self.config.layernorm_epsilon
        if self.layer_norm_bias is None:
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight
        else:
            x = x - x.mean(-1, keepdim=True)
            x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (1 + weight) + self.layer_norm_bias
        return super().forward(x)


def fuse_norms(spec):
    """A block's spec in the manner of Transformer Engine's: norms inside the projections behind them."""
    [layer] = {id(layer): layer for layer in spec.layer_specs}.values()
    layer = copy.deepcopy(layer)
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = IdentityOp
    layer.submodules.self_attention.submodules.linear_qkv = FusedLinear
    build.submodules_of(layer.submodules.mlp).linear_fc1 = FusedLinear
    layer.submodules.sharded_state_dict_keys_map = {}
    spec.layer_specs = [layer] * len(spec.layer_specs)
    return spec


def test_norms_inside_projections_are_scored_too(theirs, groups, monkeypatch):
    plain = build.layer_spec
    monkeypatch.setattr(build, "layer_spec", lambda *where: fuse_norms(plain(*where)))
    chunks, shape = build_ours(theirs, groups)
    assert isinstance(chunks[0].decoder.layers[0].input_layernorm, IdentityOp)
    samples = samples_for(theirs)
    scores = score_model(chunks, shape, groups, samples, score_config())
    assert_same(scores, direct_scores(theirs, samples, Aggregation.MEAN, Aggregation.L2))


def hooks_in(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_hooks_are_gone_afterwards_whatever_happens(theirs, groups):
    [model], shape = build_ours(theirs, groups)
    before = hooks_in(model)
    with pytest.raises(ZeroDivisionError), Capture([model], shape, groups, Aggregation.MEAN):
        # Two norms and two projections of each of 4 layers, and the final norm.
        assert hooks_in(model) == before + 4 * 4 + 1
        _ = 1 / 0
    assert hooks_in(model) == before


def test_scoring_twice_gives_the_same(theirs, groups):
    chunks, shape = build_ours(theirs, groups)
    samples, config = samples_for(theirs), score_config(micro_batch=3)
    first, second = (score_model(chunks, shape, groups, samples, config) for _ in range(2))
    assert first.depth.keys() == second.depth.keys() == {"block_influence"}
    for found, again in [(getattr(first, name), getattr(second, name)) for name in WIDTH] + [
        (first.depth[name], second.depth[name]) for name in first.depth
    ]:
        assert torch.equal(found, again)
    assert hooks_in(chunks[0]) == 0
