"""The verb `distill`: trains a student to predict what its teacher predicts."""

import dataclasses
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch.distributed as dist

from minitron_megatron.artifacts.lease import sole_writer
from minitron_megatron.artifacts.manifest import HUGGINGFACE, MANIFEST, Manifest, Parent
from minitron_megatron.artifacts.output import conflict_message, writing
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.hf_assets import copy_hf_assets
from minitron_megatron.config.compose import to_plain, to_yaml
from minitron_megatron.config.distill import MaskMode
from minitron_megatron.config.schema import DistillConfig
from minitron_megatron.config.sparsify import UNSTRUCTURED
from minitron_megatron.data.corpus import text_parents
from minitron_megatron.data.samples import (
    Samples,
    heldout_samples,
    require_tokens,
    training_samples,
)
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.disk import convert_enospc
from minitron_megatron.errors import ConfigError, Preempted, raise_if_any
from minitron_megatron.files import write_atomically
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.megatron_args import args_of_network
from minitron_megatron.parallel.collectives import raise_on_all_ranks, rank0_first
from minitron_megatron.parallel.context import ParallelContext, parallel_context
from minitron_megatron.tracking.metrics import Metrics
from minitron_megatron.training.loop import Trainer
from minitron_megatron.training.matching import Teachers, open_teacher, require_match, sample_problems, teacher_parents
from minitron_megatron.training.preemption import stop_requests
from minitron_megatron.training.saver import Saver
from minitron_megatron.training.setup import set_up
from minitron_megatron.training.state import load_state

logger = logging.getLogger(__name__)

# A training checkpoint holds, per parameter, the weight and three float32: main weight and both moments.
_BYTES_PER_PARAMETER = 2 + 3 * 4


@sole_writer
def distill(config: DistillConfig) -> Path:
    """Trains a student checkpoint, from a teacher or several, or from the text alone.

    A killed run resumes from its last checkpoint when it is started again with the same settings.

    Args:
        config: settings of the run.

    Returns:
        the run's folder; its `checkpoints/` is the trained checkpoint.

    Raises:
        CheckpointError: teacher or student is not whole.
        ConfigError: teacher and student do not match, the output holds another run, or a tracker does not start.
        DataError: the text is too short or has no token that counts, or the teacher is not better than chance on it.
        Preempted: a signal asked the run to stop; it was saved after the current step.
        TrainingError: too many steps in a row had no finite loss and gradient.
    """
    student = Checkpoint(config.student)
    teachers = {name: open_teacher(Path(own.teacher)) for name, own in config.all_teachers.items()}
    require_match(config, student, teachers)
    output = Path(config.output)
    parents = [Parent.of("student", student.root), *teacher_parents(teachers)]
    parents += text_parents(config.data.text)
    manifest = Manifest("run", student.network.to_dict(), parents, to_plain(config), verb="distill")
    _say_of_zeros_and_scales(config, student, manifest)
    with parallel_context(config.parallel) as ctx:
        raise_if_any(config.batch_problems(ctx.layout.replicas))
        if rank0_first(lambda: _is_finished(output, manifest)):
            return output
        corpus = rank0_first(lambda: prepare_corpus(config.data, student.huggingface_folder))
        samples = training_samples(corpus, config.data, config.steps * config.global_batch)
        require_tokens(samples, "training", config.steps * config.global_batch)
        heldout = heldout_samples(corpus, config.data)
        if config.validate_every:
            require_tokens(heldout, "first held-out", config.validate_batches * config.global_batch)
        if config.loss.needs_teacher:
            raise_if_any(sample_problems(config, teachers, samples, heldout))
        rank0_first(lambda: _prepare(output, config, student, manifest))
        # An earlier signal ends the process, because there is nothing to save.
        with convert_enospc(output), stop_requests() as stop_requested:
            with _leave_together(), ExitStack() as stack:
                metrics = None
                with raise_on_all_ranks():  # before anything is loaded, for a tracker may not start
                    if ctx.is_main:
                        metrics = stack.enter_context(Metrics(output, config.tracking, manifest))
                _run(config, teachers, student, samples, heldout, ctx, metrics, stop_requested)
                if metrics and config.tracking.trackers:
                    # matplotlib takes a second to import, and few runs have a tracker
                    from minitron_megatron.tracking.curves import write_loss_curves

                    metrics.log_output(output.name, output / "checkpoints")
                    metrics.log_figures(write_loss_curves(output))
            if ctx.is_main:
                manifest.write(output)
                (output / "DONE").touch()
    return output


