"""One process against many: scores, plans, losses and every gradient are those of the model, not of the layout."""

import functools
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
import torch
import torch.distributed as dist

from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.huggingface import hf_tensors, read_hf_tensor
from minitron_megatron.config.loss import LossConfig
from minitron_megatron.config.schema import (
    Aggregation,
    Criterion,
    DepthConfig,
    DepthCriterion,
    DepthSearch,
    DType,
    ExportConfig,
    Neurons,
    OptimizerConfig,
    ParallelConfig,
    PruneConfig,
    ScoreConfig,
    TargetConfig,
    Unit,
)
from minitron_megatron.data.choices import ChoiceSamples, Question
from minitron_megatron.data.samples import rank_batches
from tests.gradients import Gradients, close, local_gradients
from tests.ranks import run_on_ranks
from tests.tiny import NEMOTRON, QWEN3, Samples, hf_model, import_hf, scores_by_chance

LAYOUTS = {
    "1x1": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2),
    "pp2": ParallelConfig(pipeline=2),
    "tp2_pp2": ParallelConfig(tensor=2, pipeline=2),
    "tp2_pp2_dp2": ParallelConfig(tensor=2, pipeline=2, data=2, sequence=True),
    "tp2_sequence": ParallelConfig(tensor=2, sequence=True),
    "pp2_interleaved": ParallelConfig(pipeline=2, virtual_pipeline=2),
    "tp4_sequence": ParallelConfig(tensor=4, sequence=True),  # two ranks share a query group
}
LOSS = LossConfig(kd_logits_weight=0.7, lm_weight=0.4, chunk_tokens=7)
# Seven and five layers divide by none of the pipelines.
MODELS = {
    "qwen3": ({**QWEN3, "num_attention_heads": 8}, TargetConfig(hidden=40, ffn=36, heads=4)),
    "nemotron": (
        {**NEMOTRON, "num_attention_heads": 8, "num_hidden_layers": 7},
        TargetConfig(layers=5, hidden=40, ffn=36, heads=4),
    ),
}
GLOBAL_BATCH, MICRO_BATCH, SEQUENCE, CALIBRATION, CALIBRATION_OF_GREEDY = 8, 2, 16, 7, 5
# The deeper network is for what depends on depth.
PAIRS = [
    *(("qwen3", name) for name in LAYOUTS if name != "1x1"),
    *(("nemotron", name) for name in ("pp2", "tp2_pp2", "tp2_sequence", "pp2_interleaved")),
]
# Scores do not depend on the number of sequences per forward pass either.
SCORING_MICRO_BATCH = {"1x1": 2, "tp2": 3, "tp2_sequence": 5, "tp2_pp2_dp2": 1}
ON_TEXT = [DepthCriterion.LOSS, DepthCriterion.KL, DepthCriterion.LOGITS, DepthCriterion.BLOCK_INFLUENCE]
WIDTH_TARGET = dict(hidden=41, ffn=37, heads=4)
QUESTIONS = [Question("abc", ["d", "efgh", "ij"], 1), Question("x", ["yz", "ab"], 0), Question("hello", ["w", "o"], 1)]
# Settings of a scoring, those of depth, and the target that searches and plans head for.
SCORINGS = {
    "mean": (dict(), dict(criteria=ON_TEXT), dict(layers=3, **WIDTH_TARGET)),
    "l2, before": (
        dict(sequence_aggregation=Aggregation.L2, neurons=Neurons.BEFORE),
        dict(criteria=ON_TEXT, unit=Unit.SUBLAYER),
        dict(attention=3, mlp=2, **WIDTH_TARGET),
    ),
    "variance, times weight": (
        dict(sequence_aggregation=Aggregation.VARIANCE, criterion=Criterion.ACTIVATION_WEIGHT),
        dict(criteria=[*ON_TEXT[::-1], DepthCriterion.ACCURACY], search=DepthSearch.BLOCK, choices="questions"),
        dict(layers=2, **WIDTH_TARGET),
    ),
    "weight, greedy": (
        dict(criterion=Criterion.WEIGHT),
        dict(criteria=[*ON_TEXT, DepthCriterion.ACCURACY], search=DepthSearch.GREEDY, choices="questions"),
        dict(layers=2, **WIDTH_TARGET),
    ),
    "random, greedy over sublayers": (
        dict(criterion=Criterion.RANDOM),
        dict(criteria=ON_TEXT[::-1], search=DepthSearch.GREEDY, unit=Unit.SUBLAYER, protect_first=0),
        dict(attention=3, mlp=2, groups=1, hidden=41),
    ),
}


def letters(text, add_special_tokens):
    """A tokenizer."""
    return {"input_ids": [ord(letter) - 33 for letter in text]}


