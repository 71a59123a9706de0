"""What the verbs share that work through a checkpoint layer by layer: their inputs, and the checkpoint they write."""

import fnmatch
import logging
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.artifacts.output import begin_parts, is_done
from minitron_megatron.checkpoint.companions import matrices
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.config.calibration import CalibrationConfig
from minitron_megatron.config.compose import to_plain
from minitron_megatron.data.corpus import text_parents
from minitron_megatron.data.samples import Samples, rank_batches, require_tokens, training_samples
from minitron_megatron.data.tokens import prepare_corpus
from minitron_megatron.errors import raise_if_any
from minitron_megatron.model.axes import Param
from minitron_megatron.model.build import build_problems
from minitron_megatron.model.parameters import layer_key
from minitron_megatron.model.positions import warn_of_positions
from minitron_megatron.parallel.collectives import rank0_first
from minitron_megatron.parallel.context import ParallelContext, float32_matmuls, parallel_context
from minitron_megatron.parallel.watchdog import watchdog
from minitron_megatron.sparsity.engine import Calibration, Solver, solve_layers
from minitron_megatron.sparsity.layer_stream import LayerStream
from minitron_megatron.sparsity.solved_layers import SolvedLayers

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """What a verb does to a network.

    Attributes:
        verb: its name.
        title: of the progress bar.
        chosen: matrices that it works on.
        solver: of each of them.
        companions: what the result has beside its matrices.
        cached: scales of what generation caches, which are measured.
        details: of the result's manifest.
        parents: its inputs beside the checkpoint and the text.
        prepare: called with the samples before the first layer, and may add to `details`. Collective.
    """

    verb: str
    title: str
    chosen: Sequence[Param]
    solver: Solver
    companions: Sequence[Param]
    cached: Sequence[Param] = ()
    details: dict[str, Any] = field(default_factory=dict)
    parents: Sequence[Parent] = ()
    prepare: Callable[[Samples, ParallelContext], None] | None = None


def run_layerwise(config: CalibrationConfig, checkpoint: Checkpoint, task: Callable[[], Task]) -> Path:
    """Works through a checkpoint and writes the result.

    Args:
        config: settings of the verb.
        checkpoint: to work on; it is not changed.
        task: returns what to do; it raises what is known before any work.

    Returns:
        folder of the new checkpoint.
    """
    output = Path(config.output)
    raise_if_any(build_problems(checkpoint.network, config.parallel.in_world(config.parallel.data or 1), "checkpoint"))
    todo = task()
    parents = [Parent.of("checkpoint", checkpoint.root), *todo.parents]
    if config.needs_text:
        warn_of_positions(checkpoint.network.max_positions, config.data.sequence_length, "the checkpoint")
        parents += text_parents(config.data.text)
    manifest = Manifest("checkpoint", parents=parents, config=to_plain(config), verb=todo.verb)
    if is_done(output, manifest):
        return output
    with parallel_context(config.parallel) as ctx:
        samples = None
        if config.needs_text:
            corpus = rank0_first(lambda: prepare_corpus(config.data, checkpoint.huggingface_folder))
            samples = training_samples(corpus, config.data, config.num_samples)
            require_tokens(samples, "calibration", config.num_samples)
        work = output.with_name(f".{output.name}.layers")
        rank0_first(lambda: begin_parts(work, manifest))
        solved = solve(config, checkpoint, samples, todo, work, ctx)
        errors = [{name: own["error"] for name, own in report.items()} for report in solved.reports()]
        manifest.details = {**todo.details, "errors": errors}
        hf_assets = checkpoint.huggingface_folder
        # What the checkpoint has beside matrices that stay as they are.
        new = {(own.position, own.name) for own in (*todo.companions, *todo.cached)}
        kept = [own for own in checkpoint.companions.values() if (own.position, own.name) not in new]
        with watchdog(None):
            write_checkpoint(
                output,
                solved,
                checkpoint.dtype,
                manifest,
                hf_assets if hf_assets.is_dir() else None,
                args=checkpoint.megatron_args(),
                companions=[*todo.companions, *todo.cached, *kept],
            )
        rank0_first(lambda: shutil.rmtree(work))
    known = [error for layer in errors for error in layer.values() if error is not None]
    worst = f", outputs changed by at most {100 * max(known):.2f}% (squared)" if known else ""
    logger.info("%s: %d matrices, %s%s", output, len(todo.chosen), todo.title, worst)
    return output


