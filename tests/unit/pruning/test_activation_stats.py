"""Scores against a direct version: hooks on the transformers model, and the papers' words in a few lines."""

import copy
from dataclasses import replace

import pytest
import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.identity_op import IdentityOp

from minitron_megatron.config.schema import Aggregation, AxisConfig, Criterion, DepthCriterion, Neurons, ParallelConfig
from minitron_megatron.errors import DataError
from minitron_megatron.model import specs
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.pruning.activation_stats import ActivationStats
from minitron_megatron.pruning.score_model import score_model
from tests.tiny import FAMILIES, hf_model
from tests.unit.pruning.direct import (
    AXES,
    build_ours,
    by_axis,
    direct_activations,
    direct_weights,
    samples_for,
    score_config,
)


@pytest.fixture(scope="module", params=FAMILIES)
def theirs(request):
    return hf_model(**FAMILIES[request.param])


@pytest.fixture
def ctx():
    with parallel_context(ParallelConfig()) as ctx:
        yield ctx


def direct_scores(theirs, samples, over_tokens, over_sequences, neurons="ffn"):
    """Of a network of 4 layers with 2 groups of 3 heads."""
    scores = direct_activations(theirs, samples, over_tokens, over_sequences)
    of_norms = torch.stack([scores["hidden"][place] for place in range(9)])
    return {
        "of_norms": of_norms,
        "hidden": of_norms.sum(0),
        "ffn": torch.stack([scores[neurons][place] for place in range(1, 8, 2)]),
        "heads": torch.stack([scores["heads"][place] for place in range(0, 8, 2)]).view(4, 2, 3),
    }


def assert_same(scores, expected):
    for name, found in by_axis(scores).items():
        assert found.shape == expected[name].shape
        assert (found - expected[name]).abs().max() <= 1e-4 * expected[name].abs().max(), name


@pytest.mark.parametrize("over_sequences", Aggregation, ids=lambda how: f"batch {how.value}")
@pytest.mark.parametrize("over_tokens", Aggregation, ids=lambda how: f"sequence {how.value}")
def test_scores_are_those_of_a_direct_version(theirs, ctx, over_tokens, over_sequences):
    model_chunks, network = build_ours(theirs, ctx)
    samples = samples_for(theirs)
    how = score_config(sequence_aggregation=over_tokens, batch_aggregation=over_sequences, criteria=[])
    scores = score_model(model_chunks, network, ctx, samples, how)
    assert_same(scores, direct_scores(theirs, samples, over_tokens, over_sequences))


def test_axes_may_be_scored_each_in_its_own_way(theirs, ctx):
    model_chunks, network = build_ours(theirs, ctx)
    samples = samples_for(theirs)
    how = score_config(
        hidden=AxisConfig(batch_aggregation=Aggregation.VARIANCE),
        ffn=AxisConfig(Criterion.ACTIVATION_WEIGHT, Aggregation.L2),
        heads=AxisConfig(sequence_aggregation=Aggregation.VARIANCE, batch_aggregation=Aggregation.MEAN),
        criteria=[],
    )
    scores = score_model(model_chunks, network, ctx, samples, how)
    outgoing = torch.stack([layer.mlp.down_proj.weight.double().norm(dim=0) for layer in theirs.model.layers])
    expected = {
        "hidden": direct_scores(theirs, samples, Aggregation.MEAN, Aggregation.VARIANCE)["hidden"],
        "ffn": direct_scores(theirs, samples, Aggregation.L2, Aggregation.L2)["ffn"] * outgoing,
        "heads": direct_scores(theirs, samples, Aggregation.VARIANCE, Aggregation.MEAN)["heads"],
    }
    assert_same(scores, expected)
    # Activations are watched as long as one axis needs them.
    how = score_config(
        criterion=Criterion.RANDOM,
        heads=AxisConfig(Criterion.ACTIVATION),
        ffn=AxisConfig(Criterion.WEIGHT),
        criteria=[],
    )
    mixed = score_model(model_chunks, network, ctx, samples, how)
    alone = score_model(model_chunks, network, ctx, samples, score_config(criterion=Criterion.WEIGHT, criteria=[]))
    chance = score_model(model_chunks, network, ctx, samples, score_config(criterion=Criterion.RANDOM, criteria=[]))
    scores, alone, chance = map(by_axis, (mixed, alone, chance))
    assert torch.equal(scores["ffn"], alone["ffn"]) and torch.equal(scores["hidden"], chance["hidden"])
    plain = direct_scores(theirs, samples, Aggregation.MEAN, Aggregation.L2)
    assert_same(mixed, {**plain, "hidden": chance["hidden"], "ffn": alone["ffn"]})


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


