"""Layers with sizes of their own, some of which have lost a sublayer: the same in every layout, by either builder."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.dist_reader import NETWORK, Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.loss import HiddenConfig, HiddenLoss, LossConfig, Projection
from minitron_megatron.config.parallel import Builder
from minitron_megatron.config.schema import (
    DepthConfig,
    DepthCriterion,
    DepthSearch,
    DType,
    OptimizerConfig,
    ParallelConfig,
    ScoreConfig,
    TargetConfig,
    Unit,
)
from minitron_megatron.data.samples import rank_batches
from minitron_megatron.model.build import build_model
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.parameters import layer_key, parameters
from minitron_megatron.parallel.context import parallel_context
from tests.gradients import Gradients, close, local_gradients
from tests.ranks import run_on_ranks
from tests.tiny import LLAMA, NEMOTRON, Samples, changed, unlike

pytestmark = pytest.mark.oldest

FAMILIES = {"llama": LLAMA, "nemotron": NEMOTRON}
LAYOUTS = {
    "tp2_sequence": ParallelConfig(tensor=2, sequence=True),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "pp2_interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "dp2": ParallelConfig(data=2),
}
NUM_SAMPLES, NUM_SCORED, MICRO_BATCH = 8, 5, 2
HIDDEN = HiddenConfig(
    0.5,
    loss=HiddenLoss.SQUAREHEAD,
    points=["layer", "attention", "mlp", "embedding"],
    projection=Projection.SHARED,
)
LOSS = LossConfig(kd_logits_weight=0.7, lm_weight=0.4, hidden=HIDDEN)
DEPTH = [DepthCriterion.BLOCK_INFLUENCE, DepthCriterion.LOSS, DepthCriterion.KL]
# By whole layers and by sublayers, one by one and one after another.
SCORINGS = {
    "layers": (DepthConfig(DEPTH, protect_first=0, protect_last=0), TargetConfig(layers=3, hidden=40, heads=[2, 2, 4])),
    "sublayers": (
        DepthConfig(DEPTH, Unit.SUBLAYER, DepthSearch.GREEDY, protect_first=0, protect_last=0),
        TargetConfig(attention=2, mlp=2, ffn=[40, 0.5, 20]),
    ),
}
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6], [5, 3, 5]]

BUILDERS = [Builder.GPT]
try:
    import megatron.core.models.hybrid  # noqa: F401

    BUILDERS.append(Builder.HYBRID)
except ImportError:  # before Megatron-Core 0.18
    pass


def work(folder, layout: ParallelConfig, name: str):
    """Everything that is compared, by one rank of a layout."""
    checkpoint, teacher = Checkpoint(folder / "student"), Checkpoint(folder / "teacher")
    with parallel_context(layout) as ctx:
        model_chunks = build_model(checkpoint.network, ctx, DType.FP32)
        load_weights(model_chunks, checkpoint, ctx)
        results = {scoring: scores_and_plan(model_chunks, checkpoint.network, ctx, scoring) for scoring in SCORINGS}
        if layout.virtual_pipeline is None and not layout.sequence:
            results["made"] = generate(model_chunks, checkpoint.network, ctx)
        results |= learn(checkpoint, teacher, ctx, folder / f"{name}_state")
        torch.save(results, folder / f"{name}_{dist.get_rank()}.pt")


def scores_and_plan(model_chunks, network, ctx, scoring: str) -> dict:
    from minitron_megatron.pruning.make_plan import make_plan
    from minitron_megatron.pruning.score_model import score_model

    depth, target = SCORINGS[scoring]
    config = ScoreConfig(num_samples=NUM_SCORED, micro_batch=MICRO_BATCH, depth=depth)
    if config.depends_on_target:
        config.target = target
    scores = score_model(model_chunks, network, ctx, Samples(NUM_SCORED, 16, network.vocab_size), config)
    values = {"hidden": scores.hidden, **{f"depth.{name}": own for name, own in scores.depth.items()}}
    values |= {f"{name}.{n}": one for name, own in scores.elements.items() for n, one in enumerate(own)}
    values |= {f"rounds.{name}": own for name, own in scores.rounds.items()}
    return {"scores": values, "plan": asdict(make_plan(scores, target))}


def generate(model_chunks, network, ctx) -> list[list[int]]:
    from minitron_megatron.evaluation.inference import Inference
    from minitron_megatron.evaluation.sampling import SamplingParams

    return Inference(model_chunks, ctx, network, None, [], batch=2).generate(PROMPTS, SamplingParams(max_new_tokens=12))


def learn(student, teacher, ctx, state) -> dict:
    """A step with every kind of loss, its gradients, and what the saved state gives when it is loaded again."""
    from minitron_megatron.training.state import RunState, load_state, save_state

    layout = ctx.layout
    samples = Samples(NUM_SAMPLES, 16, student.network.vocab_size, seed=3)
    batches = list(rank_batches(samples, 0, NUM_SAMPLES, MICRO_BATCH, ctx.data_rank, layout.replicas))
    results = {}
    for attempt in ("first", "again"):
        step, model = distillation_step(student, teacher, ctx)
        if attempt == "first":
            result = step.train(batches)
            results["gradients"] = local_gradients([chunk.module for chunk in model.model_chunks], student.network, ctx)
            results["step"] = [*losses_of(result), model.grad_norm(), model.step()]
            save_state(state, RunState(step=1), {"": model})
        else:
            assert load_state(state, {"": model}).step == 1
        result = step.evaluate(batches)
        results[attempt] = losses_of(result)
    return results


def losses_of(result) -> list[float]:
    return [*result.losses.values(), *result.entries["kd_hidden"].pair_losses.values()]


def distillation_step(student, teacher, ctx):
    """A step of the student beside its teacher, and the student's optimiser, its gradients at zero."""
    from minitron_megatron.distillation.entries import loss_entries
    from minitron_megatron.distillation.hidden import HiddenDistance
    from minitron_megatron.distillation.live_teacher import LiveTeacher
    from minitron_megatron.distillation.projections import add_projections
    from minitron_megatron.distillation.step import DistillationStep
    from minitron_megatron.training.optimizer import setup_optimizer

    teacher_chunks = build_model(teacher.network, ctx, DType.FP32)
    load_weights(teacher_chunks, teacher, ctx)
    model_chunks = build_model(student.network, ctx, DType.FP32, recompute=ctx.layout.sequence)
    load_weights(model_chunks, student, ctx)
    networks = student.network, teacher.network
    add_projections(model_chunks, LOSS.hidden, *networks, ctx, seed=5)
    model = setup_optimizer(model_chunks, OptimizerConfig(lr=1e-3, warmup_steps=1), 4, DType.FP32, ctx)
    model.zero_grad()
    live = LiveTeacher(teacher_chunks, ctx, teacher.network.vocab_size)
    entries = loss_entries(LOSS, live, HiddenDistance(LOSS.hidden, model_chunks, networks, ctx))
    return DistillationStep(model.model_chunks, entries, ctx, student.network.vocab_size), model


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    """A student of unlike layers, and a teacher with more layers, all alike, and another width."""
    folder = tmp_path_factory.mktemp(request.param)
    network = network_from_config(FAMILIES[request.param])
    teacher = changed(network, num_layers=6, hidden_size=40)
    for name, own, seed in (("student", unlike(network), 3), ("teacher", teacher, 4)):
        write_checkpoint(folder / name, Loud(own, seed), torch.float32, Manifest("checkpoint"), None)
    return folder


