"""The jobs of a recipe on a cluster: one per stage, with the ranks that it needs."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any

from minitron_megatron.config.cluster import ClusterConfig
from minitron_megatron.config.verbs import DISTRIBUTED
from minitron_megatron.errors import raise_if_any
from minitron_megatron.launch.world import ranks_to_start, required_ranks

Stages = dict[str, tuple[str, Any]]
"""Verb and settings object of each stage, by name."""

REPORT = "report"
"""Verb of the last job of a recipe, which writes the report."""


@dataclass(frozen=True)
class Job:
    """The job of one stage.

    Attributes:
        name: of the stage.
        file: stem of the job's files in the run's folder.
        verb: what it runs; `REPORT` for the end of a recipe.
        nodes: number of nodes.
        ranks_per_node: ranks on each node.
        gpus_per_node: GPUs on each node.
    """

    name: str
    file: str
    verb: str
    nodes: int = 1
    ranks_per_node: int = 1
    gpus_per_node: int = 0

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node


def jobs_of(stages: Stages, cluster: ClusterConfig, with_report: bool) -> list[Job]:
    """Returns a job for every stage, in order, and one for the report of a recipe.

    A stage on several ranks fills its nodes, or takes part of a single node.

    Raises:
        ConfigError: a layout does not fit the cluster.
    """
    jobs, problems = [], []
    for number, (name, (verb, settings)) in enumerate(stages.items(), start=1):
        file = file_stem(number, name)
        ranks = ranks_of(verb, settings, cluster)
        # More ranks have to fill whole nodes.
        per_node = min(ranks, cluster.ranks_per_node)
        if ranks % per_node:
            problems.append(
                f"stages.{name} needs {ranks} ranks, which do not fill nodes of cluster.ranks_per_node = {per_node}: "
                f"change the layout, or set cluster.ranks_per_node to a divisor of {ranks}"
            )
        if verb == "distill":
            problems += settings.batch_problems(ranks // required_ranks(settings.parallel), f"stages.{name}.")
        gpus = min(per_node, cluster.gpus) if verb in DISTRIBUTED else 0
        jobs.append(Job(name, file, verb, ranks // per_node, per_node, gpus))
    of_ranks = [job for job in jobs if job.verb in DISTRIBUTED]
    if cluster.nodes and of_ranks and all(job.nodes != cluster.nodes for job in of_ranks):
        needs = ", ".join(f"{job.name} {job.ranks}" for job in of_ranks)
        problems.append(
            f"cluster.nodes = {cluster.nodes} are {cluster.nodes * cluster.ranks_per_node} ranks, and the layouts need "
            f"others ({needs}): set parallel.data to null or to fill them, or cluster.nodes to null"
        )
    raise_if_any(problems)
    return [*jobs, Job(REPORT, file_stem(len(jobs) + 1, REPORT), REPORT)] if with_report else jobs


def missing_inputs(stages: Stages, run_dir: str) -> list[str]:
    """Returns a problem for each setting that names a place in the run's folder which is not there and no earlier stage
    makes.

    Args:
        stages: in order.
        run_dir: the run's folder, as it is written in front of such a place.
    """
    problems = []
    made: list[Path] = []
    for name, (_, settings) in stages.items():
        for field, value in _named_values(settings):
            # Only what begins like the folder is meant as a place in it: a prompt is text as well.
            if field == "output" or not isinstance(value, str) or not value.startswith(f"{run_dir}/"):
                continue
            path = Path(value)
            if not path.exists() and not any(output in (path, *path.parents) for output in made):
                problems.append(
                    f"stages.{name}.{field} = {value} is not there, and no earlier stage makes it: name another, or "
                    f"leave the stage out with stages.{name}=null"
                )
        made.append(Path(settings.output))
    return problems


def _named_values(settings: Any) -> Iterator[tuple[str, Any]]:
    """Yields settings by name, with those of sections by names that the user has chosen."""
    for field, value in vars(settings).items():
        yield field, value
        for name, section in value.items() if isinstance(value, dict) else ():
            for own, inner in vars(section).items() if is_dataclass(section) else ():
                yield f"{field}.{name}.{own}", inner


def file_stem(number: int, name: str) -> str:
    """Returns the stem of a stage's files, from its place in the order."""
    return f"{number:02d}_{re.sub(r'[^A-Za-z0-9_-]+', '_', name)}"


def ranks_of(verb: str, settings: Any, cluster: ClusterConfig) -> int:
    """Returns the number of ranks of a stage: that of its layout, or all of cluster.nodes if parallel.data is null."""
    if verb in DISTRIBUTED and settings.parallel.data is None and cluster.nodes:
        model = settings.parallel.model_ranks
        return max(1, cluster.nodes * cluster.ranks_per_node // model) * model
    return ranks_to_start(verb, settings)