def score_and_plan(model_chunks, network, ctx, name: str, layout_name: str) -> dict:
    """Scores as tensors by name, and the plan that is made from them."""
    from minitron_megatron.pruning.make_plan import make_plan
    from minitron_megatron.pruning.score_model import score_model

    settings, depth, target = SCORINGS[name]
    config = ScoreConfig(
        num_samples=num_samples(name),
        micro_batch=SCORING_MICRO_BATCH.get(layout_name, MICRO_BATCH),
        depth=DepthConfig(**depth),
        **settings,
    )
    if config.depends_on_target:
        config.target = TargetConfig(**target)
    samples = Samples(config.num_samples, SEQUENCE, network.vocab_size)
    # Under sequence parallelism these are padded, to a multiple of the tensor ranks.
    multiple = ctx.layout.tensor if ctx.layout.sequence else 1
    choices = ChoiceSamples(QUESTIONS, letters, multiple) if config.depth.choices else None
    scores = score_model(model_chunks, network, ctx, samples, config, choices)
    found = {"hidden": scores.hidden}
    found |= {f"{name}.{n}": one for name, values in scores.elements.items() for n, one in enumerate(values)}
    found |= {f"depth.{name}": values for name, values in scores.depth.items()}
    found |= {f"rounds.{name}": values for name, values in scores.rounds.items()}
    return {"scores": found, "plan": asdict(make_plan(scores, config.target))}


def work(folder, layout: ParallelConfig):
    """Everything that is compared, by one rank of a layout."""
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.distillation.entries import loss_entries
    from minitron_megatron.distillation.live_teacher import LiveTeacher
    from minitron_megatron.distillation.step import DistillationStep
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.training.optimizer import setup_optimizer

    teacher, student = Checkpoint(folder / "teacher/checkpoint"), Checkpoint(folder / "student")
    with parallel_context(layout) as ctx:
        teacher_chunks = build_model(teacher.network, ctx, DType.FP32)
        load_weights(teacher_chunks, teacher, ctx)
        found = {
            name: score_and_plan(teacher_chunks, teacher.network, ctx, name, layout_name(layout))
            for name in scorings(layout, teacher.network)
        }

        # One layout runs whole layers again, which must not change anything either.
        model_chunks = build_model(student.network, ctx, DType.FP32, recompute=layout.data is not None)
        load_weights(model_chunks, student, ctx)
        teacher_chunks = [chunk.requires_grad_(False) for chunk in teacher_chunks]
        # Nor does it matter when gradients are added up.
        optimizer = OptimizerConfig(lr=1e-3, warmup_steps=1, overlap=layout.data is not None)
        trained = setup_optimizer(model_chunks, optimizer, 4, DType.FP32, ctx)
        vocab = student.network.vocab_size
        entries = loss_entries(LOSS, LiveTeacher(teacher_chunks, ctx, vocab))
        step = DistillationStep(trained.model_chunks, entries, ctx, vocab, LOSS.chunk_tokens)
        samples = Samples(2 * GLOBAL_BATCH, SEQUENCE, student.network.vocab_size, seed=3)
        found["steps"] = []
        for number in range(2):
            first = number * GLOBAL_BATCH
            batches = list(rank_batches(samples, first, GLOBAL_BATCH, MICRO_BATCH, ctx.data_rank, ctx.layout.replicas))
            trained.zero_grad()
            result = step.train(batches)
            if number == 0:
                gradients = local_gradients(model_chunks, student.network, ctx)
            found["steps"].append(
                (
                    result.losses["kd_logits"],
                    result.losses["lm"],
                    result.num_tokens,
                    trained.grad_norm(),
                    trained.step(),
                )
            )
        torch.save({**found, "gradients": gradients}, folder / f"{layout_name(layout)}_{dist.get_rank()}.pt")


def num_samples(name: str) -> int:
    """Of a scoring: a greedy search scores all layers again after each that it removes."""
    return CALIBRATION_OF_GREEDY if is_greedy(name) else CALIBRATION


def is_greedy(name: str) -> bool:
    return SCORINGS[name][1].get("search") is DepthSearch.GREEDY


def scorings(layout: ParallelConfig, network) -> list[str]:
    """Names of those that a layout is compared by: greedy searches take several ranks over gloo half a minute, and
    that of the larger network is for one process and for the layouts with two kinds of ranks, or of stages."""
    has_time = layout.tensor < 4 and (len(network.layers) < 7 or layout.tensor == layout.pipeline or layout.stages > 2)
    return [name for name in SCORINGS if has_time or not is_greedy(name)]


