"""Checks that teacher, student and settings match, before anything is built."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from minitron_megatron.artifacts.manifest import CACHE, Manifest, Parent
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.schema import DistillConfig
from minitron_megatron.data.encoding import have_equal_tokenizers, load_tokenizer, num_token_ids
from minitron_megatron.data.samples import HeldoutSamples, TrainingSamples
from minitron_megatron.distillation.pairs import hidden_problems
from minitron_megatron.distillation.prediction_cache import HELDOUT, TRAIN, PredictionCache
from minitron_megatron.errors import raise_if_any
from minitron_megatron.model.build import build_problems, fp8_problems
from minitron_megatron.model.positions import warn_of_positions
from minitron_megatron.training.fake_quant import fake_quant_problems
from minitron_megatron.training.masks import masks_problems

logger = logging.getLogger(__name__)

Teachers = Mapping[str, Checkpoint | PredictionCache]
"""Checkpoints, or caches of predictions, by their names in `DistillConfig.all_teachers`."""


def open_teacher(folder: Path) -> Checkpoint | PredictionCache:
    """Returns a teacher: a checkpoint, or a cache of predictions.

    Raises:
        CheckpointError: it is neither, or not whole.
    """
    return PredictionCache(folder) if Manifest.is_of_kind(CACHE, folder) else Checkpoint(folder)


def require_match(config: DistillConfig, student: Checkpoint, teachers: Teachers) -> None:
    """Checks that teachers and student match and can be built, before anything is.

    Args:
        config: settings of the run.
        student: to start from.
        teachers: by their names in `config.all_teachers`.

    Raises:
        ConfigError: they do not, or cannot.
    """
    problems = masks_problems(student, config.masks)
    for name, teacher in teachers.items():
        where = teacher_setting(config, name)
        if isinstance(teacher, PredictionCache):
            problems += _cache_mismatches(teacher, where, student, config)
        else:
            problems += _mismatches(teacher, where, student, config)
    raise_if_any(problems + fake_quant_problems(student.network, config.fake_quant))
    models = {f"teachers.{name}" if name else "teacher": own for name, own in teachers.items()}
    built = {"student": student, **{role: own for role, own in models.items() if isinstance(own, Checkpoint)}}
    raise_if_any([p for role, model in built.items() for p in build_problems(model.network, config.parallel, role)])
    for role, model in built.items():
        warn_of_positions(model.network.max_positions, config.data.sequence_length, f"the {role}")
        if model is not student and config.teacher_fp8:
            raise_if_any(fp8_problems(model.network, config.parallel, "teacher_fp8"))


def teacher_parents(teachers: Teachers) -> list[Parent]:
    """Returns the teachers as inputs of a run, each under the name of its setting."""
    return [Parent.of(f"teachers.{name}.teacher" if name else "teacher", own.root) for name, own in teachers.items()]


def teacher_setting(config: DistillConfig, name: str) -> str:
    """Returns the setting that names a teacher, with its value: what messages call it."""
    return f"{f'teachers.{name}.' if name else ''}teacher = {config.all_teachers[name].teacher}"


def _mismatches(teacher: Checkpoint, where: str, student: Checkpoint, config: DistillConfig) -> list[str]:
    """Returns why a teacher and the student do not match, one sentence each."""
    problems = hidden_problems(config.loss.largest.hidden, student.network, teacher.network)
    if config.teacher_lr is not None and config.teacher_dtype is None and teacher.dtype is torch.float16:
        problems.append(
            f"{where} is in fp16, and teacher_lr = {config.teacher_lr} trains it, which needs bf16 or fp32: set "
            f"teacher_dtype=bf16"
        )
    vocab = min(teacher.network.vocab_size, student.network.vocab_size)
    problems += config.loss.logits.vocab_problems(vocab)
    theirs, ours = (
        f"vocab_size = {s.vocab_size}, padded to {s.padded_vocab_size}" for s in (teacher.network, student.network)
    )
    if theirs != ours and config.teacher_lr is not None:
        problems.append(
            f"{where} has {theirs}; student = {config.student} has {ours}; and teacher_lr = {config.teacher_lr} trains "
            f"the teacher: they must share one vocabulary, and its padding, or teacher_lr be null"
        )
    tokenizers = _tokenizer_problems(teacher, where, student, config)
    if theirs != ours and not tokenizers:
        if (count := num_token_ids(load_tokenizer(student.huggingface_folder))) > vocab:
            problems.append(
                f"{where} has {theirs}; student = {config.student} has {ours}; and their tokenizer has ids up to "
                f"{count - 1}: both tables must have a row for each"
            )
        logger.info("%s has %s; the student has %s: the first %d tokens are compared", where, theirs, ours, vocab)
    return problems + tokenizers


def _tokenizer_problems(
    teacher: Checkpoint | PredictionCache, where: str, student: Checkpoint, config: DistillConfig
) -> list[str]:
    if have_equal_tokenizers(teacher.huggingface_folder, student.huggingface_folder):
        return []
    return [f"{where} and student = {config.student} carry different tokenizers: they must share one"]


def _cache_mismatches(cache: PredictionCache, where: str, student: Checkpoint, config: DistillConfig) -> list[str]:
    """Returns why a cache cannot teach a student, one sentence each."""
    problems, teacher = [], where
    where = f"{where} is a cache of predictions"
    largest = config.loss.largest
    if largest.hidden.weight:
        problems.append(
            f"{where}, which has no states of inner layers, and loss.hidden.weight = {largest.hidden.weight} "
            f"compares them: name the teacher's checkpoint, or set the weight to 0"
        )
    problems += [
        f"{where}, and {name} = {value} is for a model: leave it out, or name the teacher's checkpoint"
        for name in ("teacher_lr", "teacher_dtype", "teacher_fp8")
        if (value := getattr(config, name)) and len(config.all_teachers) == 1
    ]
    if largest.kd_logits_weight:
        of_steps = (cache.problems(config.loss.at(step).logits) for step in [1, *config.loss.steps_of_changes()])
        problems += dict.fromkeys(problem for of_step in of_steps for problem in of_step)
    if cache.index.sequence_length != config.data.sequence_length:
        problems.append(
            f"{where} for sequences of {cache.index.sequence_length} tokens, and data.sequence_length = "
            f"{config.data.sequence_length}: make them equal"
        )
    if cache.index.vocab != student.network.vocab_size and not cache.has_states:
        return [
            *problems,
            f"{where} over {cache.index.vocab} tokens, and student = {config.student} has "
            f"{student.network.vocab_size}: they must share one tokenizer",
        ]
    return problems + _tokenizer_problems(cache, teacher, student, config)


def sample_problems(
    config: DistillConfig,
    teachers: Teachers,
    samples: TrainingSamples,
    heldout: HeldoutSamples,
) -> list[str]:
    """Returns why caches among the teachers have no predictions for the samples of a run, one sentence each."""
    problems = []
    for cache in teachers.values():
        if isinstance(cache, PredictionCache):
            count = config.steps * config.global_batch
            problems += cache.sample_problems(TRAIN, samples.fingerprint, count, "steps x global_batch")
            count = min(len(heldout), config.validate_batches * config.global_batch) if config.validate_every else 0
            where = "validate_batches x global_batch"
            problems += cache.sample_problems(HELDOUT, heldout.fingerprint, count, where)
    return problems
