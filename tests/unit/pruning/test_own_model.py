"""A model and a job of somebody's own, scored and pruned by the functions behind the verbs."""

from dataclasses import replace

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_config import TransformerConfig

import minitron_megatron
from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.config.schema import (
    DepthConfig,
    DepthCriterion,
    ParallelConfig,
    PruneConfig,
    TargetConfig,
)
from minitron_megatron.data.samples import training_samples
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.errors import ConfigError, UnsupportedModelError
from minitron_megatron.model.network import Llama3RopeScaling
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.pruning.score import score
from minitron_megatron.pruning.scores import Scores
from tests.ranks import run_on_ranks
from tests.tiny import Samples
from tests.unit.pruning.conftest import NUM_SAMPLES
from tests.unit.pruning.direct import by_axis


def build_own(first=True, last=True, **changes):
    """A GPTModel as somebody else would build it, or the part of it on the first or the last stage."""
    config = TransformerConfig(
        num_layers=4,
        hidden_size=48,
        ffn_hidden_size=44,
        num_attention_heads=6,
        num_query_groups=2,
        kv_channels=12,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        persist_layer_norm=False,
        **changes,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm),
        vocab_size=128,
        max_sequence_length=64,
        pre_process=first,
        post_process=last,
        position_embedding_type="rope",
        rotary_base=500,
        share_embeddings_and_output_weights=False,
    )


def score_own(model, config):
    """Score such a model, or this rank's part of it, with the weights and the text of `config`."""
    checkpoint, ctx = Checkpoint(config.checkpoint), minitron_megatron.current_context()
    network = minitron_megatron.network_of(model, vocab_size=101)
    assert network == checkpoint.network
    load_weights([model], checkpoint, ctx)
    corpus = prepare_corpus(config.data, checkpoint.huggingface_folder)
    samples = training_samples(corpus, config.data, NUM_SAMPLES)
    return minitron_megatron.score_model([model], network, ctx, samples, config)


def score_on_rank(config, output, layout, stages):
    """Score such a model on one rank of a job."""
    with parallel_context(layout) as place:
        model = build_own(
            first=place.is_first_stage,
            last=place.is_last_stage,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline,
            pipeline_model_parallel_layout=stages,
            pipeline_dtype=torch.float32,
        )
        found = score_own(model, config)
        if place.is_main:
            found.write(output)
            Manifest("scores").write(output)


def assert_close(found, expected):
    torch.testing.assert_close(by_axis(found), by_axis(expected), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.depth, expected.depth, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "layout, stages",
    [(ParallelConfig(tensor=2, pipeline=2), None), (ParallelConfig(pipeline=6), "E|t|tt||t|L")],
    ids=["tp2_pp2", "stages without layers"],
)
def test_somebodys_own_job_of_several_ranks_has_the_scores_of_the_verb(settings, tmp_path, layout, stages):
    config = settings(depth=DepthConfig([DepthCriterion.LOSS, DepthCriterion.BLOCK_INFLUENCE]))
    expected = Scores.read(score(config))
    (tmp_path / "own").mkdir()
    run_on_ranks(layout.tensor * layout.pipeline, score_on_rank, config, tmp_path / "own", layout, stages)
    found = Scores.read(tmp_path / "own")
    assert_close(found, expected)


def test_somebodys_own_model_has_the_scores_of_the_verb(settings):
    depth = DepthConfig([DepthCriterion.LOSS, DepthCriterion.BLOCK_INFLUENCE])
    config = settings(depth=depth)
    expected = Scores.read(score(config))
    with parallel_context(ParallelConfig()):
        model = build_own()
        before = list(model.named_modules())
        model.train()
        found = score_own(model, config)
        assert list(model.named_modules()) == before and model.post_process and model.training
        assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == 0
    assert_close(found, expected)
    target = TargetConfig(layers=3, hidden=40, ffn=30, heads=4)
    plan = minitron_megatron.make_plan(found, target)
    assert plan.checkpoint is None
    assert plan == replace(minitron_megatron.make_plan(expected, target), checkpoint=None)


def test_somebodys_own_checkpoint_is_pruned_by_a_plan_of_its_live_model(settings, tmp_path):
    checkpoint = Checkpoint(settings().checkpoint)
    with parallel_context(ParallelConfig()):
        model, ctx = build_own(), minitron_megatron.current_context()
        load_weights([model], checkpoint, ctx)
        network = minitron_megatron.network_of(model, vocab_size=101)
        scores = minitron_megatron.score_model([model], network, ctx, Samples(8, 16, 101), settings(num_samples=8))
    plan = minitron_megatron.make_plan(scores, TargetConfig(ffn=0.5))
    plan.write_file(tmp_path / "plan.json")
    config = PruneConfig(str(checkpoint.root), str(tmp_path / "small"), plan=str(tmp_path / "plan.json"))
    assert Checkpoint(minitron_megatron.prune(config)).network == plan.target


def test_groups_that_are_not_those_of_the_model_are_refused(settings):
    with parallel_context(ParallelConfig()):
        model, ctx = build_own(), minitron_megatron.current_context(sequence=True)
        network = minitron_megatron.network_of(model, vocab_size=101)
        with pytest.raises(ConfigError, match="sequence_parallel = False: give current_context.sequence=False"):
            minitron_megatron.score_model([model], network, ctx, Samples(8, 16, 101), settings())


def test_a_layout_that_cannot_share_the_heads_is_refused(settings):
    with parallel_context(ParallelConfig()):
        model, ctx = build_own(), minitron_megatron.current_context()
        network = minitron_megatron.network_of(model, vocab_size=101)
        layout = replace(ctx.layout, tensor=4)
        with pytest.raises(ConfigError, match="num_heads = 6 does not divide by parallel.tensor = 4"):
            minitron_megatron.score_model(
                [model], network, replace(ctx, layout=layout), Samples(8, 16, 101), settings()
            )


@pytest.mark.parametrize(
    "changes",
    [
        dict(num_moe_experts=2),
        dict(window_size=(4, 0)),
        dict(rotary_interleaved=True),
        dict(heterogeneous_block_specs=True),
    ],
    ids=str,
)
def test_a_model_that_the_axis_table_does_not_describe_is_refused(changes):
    [name] = changes
    with parallel_context(ParallelConfig()), pytest.raises(UnsupportedModelError, match=f"config.{name} = "):
        model = build_own(num_moe_experts=changes.get("num_moe_experts"))
        setattr(model.config, name, changes[name])  # what makes no other modules here
        minitron_megatron.network_of(model)


def test_scaled_rotary_frequencies_have_to_be_given():
    scaling = Llama3RopeScaling(8.0, 1.0, 4.0, 32)
    with parallel_context(ParallelConfig()):
        model = build_own()
        rotary = model.rotary_pos_emb
        rotary.inv_freq = rotary._apply_scaling(rotary.inv_freq, 8.0, 1.0, 4.0, 32)
        assert minitron_megatron.network_of(model, 101, scaling).rotary_scaling == scaling
        with pytest.raises(UnsupportedModelError, match="give rotary_scaling"):
            minitron_megatron.network_of(model, 101)
