"""Builds student, teacher, their optimisers, and the distillation step of a run."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from megatron.core.models.gpt import GPTModel

from minitron_megatron.checkpoint.dist_reader import TEACHER, Checkpoint
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.distill import MaskMode
from minitron_megatron.config.schema import DistillConfig, DType
from minitron_megatron.distillation.cached_teacher import CachedTeacher
from minitron_megatron.distillation.entries import divergence_entry, loss_entries, text_entry
from minitron_megatron.distillation.hidden import HiddenDistance
from minitron_megatron.distillation.live_teacher import LiveTeacher
from minitron_megatron.distillation.objectives import Entry
from minitron_megatron.distillation.on_demand import OnDemandTeacher
from minitron_megatron.distillation.prediction_cache import PredictionCache
from minitron_megatron.distillation.projections import add_projections
from minitron_megatron.distillation.step import DistillationStep
from minitron_megatron.distillation.teachers import Teacher
from minitron_megatron.model.build import TORCH_DTYPES, build_model
from minitron_megatron.model.count import forward_flops_per_token
from minitron_megatron.parallel.collectives import raise_on_all_ranks
from minitron_megatron.parallel.context import ParallelContext
from minitron_megatron.training.fake_quant import FakeQuant
from minitron_megatron.training.masks import Masks
from minitron_megatron.training.matching import Teachers, teacher_setting
from minitron_megatron.training.optimizer import TrainableModel, setup_optimizer


@dataclass
class TrainingSetup:
    """Models and step of a training run.

    Attributes:
        step: student, and the entries of its loss.
        models: trained models, by the prefix of its keys in checkpoints; the student, whose prefix is empty, first.
        flops_per_token: floating-point operations of student and teachers, by the step from 1.
    """

    step: DistillationStep
    models: dict[str, TrainableModel]
    flops_per_token: Callable[[int], float]


def set_up(
    config: DistillConfig,
    student: Checkpoint,
    teachers: Teachers,
    ctx: ParallelContext,
) -> TrainingSetup:
    """Builds the models with the weights of their checkpoints. Collective.

    Args:
        config: settings of the run.
        student: checkpoint to start from.
        teachers: to learn from; none if no loss uses them.
        ctx: this rank's place.
    """
    vocab, chunk_tokens = student.network.vocab_size, config.loss.chunk_tokens
    model_chunks = build_model(student.network, ctx, config.dtype, recompute=config.recompute)
    source = RandomWeights(student.network, config.seed) if config.random_init else student
    load_weights(model_chunks, source, ctx)
    masks = None
    if config.masks.sparsity is not None or (student.masks and config.masks.mode is MaskMode.KEEP):
        with raise_on_all_ranks():
            masks = Masks(model_chunks, student, ctx, config.masks)
            masks.zero_weights() if config.random_init else masks.require_zeros()
    models, hidden = {}, None
    if (teacher := teachers.get("")) and config.loss.largest.hidden.weight:
        networks = student.network, teacher.network
        add_projections(model_chunks, config.loss.hidden, *networks, ctx, config.seed)  # before the optimiser
        hidden = HiddenDistance(config.loss.hidden, model_chunks, networks, ctx)
    if isinstance(teacher, Checkpoint) and config.teacher_lr is not None:
        models[TEACHER] = _trainable_teacher(config, config.teacher_lr, teacher, ctx)
        chunks = models[TEACHER].model_chunks
        entries = loss_entries(
            config.loss, LiveTeacher(chunks, ctx, vocab, chunk_tokens, teacher_setting(config, "")), hidden
        )
    elif teacher:
        entries = loss_entries(config.loss, _load_teacher(config, "", teacher, ctx), hidden)
    elif teachers:
        entries = [text_entry(config.loss), *_entries_of_several(config, teachers, ctx)]
    else:
        entries = loss_entries(config.loss)
    trained = setup_optimizer(model_chunks, config.optimizer, config.steps, config.dtype, ctx)
    fake_quant = None
    if config.fake_quant.scheme is not None:
        with raise_on_all_ranks():
            fake_quant = FakeQuant(model_chunks, source, student, config.fake_quant, ctx)
            fake_quant.round_weights()  # after the optimiser has copied them
    models = {"": dataclasses.replace(trained, masks=masks, fake_quant=fake_quant), **models}
    step = DistillationStep(models[""].model_chunks, entries, ctx, vocab, chunk_tokens)
    return TrainingSetup(step, models, _flops(config, student, teachers))


def _flops(config: DistillConfig, student: Checkpoint, teachers: Teachers) -> Callable[[int], float]:
    """Returns a function of the step that gives the operations per token; see `TrainingSetup`."""
    length, spans = config.data.sequence_length, config.all_teachers
    # A backward pass costs as much as two forward passes.
    of_student = 3 * forward_flops_per_token(student.network, length)
    passes = 1 if config.teacher_lr is None else 3
    of_teachers = {
        name: passes * forward_flops_per_token(own.network, length)
        for name, own in teachers.items()
        if isinstance(own, Checkpoint)
    }
    return lambda step: of_student + sum(flops for name, flops in of_teachers.items() if spans[name].teaches_at(step))


def _entries_of_several(config: DistillConfig, teachers: Teachers, ctx: ParallelContext) -> Iterator[Entry]:
    """Yields an entry for each of several teachers, which are loaded when they begin to teach."""
    for name, own in config.teachers.items():
        load = partial(_load_teacher, config, name, teachers[name], ctx)
        teacher = OnDemandTeacher(load, teacher_setting(config, name), teachers[name].network.vocab_size)
        yield divergence_entry(config.loss, teacher, own.weight, name, own.first_step, own.last_step)


def _teacher_dtype(config: DistillConfig, teacher: Checkpoint) -> DType:
    """Returns the number format of a teacher's weights: the given one, or that of its checkpoint."""
    return config.teacher_dtype or next(own for own, torchs in TORCH_DTYPES.items() if torchs is teacher.dtype)


def _load_teacher(
    config: DistillConfig, name: str, teacher: Checkpoint | PredictionCache, ctx: ParallelContext
) -> Teacher:
    """Makes a teacher that is not trained. Collective."""
    if isinstance(teacher, PredictionCache):
        with raise_on_all_ranks():
            return CachedTeacher(teacher, ctx, teacher_setting(config, name))
    model_chunks = _build_teacher(config, teacher, ctx)
    for chunk in model_chunks:
        chunk.requires_grad_(False)
    return LiveTeacher(
        model_chunks, ctx, teacher.network.vocab_size, config.loss.chunk_tokens, teacher_setting(config, name)
    )


def _build_teacher(config: DistillConfig, teacher: Checkpoint, ctx: ParallelContext) -> list[GPTModel]:
    """Builds a teacher with its weights."""
    recompute = config.recompute and config.teacher_lr is not None
    model_chunks = build_model(teacher.network, ctx, _teacher_dtype(config, teacher), recompute, config.teacher_fp8)
    load_weights(model_chunks, teacher, ctx)
    return model_chunks


def _trainable_teacher(config: DistillConfig, lr: float, teacher: Checkpoint, ctx: ParallelContext) -> TrainableModel:
    """Makes a teacher that is trained with the student's settings, scaled to its own peak learning rate."""
    share = lr / config.optimizer.lr
    settings = dataclasses.replace(config.optimizer, lr=lr, min_lr=share * config.optimizer.min_lr)
    model_chunks = _build_teacher(config, teacher, ctx)
    return setup_optimizer(model_chunks, settings, config.steps, _teacher_dtype(config, teacher), ctx)