def layout_name(layout: ParallelConfig) -> str:
    return next(name for name, other in LAYOUTS.items() if other == layout)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """The folder with teacher and student checkpoints of a model, both also as transformers models."""
    from minitron_megatron.checkpoint.convert import export
    from minitron_megatron.pruning.prune import prune

    @functools.cache
    def make(model: str):
        folder = tmp_path_factory.mktemp(model)
        config, target = MODELS[model]
        checkpoint = import_hf(folder / "teacher", hf_model(**config))
        _write_random_scores(checkpoint, folder / "scores")
        prune(PruneConfig(str(checkpoint), str(folder / "student"), str(folder / "scores"), target=target))
        export(ExportConfig(str(folder / "student"), str(folder / "student_hf")))
        return folder

    return make


def _write_random_scores(checkpoint, folder):
    from minitron_megatron.artifacts.manifest import Manifest

    folder.mkdir()
    scores_by_chance(Checkpoint(checkpoint).network, seed=5).write(folder)
    Manifest("scores").write(folder)


class Run:
    """What one layout found."""

    def __init__(self, folder, name: str):
        self.layout = layout = LAYOUTS[name]
        num_ranks = layout.tensor * layout.pipeline * layout.replicas
        run_on_ranks(num_ranks, work, folder, layout)
        self.ranks = [torch.load(folder / f"{name}_{r}.pt", weights_only=False) for r in range(num_ranks)]
        self.network = Checkpoint(folder / "student").network
        self.teacher = Checkpoint(folder / "teacher/checkpoint").network
        self.gradients = Gradients(self.network, [rank["gradients"] for rank in self.ranks])


@pytest.fixture(scope="module")
def run(folder_of):
    """What a layout finds about a model."""
    return functools.cache(lambda model, layout: Run(folder_of(model), layout))


each_layout = pytest.mark.parametrize("model, layout", PAIRS)


@each_layout
def test_scores_and_plans_do_not_depend_on_the_layout(run, model, layout):
    single, many = run(model, "1x1"), run(model, layout)
    for name, rank in product(scorings(many.layout, many.teacher), many.ranks):
        expected = single.ranks[0][name]
        assert rank[name]["scores"].keys() == expected["scores"].keys()
        for what, values in expected["scores"].items():
            found = rank[name]["scores"][what]
            assert torch.equal(found.isnan(), values.isnan()), (name, what)
            assert close(found.nan_to_num(0), values.nan_to_num(0)), (name, what)
        assert rank[name]["plan"] == expected["plan"], name


@each_layout
def test_losses_and_gradient_norms_do_not_depend_on_the_layout(run, model, layout):
    for rank in run(model, layout).ranks:
        np.testing.assert_allclose(rank["steps"], run(model, "1x1").ranks[0]["steps"], rtol=1e-5)


@each_layout
def test_every_gradient_does_not_depend_on_the_layout(run, model, layout):
    single, many = run(model, "1x1"), run(model, layout)
    names = list(hf_tensors(single.network))
    assert len(names) > 20
    for name, _, param, part in names:
        expected = read_hf_tensor(single.gradients, param, part)
        assert expected.abs().max() > 0, name
        assert close(read_hf_tensor(many.gradients, param, part), expected), name


@pytest.mark.parametrize("model", MODELS)
def test_the_step_is_the_plain_loss_on_transformers_models(folder_of, run, model):
    from transformers import AutoModelForCausalLM

    from minitron_megatron.distillation.losses import distillation_loss

    folder, single = folder_of(model), run(model, "1x1")
    teacher = AutoModelForCausalLM.from_pretrained(folder / "teacher/hf")
    student = AutoModelForCausalLM.from_pretrained(folder / "student_hf")
    samples = Samples(2 * GLOBAL_BATCH, SEQUENCE, single.network.vocab_size, seed=3)
    batch = next(rank_batches(samples, 0, GLOBAL_BATCH, GLOBAL_BATCH, 0, 1))
    with torch.no_grad():
        target = teacher(batch["tokens"]).logits.flatten(0, 1)
    logits = student(batch["tokens"]).logits.flatten(0, 1)
    labels, mask = batch["labels"].flatten(), batch["loss_mask"].flatten()
    loss = distillation_loss(logits, labels, mask, target, LOSS.kd_logits_weight, LOSS.lm_weight) / mask.sum()
    loss.backward()
    kd_logits, lm, *_ = single.ranks[0]["steps"][0]
    assert LOSS.kd_logits_weight * kd_logits + LOSS.lm_weight * lm == pytest.approx(loss.item(), rel=1e-5)
    expected = {name: parameter.grad for name, parameter in student.named_parameters()}
    for name, _, param, part in hf_tensors(single.network):
        assert close(read_hf_tensor(single.gradients, param, part), expected[name], 1e-4), name
