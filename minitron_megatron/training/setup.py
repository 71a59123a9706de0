"""Builds student, teacher, their optimisers, and the distillation step of a run."""

import dataclasses
from dataclasses import dataclass

from megatron.core.models.gpt import GPTModel

from minitron_megatron.checkpoint.dist_reader import TEACHER, Checkpoint
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.config.distill import MaskMode
from minitron_megatron.config.schema import DistillConfig, DType
from minitron_megatron.distillation.cached_teacher import CachedTeacher
from minitron_megatron.distillation.entries import loss_entries
from minitron_megatron.distillation.hidden import HiddenDistance
from minitron_megatron.distillation.live_teacher import LiveTeacher
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
from minitron_megatron.training.optimizer import TrainableModel, setup_optimizer


@dataclass
class TrainingSetup:
    """Models and step of a training run.

    Attributes:
        step: student, and the entries of its loss.
        models: trained models, by the prefix of its keys in checkpoints; the student, whose prefix is empty, first.
        flops_per_token: floating-point operations of student and teacher in one step.
    """

    step: DistillationStep
    models: dict[str, TrainableModel]
    flops_per_token: float


def set_up(
    config: DistillConfig, student: Checkpoint, teacher: Checkpoint | PredictionCache | None, ctx: ParallelContext
) -> TrainingSetup:
    """Builds the models with the weights of their checkpoints. Collective.

    Args:
        config: settings of the run.
        student: checkpoint to start from.
        teacher: checkpoint of the teacher, or a cache of its predictions; None if no loss uses it.
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
    # A backward pass costs as much as two forward passes.
    flops = 3 * forward_flops_per_token(student.network, config.data.sequence_length)
    models, hidden = {}, None
    taught_by: Teacher | None = None
    if isinstance(teacher, PredictionCache):
        with raise_on_all_ranks():
            taught_by = CachedTeacher(teacher, student.network.padded_vocab_size, ctx)
    elif teacher:
        teacher_chunks = _load_teacher(config, teacher, ctx)
        flops += (1 if config.teacher_lr is None else 3) * forward_flops_per_token(
            teacher.network, config.data.sequence_length
        )
        if config.loss.largest.hidden.weight:
            networks = student.network, teacher.network
            add_projections(model_chunks, config.loss.hidden, *networks, ctx, config.seed)  # before the optimiser
            hidden = HiddenDistance(config.loss.hidden, model_chunks, networks, ctx)
        if config.teacher_lr is not None:
            models[TEACHER] = _trainable_teacher(config, config.teacher_lr, teacher, teacher_chunks, ctx)
            teacher_chunks = models[TEACHER].model_chunks
        taught_by = LiveTeacher(teacher_chunks, ctx, vocab, chunk_tokens)
    trained = setup_optimizer(model_chunks, config.optimizer, config.steps, config.dtype, ctx)
    fake_quant = None
    if config.fake_quant.scheme is not None:
        with raise_on_all_ranks():
            fake_quant = FakeQuant(model_chunks, source, student, config.fake_quant, ctx)
            fake_quant.round_weights()  # after the optimiser has copied them
    models = {"": dataclasses.replace(trained, masks=masks, fake_quant=fake_quant), **models}
    entries = loss_entries(config.loss, taught_by, hidden)
    return TrainingSetup(DistillationStep(models[""].model_chunks, entries, ctx, vocab, chunk_tokens), models, flops)


def _teacher_dtype(config: DistillConfig, teacher: Checkpoint) -> DType:
    """Returns the number format of a teacher's weights: the given one, or that of its checkpoint."""
    return config.teacher_dtype or next(own for own, torchs in TORCH_DTYPES.items() if torchs is teacher.dtype)


def _load_teacher(config: DistillConfig, teacher: Checkpoint, ctx: ParallelContext) -> list[GPTModel]:
    """Builds the teacher, frozen unless it is trained."""
    is_trained = config.teacher_lr is not None
    dtype = _teacher_dtype(config, teacher)
    model_chunks = build_model(teacher.network, ctx, dtype, config.recompute and is_trained, config.teacher_fp8)
    load_weights(model_chunks, teacher, ctx)
    for chunk in model_chunks:
        chunk.requires_grad_(is_trained)
    return model_chunks


def _trainable_teacher(
    config: DistillConfig, lr: float, teacher: Checkpoint, model_chunks: list[GPTModel], ctx: ParallelContext
) -> TrainableModel:
    """Makes the teacher trainable with the student's settings, scaled to its own peak learning rate."""
    share = lr / config.optimizer.lr
    settings = dataclasses.replace(config.optimizer, lr=lr, min_lr=share * config.optimizer.min_lr)
    return setup_optimizer(model_chunks, settings, config.steps, _teacher_dtype(config, teacher), ctx)