@contextmanager
def _leave_together() -> Iterator[None]:
    """Leaves a preempted run on all ranks at the same time.

    A launcher ends the other ranks when one leaves, and rank 0 has to finish its trackers first.
    """
    try:
        yield
    except Preempted:
        dist.barrier()
        raise


def _run(
    config: DistillConfig,
    teachers: Teachers,
    student: Checkpoint,
    samples: Samples,
    heldout: Samples,
    ctx: ParallelContext,
    metrics: Metrics | None,
    stop_requested: Callable[[], bool],
) -> None:
    """Builds the models and trains, from the last checkpoint of the run if there is one."""
    # Teachers that no loss uses are not loaded.
    setup = set_up(config, student, teachers if config.loss.needs_teacher else {}, ctx)
    checkpoints = Path(config.output) / "checkpoints"
    run = load_state(checkpoints, setup.models)
    if run.step:
        logger.info("resuming after step %d", run.step)

    def begin_log() -> None:
        if metrics:
            metrics.resume(run.step)

    rank0_first(begin_log)
    args = args_of_network(student.megatron_args(), student.network)
    if args:
        args.tensor_model_parallel_size = ctx.layout.tensor
        args.pipeline_model_parallel_size = ctx.layout.pipeline
    Trainer(
        config,
        setup.step,
        setup.models,
        samples,
        heldout,
        ctx,
        run,
        Saver(checkpoints, config.keep_checkpoints, setup.models, args),
        metrics,
        setup.flops_per_token,
        stop_requested,
    ).train()


def _say_of_zeros_and_scales(config: DistillConfig, student: Checkpoint, manifest: Manifest) -> None:
    """Passes on which pattern a sparse student has, and warns of what training does to a quantised one."""
    is_kept = config.masks.mode is MaskMode.KEEP
    if student.masks and is_kept and config.masks.sparsity is None:
        pattern = student.manifest.details.get("pattern", UNSTRUCTURED)
        manifest.details["pattern"] = pattern
        logger.info("the student is sparse (%s), and what is zero stays zero", pattern)
    elif config.masks.sparsity is not None:
        manifest.details["pattern"] = UNSTRUCTURED
    elif student.masks:
        logger.warning("the student is sparse, and masks.mode=ignore trains every weight: the result has no masks")
    if config.fake_quant.scheme is not None:
        manifest.details["scheme"] = config.fake_quant.scheme.value
    elif student.scales:
        logger.warning("the student is quantised, and training moves its weights off their grid: quantise the result")
    if student.cache_scales:
        logger.warning("the student has scales of its KV cache, which training makes wrong: the result has none")


def _is_finished(output: Path, manifest: Manifest) -> bool:
    """Returns whether the run is finished; an unfinished one of the same settings will be resumed.

    Raises:
        ConfigError: the output holds something else.
    """
    checkpoints = output / "checkpoints"
    known = output if (output / MANIFEST).exists() else checkpoints
    if (known / MANIFEST).exists():
        if changes := _of_run(Manifest.read(known)).changes(manifest):
            raise ConfigError([conflict_message(output, changes)])
        if known is output:
            logger.info("%s is there already with the same inputs: skipped", output)
            return True
    elif output.is_file() or (output.exists() and any(not path.name.startswith(".") for path in output.iterdir())):
        raise ConfigError([f"output = {output} exists and is not a run: choose another or remove it"])
    return False


def _of_run(manifest: Manifest) -> Manifest:
    """Returns the manifest of a run, from that of its checkpoints or its own."""
    return dataclasses.replace(manifest, kind="run")


def _prepare(output: Path, config: DistillConfig, student: Checkpoint, manifest: Manifest) -> None:
    """Makes the run's folder, with everything that describes its checkpoints before there are any."""
    checkpoints = output / "checkpoints"
    if not (checkpoints / MANIFEST).exists():
        # An old checkpoint is kept until the next one is whole, and the best one may not be among the latest.
        count = config.keep_checkpoints + 1 + bool(config.validate_every)
        trained = [student]
        if config.teacher and config.teacher_lr is not None:
            trained.append(Checkpoint(config.teacher))
        num_bytes = count * _BYTES_PER_PARAMETER * sum(num_parameters(checkpoint.network) for checkpoint in trained)
        with writing(checkpoints, dataclasses.replace(manifest, kind="checkpoint"), num_bytes) as folder:
            copy_hf_assets(student.huggingface_folder, folder / HUGGINGFACE)
    write_atomically(output / "config.yaml", to_yaml(config))