def solve(
    config: CalibrationConfig,
    source: TensorSource,
    samples: Samples | None,
    task: Task,
    work: Path,
    ctx: ParallelContext,
) -> SolvedLayers:
    """Works through the layers of a source. Collective.

    Args:
        config: settings of the verb; those of output and text are not read.
        source: of the weights.
        samples: the calibration set; None if nothing is measured.
        task: what to do.
        work: folder of the solved layers.
        ctx: this rank's place.

    Returns:
        the source with the solved layers laid over it.
    """
    solved, stream, num_batches = SolvedLayers(source, work), None, 0
    if samples is not None:
        count = min(config.num_samples, len(samples))
        num_batches = -(-count // config.micro_batch)
        batches = list(rank_batches(samples, 0, count, config.micro_batch, ctx.data_rank, ctx.layout.replicas))
        num_tokens = sum(batch["tokens"].numel() for batch in batches)
        _warn_of_rank(num_tokens * ctx.layout.replicas, task.chosen)
        states_bytes = num_tokens * source.network.hidden_size * config.dtype.num_bytes
        file = work / f"states_{ctx.data_rank}" if states_bytes > config.states_gb * 1e9 else None
        # Without `sequential` a run that goes on needs the outputs of the layers as they were, too.
        stream = LayerStream(solved if config.sequential else source, batches, ctx, config.dtype, file)
    calibration = Calibration(
        needs_inputs=config.needs_inputs,
        cached=task.cached,
        num_batches=num_batches,
        sequential=config.sequential,
        most_norms=config.most_norms,
        damping=config.damping,
        max_bytes=config.moments_gb * 1e9,
    )
    with float32_matmuls():
        if task.prepare and samples is not None:
            task.prepare(samples, ctx)
        solve_layers(solved, stream, calibration, task.solver, task.chosen, ctx, task.title)
    return solved


def chosen_matrices(checkpoint: Checkpoint, ignore: Sequence[str]) -> list[Param]:
    """Returns the matrices of the layers but those that stay as they are.

    Raises:
        ConfigError: a pattern in `ignore` matches none, or they match all.
    """
    every = list(matrices(checkpoint.network))
    raise_if_any(unmatched(every, ignore, "ignore"))
    chosen = [param for param in every if not any(matches(param, glob) for glob in ignore)]
    raise_if_any([] if chosen else [f"ignore = {list(ignore)} leaves no matrix to work on: name fewer"])
    return chosen


def matches(param: Param, glob: str) -> bool:
    """Returns whether a pattern matches the name of a matrix, that of its own layer."""
    return fnmatch.fnmatchcase(layer_key(param), glob)


def unmatched(params: Sequence[Param], globs: Iterable[str], setting: str) -> list[str]:
    """Returns which patterns of a setting match no matrix, one sentence for each."""
    names = ", ".join(map(layer_key, params[:4]))
    return [
        f"{setting} = {glob} matches no matrix: their names are like {names}"
        for glob in globs
        if not any(matches(param, glob) for param in params)
    ]


def _warn_of_rank(num_tokens: int, chosen: Sequence[Param]) -> None:
    """Warns if there are fewer tokens than a matrix has inputs, so that some directions were never seen."""
    widest = max(chosen, key=lambda param: param.shape[1])
    if num_tokens < widest.shape[1]:
        logger.warning(
            "the calibration set has %d tokens, and %s has %d inputs: raise num_samples or data.sequence_length, for "
            "errors in directions that no token has are not seen",
            num_tokens,
            layer_key(widest),
            widest.shape[1],
        )
