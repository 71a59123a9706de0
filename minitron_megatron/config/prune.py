"""The settings of `minitron prune`."""

from dataclasses import dataclass, field

from minitron_megatron.config.checks import at_least
from minitron_megatron.config.fields import SAME_RESULT
from minitron_megatron.config.parallel import TargetParallelConfig
from minitron_megatron.config.plugins import PluginConfig
from minitron_megatron.config.score import DepthCriterion
from minitron_megatron.config.target import TargetConfig


@dataclass
class PruneConfig(PluginConfig):
    """`minitron prune`: cut a checkpoint to a target shape by its scores.

    Attributes:
        checkpoint: checkpoint to prune; it is not changed.
        output: folder of the checkpoint to write.
        scores: folder of the scores; with a target, or with a plan and dry_run to show the share of scores it keeps.
        plan: a plan instead of scores and target: `plan.json` from a pruned checkpoint or a dry run, possibly edited.
        target: shape to prune to.
        depth_criterion: scored criterion to choose layers by; null for the first.
        merge_heads: merge the first dropped heads into the last kept ones (2407.14679, section 2.3).
        dry_run: show what would be pruned, and write only the plan, to `OUTPUT.plan.json`.
        parallel: layout in which the result will be trained; the target must divide by it.
        workers: processes that share the work, unless torchrun or srun started some.
    """

    checkpoint: str = "???"
    output: str = field(default="???", metadata=SAME_RESULT)
    scores: str | None = None
    plan: str | None = None
    target: TargetConfig = field(default_factory=TargetConfig)
    depth_criterion: DepthCriterion | None = None
    merge_heads: bool = False
    dry_run: bool = field(default=False, metadata=SAME_RESULT)
    parallel: TargetParallelConfig = field(default_factory=TargetParallelConfig, metadata=SAME_RESULT)
    workers: int = field(default=1, metadata=SAME_RESULT)

    def problems(self, where: str = "") -> list[str]:
        problems = at_least(where, "workers", self.workers, 1)
        problems += [*self.target.problems(f"{where}target."), *self.parallel.problems(f"{where}parallel.")]
        if self.depth_criterion and self.target.keep_layers is not None:
            problems.append(
                f"{where}depth_criterion = {self.depth_criterion.value} chooses layers, and {where}target.keep_layers "
                f"names them: leave one out"
            )
        if self.plan is None:
            if self.scores is None:
                problems.append(
                    f"{where}scores is missing: give {where}scores=FOLDER and {where}target, or {where}plan"
                )
            if self.target.is_empty:
                problems.append(f"{where}target changes nothing: set at least one of its sizes")
        else:
            given = {
                "scores": self.scores is not None and not self.dry_run,
                "target": not self.target.is_empty,
                "depth_criterion": self.depth_criterion is not None,
                "merge_heads": self.merge_heads,
            }
            if names := [f"{where}{name}" for name, is_given in given.items() if is_given]:
                problems.append(
                    f"{where}plan = {self.plan} already says what stays: leave out {' and '.join(names)}; "
                    f"a dry run may have {where}scores beside it"
                )
        return problems
