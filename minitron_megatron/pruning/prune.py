"""The verb `prune`: a checkpoint, its scores and a target shape become a smaller checkpoint."""

import logging
from pathlib import Path

from minitron_megatron.checkpoint.manifest import Manifest, Parent, is_done
from minitron_megatron.checkpoint.sharded import Checkpoint
from minitron_megatron.checkpoint.writer import write_checkpoint
from minitron_megatron.config.compose import to_plain
from minitron_megatron.config.schema import PruneConfig
from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.shape import layout_problems
from minitron_megatron.pruning.plan import make_plan, target_shape
from minitron_megatron.pruning.scores import Scores
from minitron_megatron.pruning.slicing import Pruned

logger = logging.getLogger(__name__)


def prune(config: PruneConfig) -> Path:
    """Cut a checkpoint to a target shape, chunk by chunk on disk.

    Returns:
        folder of the smaller checkpoint. It also holds the plan.

    Raises:
        CheckpointError: an input is not whole, or the scores are of another network.
        ConfigError: the target is larger than the source, or does not divide by the layout it is meant for.
    """
    checkpoint, output = Checkpoint(config.checkpoint), Path(config.output)
    scores = Scores.read(Path(config.scores))
    if scores.shape != checkpoint.shape:
        raise CheckpointError(
            f"scores = {config.scores} are of another network than checkpoint = {config.checkpoint}: "
            f"score that checkpoint first"
        )
    target = target_shape(checkpoint.shape, config.target)
    raise_if_any(layout_problems(target, config.parallel, "target"))

    parents = [Parent.of("checkpoint", checkpoint.root), Parent.of("scores", Path(config.scores))]
    manifest = Manifest("checkpoint", parents=parents, config=to_plain(config))
    if is_done(output, manifest):
        return output
    plan = make_plan(scores, target)
    before, after = num_parameters(checkpoint.shape), num_parameters(target)
    manifest.details = {"parameters": after, "parameters_before": before}
    companions = checkpoint.huggingface_folder
    write_checkpoint(
        output,
        Pruned(checkpoint, plan),
        checkpoint.dtype,
        manifest,
        companions if companions.is_dir() else None,
        files=plan.write,
        tensor_ranks=config.parallel.tensor,
        args=checkpoint.megatron_args(),
    )
    logger.info("pruned %.1fM to %.1fM parameters", before / 1e6, after / 1e6)
    return output