def fused_norms(plain):
    """Sublayers in the manner of Transformer Engine's: norms inside the projections behind them."""

    def layer_modules(parts, slot, config):
        parts = copy.deepcopy(parts)
        first = {specs.Slot.MIXER: "linear_qkv", specs.Slot.CHANNEL: "linear_fc1"}[slot]
        setattr(specs.submodules_of(getattr(parts, slot.module)), first, FusedLinear)
        return replace(plain(parts, slot, config), norm=IdentityOp, key_map={})

    return layer_modules


def test_norms_inside_projections_are_scored_too(theirs, ctx, monkeypatch):
    monkeypatch.setattr(specs, "layer_modules", fused_norms(specs.layer_modules))
    model_chunks, network = build_ours(theirs, ctx)
    for layer in model_chunks[0].decoder.layers:
        assert isinstance(layer.input_layernorm, IdentityOp) and isinstance(layer.pre_mlp_layernorm, IdentityOp)
        assert isinstance(layer.self_attention.linear_qkv, FusedLinear)
        assert isinstance(layer.mlp.linear_fc1, FusedLinear)
    samples = samples_for(theirs)
    scores = score_model(model_chunks, network, ctx, samples, score_config())
    assert_same(scores, direct_scores(theirs, samples, Aggregation.MEAN, Aggregation.L2))


