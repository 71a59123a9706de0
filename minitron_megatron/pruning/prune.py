"""The verb `prune`: cuts a checkpoint by a plan, given or made from scores."""

import itertools
import logging
from pathlib import Path

from minitron_megatron.artifacts.lease import sole_writer
from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.artifacts.output import is_done
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.config.compose import to_plain
from minitron_megatron.config.schema import PruneConfig
from minitron_megatron.errors import CheckpointError, raise_if_any
from minitron_megatron.model.build import build_problems
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.network import Network
from minitron_megatron.parallel.workers import join_workers
from minitron_megatron.pruning.make_plan import plan_for
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.plan_summary import show_plan
from minitron_megatron.pruning.scores import Scores
from minitron_megatron.pruning.slicing import write_pruned
from minitron_megatron.pruning.target import in_terms_of_target, resolve_target

logger = logging.getLogger(__name__)


@sole_writer
def prune(config: PruneConfig) -> Path:
    """Prunes a checkpoint to a target shape, chunk by chunk on disk.

    Returns:
        folder of the pruned checkpoint, which includes the plan; for a dry run, the plan file.

    Raises:
        CheckpointError: an input is not whole, or scores or plan are of another checkpoint.
        ConfigError: no plan can reach the target, the target does not divide by its layout, or Megatron-Core has no
            model class for the result.
    """
    checkpoint, output = Checkpoint(config.checkpoint), Path(config.output)
    parents = [Parent.of("checkpoint", checkpoint.root)]
    scores, rounded = None, []
    if config.scores is not None:
        scores = Scores.read(Path(config.scores))
        _require_same(
            "scores", config.scores, scores.network, scores.checkpoint, checkpoint, parents[0], "score that checkpoint"
        )
        parents.append(Parent.of("scores", Path(config.scores)))
    if config.plan is not None:
        path = Path(config.plan)
        plan = Plan.read(path)
        _require_same("plan", config.plan, plan.source, plan.checkpoint, checkpoint, parents[0], "make a plan for it")
        parents.append(Parent.of("plan", path))
        settings = to_plain(config)
    else:
        assert scores is not None  # otherwise `PruneConfig.problems` reports it
        target = resolve_target(checkpoint.network, config.target, config.parallel)
        rounded = target.rounded
        plan = plan_for(scores, target, config.depth_criterion, config.merge_heads)
        # As numbers, because another layout may round the same fraction differently.
        settings = to_plain(config) | {"target": target.sizes}
    network = plan.target
    problems = build_problems(network, config.parallel, "plan" if config.plan else "target")
    problems = [in_terms_of_target(problem, network, config.target) for problem in problems]
    for sentence in rounded:
        logger.info(sentence)

    if config.dry_run:
        file = output.with_name(f"{output.name}.plan.json")
        with join_workers() as workers:
            workers.run_on_main(lambda: _show(plan, scores, problems, file))
        return file
    raise_if_any(problems)
    manifest = Manifest("checkpoint", parents=parents, config=settings, verb="prune")
    if is_done(output, manifest):
        return output
    before, after = num_parameters(checkpoint.network), num_parameters(network)
    manifest.details = {"parameters": after, "parameters_before": before, "rounded": rounded}
    write_pruned(output, checkpoint, plan, manifest, config.parallel.tensor)
    logger.info("pruned %.1fM to %.1fM parameters", before / 1e6, after / 1e6)
    return output


def _show(plan: Plan, scores: Scores | None, problems: list[str], file: Path) -> None:
    """Prints the plan and writes it to a file: a dry run."""
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and file.read_text() != plan.text:
        _set_aside(file)
    plan.write_file(file)
    show_plan(plan, scores)
    for problem in problems:
        logger.warning("this plan could not be carried out: %s", problem)
    logger.info("nothing was pruned; the plan is in %s, to be changed and given as plan=%s", file, file)


def _set_aside(file: Path) -> None:
    """Renames a plan that may have been edited by hand to the first free name."""
    names = (file.with_suffix(f".{number}.json") for number in itertools.count(1))
    aside = next(path for path in names if not path.exists())
    file.rename(aside)
    logger.info("another plan was in %s; it is now %s", file, aside)


def _require_same(
    role: str,
    given: str,
    network: Network,
    fingerprint: str | None,
    checkpoint: Checkpoint,
    parent: Parent,
    fix: str,
) -> None:
    """Checks that scores or a plan are of the checkpoint."""
    if network != checkpoint.network:
        why = "another network"
    elif fingerprint is not None and not parent.matches(fingerprint):
        why = "another checkpoint"
    else:
        return
    raise CheckpointError(f"{role} = {given} is of {why} than checkpoint = {checkpoint.root}: {fix} first")