class Loud(RandomWeights):
    """Random weights ten times as large as those that training begins with, so that no part of a layer is idle."""

    def read(self, param, index):
        weight = super().read(param, index)
        return weight * 10 if weight.dim() > 1 else weight


@pytest.fixture(scope="module")
def single(folder):
    run_on_ranks(1, work, folder, ParallelConfig(builder=Builder.GPT), "1x1")
    return torch.load(folder / "1x1_0.pt", weights_only=False)


CASES = [("1x1", builder) for builder in BUILDERS[1:]] + [(name, builder) for name in LAYOUTS for builder in BUILDERS]


@pytest.mark.parametrize("name, builder", CASES, ids=[f"{name}-{builder.value}" for name, builder in CASES])
def test_nothing_depends_on_layout_and_builder(folder, single, name, builder):
    layout = replace(LAYOUTS.get(name, ParallelConfig()), builder=builder)
    num_ranks = layout.tensor * layout.pipeline * layout.replicas
    run_on_ranks(num_ranks, work, folder, layout, f"{name}_{builder.value}")
    ranks = [torch.load(folder / f"{name}_{builder.value}_{r}.pt", weights_only=False) for r in range(num_ranks)]
    for rank in ranks:
        for scoring in SCORINGS:
            for what, values in single[scoring]["scores"].items():
                own = rank[scoring]["scores"][what]
                assert torch.equal(own.isnan(), values.isnan()), what
                assert close(own.nan_to_num(0), values.nan_to_num(0)), what
            assert rank[scoring]["plan"] == single[scoring]["plan"]
        for what in ("step", "first"):
            np.testing.assert_allclose(rank[what], single[what], rtol=1e-5)
        assert rank["again"] == rank["first"]
        assert rank.get("made", single["made"]) == single["made"]
    network = Checkpoint(folder / "student").network
    expected = Gradients(network, [single["gradients"]])
    gradients = Gradients(network, [rank["gradients"] for rank in ranks])
    for param in parameters(network):
        index = [np.arange(size) for size in param.shape]
        whole = expected.read(param, index)
        assert whole.abs().max() > 0, layer_key(param)
        assert close(gradients.read(param, index), whole), layer_key(param)
    # What one builder saved in one layout is a whole checkpoint of the network.
    (folder / f"{name}_{builder.value}_state" / NETWORK).write_text(json.dumps(network.to_dict()))
    assert Checkpoint(folder / f"{name}_{builder.value}_state").iteration == 1