def hooks_in(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_the_hooks_are_gone_afterwards_whatever_happens(theirs, ctx):
    [model], network = build_ours(theirs, ctx)
    before = hooks_in(model)
    stats = ActivationStats([model], network, ctx, dict.fromkeys(AXES, Aggregation.MEAN))
    with pytest.raises(ZeroDivisionError), stats:
        # Two norms and two projections of each of 4 layers, and the final norm.
        assert hooks_in(model) == before + 4 * 4 + 1
        _ = 1 / 0
    assert hooks_in(model) == before


def test_scoring_twice_gives_the_same(theirs, ctx):
    model_chunks, network = build_ours(theirs, ctx)
    samples, config = samples_for(theirs), score_config(micro_batch=3)
    first, second = (score_model(model_chunks, network, ctx, samples, config) for _ in range(2))
    assert first.depth.keys() == second.depth.keys() == {"block_influence"}
    for found, again in ((by_axis(first), by_axis(second)), (first.depth, second.depth)):
        assert all(torch.equal(found[name], again[name]) for name in found)
    assert hooks_in(model_chunks[0]) == 0


@pytest.mark.parametrize("over_tokens", [Aggregation.MEAN, Aggregation.VARIANCE], ids=lambda how: how.value)
def test_neurons_may_be_scored_before_their_activation(theirs, ctx, over_tokens):
    model_chunks, network = build_ours(theirs, ctx)
    samples = samples_for(theirs)
    how = score_config(neurons=Neurons.BEFORE, sequence_aggregation=over_tokens)
    found = score_model(model_chunks, network, ctx, samples, how)
    assert_same(found, direct_scores(theirs, samples, over_tokens, Aggregation.L2, "before"))
    after = direct_scores(theirs, samples, over_tokens, Aggregation.L2)["ffn"]
    assert (by_axis(found)["ffn"] - after).abs().max() > 0.1 * after.abs().max()


def test_weight_magnitudes_are_norms_of_the_tensors(theirs, ctx):
    model_chunks, network = build_ours(theirs, ctx)
    found = score_model(
        model_chunks, network, ctx, samples_for(theirs), score_config(criterion=Criterion.WEIGHT, criteria=[])
    )
    expected = direct_weights(theirs, outgoing=False)
    torch.testing.assert_close(found.hidden, expected["hidden"].square().sum(0).sqrt())
    torch.testing.assert_close(by_axis(found)["ffn"], expected["ffn"])
    torch.testing.assert_close(by_axis(found)["heads"], expected["heads"].view(4, 2, 3))


def test_activations_times_weights_are_products_of_both(theirs, ctx):
    model_chunks, network = build_ours(theirs, ctx)
    samples = samples_for(theirs)
    found = by_axis(
        score_model(model_chunks, network, ctx, samples, score_config(criterion=Criterion.ACTIVATION_WEIGHT))
    )
    weights = direct_weights(theirs, outgoing=True)
    activations = direct_scores(theirs, samples, Aggregation.MEAN, Aggregation.L2)
    hidden = (activations["of_norms"] * weights["hidden"]).sum(0)
    heads = activations["heads"] * weights["heads"].view(4, 2, 3)
    torch.testing.assert_close(found["hidden"], hidden, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["ffn"], activations["ffn"] * weights["ffn"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["heads"], heads, rtol=1e-4, atol=1e-5)


def test_random_scores_follow_from_the_seed_alone(theirs, ctx):
    model_chunks, network = build_ours(theirs, ctx)
    first, same, other = (
        score_model(
            model_chunks, network, ctx, samples_for(theirs), score_config(criterion=Criterion.RANDOM, **settings)
        )
        for settings in ({"seed": 1}, {"seed": 1, "micro_batch": 5}, {"seed": 2})
    )
    for name, found in by_axis(first).items():
        assert torch.equal(found, by_axis(same)[name]) and not torch.equal(found, by_axis(other)[name])
        assert 0 <= found.min() < 0.2 and 0.8 < found.max() <= 1
    assert by_axis(first)["heads"].shape == (4, 2, 3) and first.depth.keys() == {"block_influence"}


def test_a_calibration_set_may_be_smaller_than_it_was_asked_to_be(theirs, ctx):
    model_chunks, network = build_ours(theirs, ctx)
    samples = samples_for(theirs)
    found, expected = (
        score_model(model_chunks, network, ctx, samples, score_config(num_samples=count))
        for count in (1024, len(samples))
    )
    for name in AXES:
        assert torch.equal(by_axis(found)[name], by_axis(expected)[name])
    assert torch.equal(found.depth["block_influence"], expected.depth["block_influence"])


@pytest.mark.parametrize(
    "place, named",
    [
        (lambda network: network.layers[2].mlp.down_proj, "activations of layer 3 (hidden) are not finite"),
        (lambda network: network.layers[1].mlp.up_proj, "activations of layer 1 (ffn) are not finite"),
        (lambda network: network.layers[2].self_attn.v_proj, "activations of layer 2 (heads) are not finite"),
        (lambda network: network.layers[3].mlp.down_proj, "activations of the final norm (hidden) are not finite"),
    ],
)
def test_activations_that_are_not_finite_name_layer_and_batch(theirs, ctx, place, named):
    broken = copy.deepcopy(theirs)
    samples = samples_for(theirs)
    with torch.no_grad():
        place(broken.model).weight[3, 5] = torch.inf
    model_chunks, network = build_ours(broken, ctx)
    with pytest.raises(DataError) as raised:
        score_model(model_chunks, network, ctx, samples, score_config())
    assert named in str(raised.value) and "in samples 0 to 1: score in another dtype" in str(raised.value)


def test_a_sample_whose_activations_are_not_finite_is_named(theirs, ctx):
    broken = copy.deepcopy(theirs)
    samples = samples_for(theirs)
    samples.tokens[samples.tokens == 5] = 6
    samples.tokens[4, 3] = 5
    with torch.no_grad():
        broken.model.embed_tokens.weight[5] = torch.inf
    model_chunks, network = build_ours(broken, ctx)
    with pytest.raises(DataError, match=r"activations of layer 0 \(hidden\) are not finite in samples 4 to 5: score"):
        score_model(model_chunks, network, ctx, samples, score_config())
    with pytest.raises(DataError, match=r"are not finite in samples 3 to 5: score"):
        score_model(model_chunks, network, ctx, samples, score_config(micro_batch=3))
    # Without watching activations, it is what follows from them.
    for criterion, what in ((DepthCriterion.BLOCK_INFLUENCE, r"without sublayers \[0, 1\]"), (DepthCriterion.LOSS, "")):
        how = score_config(criterion=Criterion.WEIGHT, criteria=[criterion])
        # Tied to the embedding, the output projection is broken for every token.
        first = 0 if theirs.config.tie_word_embeddings and criterion is DepthCriterion.LOSS else 4
        message = f"of the network ?{what}.* are not finite in samples {first} to {first + 1}: score in"
        with pytest.raises(DataError, match=message):
            score_model(model_chunks, network, ctx, samples, how)
