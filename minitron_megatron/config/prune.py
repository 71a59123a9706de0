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
    """`minitron prune`: a checkpoint, its scores and a target shape become a smaller checkpoint.

    Attributes:
        checkpoint: folder of the checkpoint to prune; it is only read.
        output: folder of the checkpoint to write.
        scores: folder of the scores; with a target, or with a plan whose dry run shall show how much of them stays.
        plan: instead of scores and target, a plan: `plan.json`, as written beside a pruned checkpoint or by a
            dry run, and perhaps edited.
        target: the shape to reach.
        depth_criterion: by which of the scored criteria layers are chosen; null for the first.
        merge_heads: add to the last kept heads what they differ by from the first dropped ones (2407.14679, 2.3).
        dry_run: show what would be done, and write the plan alone, to `OUTPUT.plan.json`.
        parallel: the layout the result will be trained in; the target must divide by it.
        workers: processes that share the work, unless torchrun or srun has started some.
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
        found = at_least(where, "workers", self.workers, 1)
        found += [*self.target.problems(f"{where}target."), *self.parallel.problems(f"{where}parallel.")]
        if self.depth_criterion and self.target.keep_layers is not None:
            found.append(
                f"{where}depth_criterion = {self.depth_criterion.value} chooses layers, and {where}target.keep_layers "
                f"names them: leave one out"
            )
        if self.plan is None:
            if self.scores is None:
                found.append(f"{where}scores is missing: give {where}scores=FOLDER and {where}target, or {where}plan")
            if self.target.is_empty:
                found.append(f"{where}target changes nothing: set at least one of its sizes")
        else:
            given = {
                "scores": self.scores is not None and not self.dry_run,
                "target": not self.target.is_empty,
                "depth_criterion": self.depth_criterion is not None,
                "merge_heads": self.merge_heads,
            }
            if names := [f"{where}{name}" for name, is_given in given.items() if is_given]:
                found.append(
                    f"{where}plan = {self.plan} says already what stays: leave out {' and '.join(names)}; "
                    f"a dry run may have {where}scores beside it"
                )
        return found