def test_generation_is_what_whole_sequences_predict(folder, single):
    checkpoint = Checkpoint(folder / "student")
    with parallel_context(ParallelConfig()) as ctx, torch.no_grad():
        [model] = build_model(checkpoint.network, ctx, DType.FP32)
        load_weights([model], checkpoint, ctx)
        for prompt, made in zip(PROMPTS, single["made"], strict=True):
            tokens = torch.tensor([prompt])
            for _ in range(12):
                logits = model(tokens, torch.arange(tokens.size(1))[None], attention_mask=None)[0, -1]
                tokens = torch.cat([tokens, logits[: checkpoint.network.vocab_size].argmax().view(1, 1)], dim=1)
            assert tokens[0, len(prompt) :].tolist() == made
    assert len({token for made in single["made"] for token in made}) > 2


@pytest.mark.skipif(len(BUILDERS) < 2, reason="HybridModel comes with megatron-core 0.18")
@pytest.mark.parametrize("first, second", [("gpt", "hybrid"), ("hybrid", "gpt")])
def test_a_run_goes_on_under_the_other_builder(folder, single, first, second, tmp_path):
    """What one builder saved, the other one loads, optimiser and all."""
    run_on_ranks(2, _save, folder, tmp_path, Builder(first))
    run_on_ranks(2, _go_on, folder, tmp_path, Builder(second))
    assert json.loads((tmp_path / "saved.json").read_text()) == json.loads((tmp_path / "loaded.json").read_text())


def _save(folder, output, builder):
    _both(folder, output, builder, is_first=True)


def _go_on(folder, output, builder):
    _both(folder, output, builder, is_first=False)


def _both(folder, output, builder, is_first: bool):
    """Two steps: the first one saved, the second one after it or after what was loaded."""
    from minitron_megatron.training.state import RunState, load_state, save_state

    with parallel_context(ParallelConfig(tensor=2, builder=builder)) as ctx:
        student, teacher = Checkpoint(folder / "student"), Checkpoint(folder / "teacher")
        step, model = distillation_step(student, teacher, ctx)
        samples = Samples(NUM_SAMPLES, 16, student.network.vocab_size, seed=3)
        batches = list(rank_batches(samples, 0, NUM_SAMPLES, MICRO_BATCH, 0, 1))
        if is_first:
            step.train(batches)
            model.grad_norm()
            model.step()
            save_state(output / "state", RunState(step=1), {"": model})
        else:
            load_state(output / "state", {"": model})
        model.zero_grad()
        result = step.train(batches)
        values = [*result.losses.values(), *result.entries["kd_hidden"].pair_losses.values()]
        if ctx.is_main:
            (output / ("saved.json" if is_first else "loaded.json")).write_text(json.dumps(values))
