"""The verb `distill`: a student learns to predict what its teacher predicts."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from minitron_megatron.checkpoint.companions import copy_companions
from minitron_megatron.checkpoint.load import load_weights
from minitron_megatron.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    Parent,
    made_otherwise,
    write_atomically,
    writing,
)
from minitron_megatron.checkpoint.random_weights import RandomWeights
from minitron_megatron.checkpoint.sharded import HUGGINGFACE, TEACHER, Checkpoint
from minitron_megatron.config.compose import to_plain, to_yaml
from minitron_megatron.config.schema import DistillConfig
from minitron_megatron.data.encoding import tokenizer_fingerprint
from minitron_megatron.data.samples import Samples, heldout_samples, training_samples
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.disk import told_when_full
from minitron_megatron.distillation.hidden import HiddenLosses, add_projections, hidden_problems
from minitron_megatron.distillation.step import TeacherStudent
from minitron_megatron.errors import ConfigError, Preempted, raise_if_any
from minitron_megatron.model.build import TORCH_DTYPES, build_model, build_problems, fp8_problems
from minitron_megatron.model.count import forward_flops_per_token, num_parameters
from minitron_megatron.model.megatron_args import args_of_shape
from minitron_megatron.parallel.collectives import failing_together, main_first
from minitron_megatron.parallel.groups import Groups, process_groups
from minitron_megatron.tracking.metrics import Metrics
from minitron_megatron.training.loop import train
from minitron_megatron.training.optimizer import optimization
from minitron_megatron.training.preemption import stop_requests
from minitron_megatron.training.state import load_state

logger = logging.getLogger(__name__)

# A training checkpoint holds, per parameter, the weight and three float32: main weight and both moments.
_BYTES_PER_PARAMETER = 2 + 3 * 4


def distill(config: DistillConfig) -> Path:
    """Train a student checkpoint, from a teacher or from the text alone.

    A run that was killed goes on from its last checkpoint when it is started again with the same settings.

    Args:
        config: settings of the run.

    Returns:
        the run's folder; its `checkpoints/` is the trained checkpoint.

    Raises:
        CheckpointError: teacher or student is not whole.
        ConfigError: they do not belong together, the output holds another run, or a tracker does not start.
        DataError: the text is too short, or the teacher is no better than chance on it.
        Preempted: a signal asked the run to stop; it is saved as it was after that step.
        TrainingError: losses or gradients were not finite, again and again.
    """
    student = Checkpoint(config.student)
    teacher = Checkpoint(config.teacher) if config.teacher else None
    raise_if_any(_mismatches(teacher, student, config))
    networks = {"student": student, "teacher": teacher} if teacher else {"student": student}
    raise_if_any([p for role, c in networks.items() for p in build_problems(c.shape, config.parallel, role)])
    if teacher and config.teacher_fp8:
        raise_if_any(fp8_problems(teacher.shape, config.parallel, "teacher_fp8"))
    output = Path(config.output)
    parents = [Parent.of(role, checkpoint.root) for role, checkpoint in networks.items()]
    parents += Parent.of_text(config.data.text)
    manifest = Manifest("run", student.shape.to_dict(), parents, to_plain(config))
    with process_groups(config.parallel) as groups:
        raise_if_any(config.batch_problems(groups.layout.data))
        if main_first(lambda: _is_finished(output, manifest)):
            return output
        corpus = main_first(lambda: prepare_corpus(config.data, student.huggingface_folder))
        samples = training_samples(corpus, config.data, config.steps * config.global_batch)
        heldout = heldout_samples(corpus, config.data)
        main_first(lambda: _prepare(output, config, student, manifest))
        # A signal that comes earlier ends the process, for there is nothing to save.
        with told_when_full(output), stop_requests() as asked_to_stop:
            with _leaving_together(), ExitStack() as stack:
                metrics = None
                with failing_together():  # before anything is loaded, for a tracker may not start
                    if groups.is_main:
                        metrics = stack.enter_context(Metrics(output, config.tracking, manifest))
                # A teacher whose predictions count nothing is not loaded.
                needed = teacher if config.loss.needs_teacher else None
                _run(config, output, needed, student, samples, heldout, groups, metrics, asked_to_stop)
                if metrics and config.tracking.trackers:
                    # matplotlib takes a second to import, and few runs have a tracker
                    from minitron_megatron.tracking.curves import write_loss_curves

                    metrics.log_output(output.name, output / "checkpoints")
                    metrics.log_figures(write_loss_curves(output))
            if groups.is_main:
                manifest.write(output)
                (output / "DONE").touch()
    return output


@contextmanager
def _leaving_together() -> Iterator[None]:
    """A run that was asked to stop is left when all ranks are ready to.

    Launchers end the ranks that are left when one goes, and the first rank has its trackers to finish.
    """
    try:
        yield
    except Preempted:
        dist.barrier()
        raise


def _run(
    config: DistillConfig,
    output: Path,
    teacher: Checkpoint | None,
    student: Checkpoint,
    samples: Samples,
    heldout: Samples,
    groups: Groups,
    metrics: Metrics | None,
    asked_to_stop: Callable[[], bool],
) -> None:
    chunks = build_model(student.shape, groups, config.dtype, recompute=config.recompute)
    load_weights(chunks, RandomWeights(student.shape, config.seed) if config.random_init else student, groups)
    teacher_chunks = None
    flops = 3 * forward_flops_per_token(student.shape, config.data.sequence_length)
    if teacher:
        dtype = config.teacher_dtype or next(own for own, torchs in TORCH_DTYPES.items() if torchs is teacher.dtype)
        recompute = config.recompute and config.teacher_lr is not None
        teacher_chunks = build_model(teacher.shape, groups, dtype, recompute, config.teacher_fp8)
        load_weights(teacher_chunks, teacher, groups)
        passes = 1 if config.teacher_lr is None else 3
        flops += passes * forward_flops_per_token(teacher.shape, config.data.sequence_length)

    hidden = None
    if teacher and config.loss.hidden.weight:
        shapes = student.shape, teacher.shape
        add_projections(chunks, config.loss.hidden, *shapes, groups, config.seed)
        hidden = HiddenLosses(config.loss.hidden, chunks, teacher_chunks, shapes, groups)
    models = {"": optimization(chunks, config.optimizer, config.steps, config.dtype, groups)}
    if teacher and config.teacher_lr is not None:
        share = config.teacher_lr / config.optimizer.lr
        settings = dataclasses.replace(config.optimizer, lr=config.teacher_lr, min_lr=share * config.optimizer.min_lr)
        models[TEACHER] = optimization(teacher_chunks, settings, config.steps, dtype, groups)
        teacher_chunks = models[TEACHER].chunks
    elif teacher:
        for chunk in teacher_chunks:
            chunk.requires_grad_(False)
    pair = TeacherStudent(models[""].chunks, teacher_chunks, groups, config.loss, student.shape.vocab, hidden)
    checkpoints = output / "checkpoints"
    run = load_state(checkpoints, models)
    if run.step:
        logger.info("going on after step %d", run.step)
    main_first(lambda: metrics.go_on(run.step))
    args = args_of_shape(student.megatron_args(), student.shape)
    args.tensor_model_parallel_size = groups.layout.tensor
    args.pipeline_model_parallel_size = groups.layout.pipeline
    train(config, pair, models, samples, heldout, groups, run, checkpoints, metrics, flops, asked_to_stop, args)


def _mismatches(teacher: Checkpoint | None, student: Checkpoint, config: DistillConfig) -> list[str]:
    if teacher is None:
        return []
    found = hidden_problems(config.loss.hidden, student.shape, teacher.shape)
    if config.teacher_lr is not None and config.teacher_dtype is None and teacher.dtype is torch.float16:
        found.append(
            f"teacher = {config.teacher} is in fp16, and teacher_lr = {config.teacher_lr} trains it, which needs bf16 "
            f"or fp32: set teacher_dtype=bf16"
        )
    found += config.loss.logits.vocab_problems(teacher.shape.vocab)
    theirs, ours = (f"vocab = {s.vocab}, padded to {s.padded_vocab}" for s in (teacher.shape, student.shape))
    if theirs != ours:
        found.append(
            f"teacher = {config.teacher} has {theirs}; student = {config.student} has {ours}: they must share one "
            f"vocabulary, and its padding"
        )
    if teacher.shape.vocab == student.shape.vocab:
        theirs, ours = (tokenizer_fingerprint(c.huggingface_folder) for c in (teacher, student))
        if theirs != ours:
            found.append(
                f"teacher = {config.teacher} and student = {config.student} carry different tokenizers: "
                f"they must share one"
            )
    return found


def _is_finished(output: Path, manifest: Manifest) -> bool:
    """Whether the run is there already; an unfinished one of the same settings may go on."""
    checkpoints = output / "checkpoints"
    known = output if (output / MANIFEST).exists() else checkpoints
    if (known / MANIFEST).exists():
        if changes := _of_run(Manifest.read(known)).changes(manifest):
            raise ConfigError([made_otherwise(output, changes)])
        if known is output:
            logger.info("%s is there already with the same inputs: skipped", output)
            return True
    elif output.is_file() or (output.exists() and any(not path.name.startswith(".") for path in output.iterdir())):
        raise ConfigError([f"output = {output} exists and is not a run: choose another or remove it"])
    return False


def _of_run(manifest: Manifest) -> Manifest:
    """The manifest of the run that a manifest of its checkpoints is like."""
    return dataclasses.replace(manifest, kind="run")


def _prepare(output: Path, config: DistillConfig, student: Checkpoint, manifest: Manifest) -> None:
    """Make the run's folder, with everything that describes its checkpoints before there are any."""
    checkpoints = output / "checkpoints"
    if not (checkpoints / MANIFEST).exists():
        # What is kept stays until the next one is whole, and the best one may be none of the latest.
        count = config.keep_checkpoints + 1 + bool(config.validate_every)
        trained = [student] if config.teacher_lr is None else [student, Checkpoint(config.teacher)]
        num_bytes = count * _BYTES_PER_PARAMETER * sum(num_parameters(checkpoint.shape) for checkpoint in trained)
        with writing(checkpoints, dataclasses.replace(manifest, kind="checkpoint"), num_bytes) as folder:
            copy_companions(student.huggingface_folder, folder / HUGGINGFACE)
    write_atomically(output / "config.yaml", to_yaml(config))
