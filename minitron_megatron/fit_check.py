"""Checks before a launch whether the training stages fit their GPUs, and estimates their cost."""

import json
from collections.abc import Sequence
from pathlib import Path

from minitron_megatron.artifacts.manifest import CACHE, Manifest
from minitron_megatron.config.cluster import ClusterConfig
from minitron_megatron.config.reader import show
from minitron_megatron.config.schema import CompressConfig, DistillConfig
from minitron_megatron.config.teachers import TeacherConfig
from minitron_megatron.distillation.memory import GIB, estimate_memory
from minitron_megatron.distillation.nearest_layout import nearest_layout
from minitron_megatron.distillation.step_time import estimate_step
from minitron_megatron.launch.jobs import Job, Stages
from minitron_megatron.model.count import num_parameters
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.network import Network, layout_problems
from minitron_megatron.parallel.gpus import GPU, GPUS
from minitron_megatron.pruning.target import resolve_target

Networks = dict[str, Network]
"""Known networks by folder."""


def check_fit(
    stages: Stages, jobs: list[Job], cluster: ClusterConfig, recipe: CompressConfig | None
) -> tuple[list[str], list[str]]:
    """Checks whether every training stage fits its GPUs, and estimates time and cost.

    Args:
        stages: by name.
        jobs: with the ranks of each stage.
        cluster: with the GPU model; null checks nothing.
        recipe: of the stages, if any; its `architecture` replaces a source that cannot be read here.

    Returns:
        notes for the user, and the problems of stages that do not fit.

    Raises:
        UserError: a network is not supported, or cannot be pruned to the target.
    """
    if cluster.gpu is None:
        return [], []
    if cluster.gpu not in GPUS:
        return [], [f"cluster.gpu = {cluster.gpu!r} is not known: choose one of {', '.join(GPUS)}, or null"]
    notes, problems = [], []
    networks = networks_of(stages, recipe)
    for job in jobs:
        if job.verb == "distill":
            job_notes, job_problems = _check_job(job, stages, cluster, GPUS[cluster.gpu], networks)
            notes += job_notes
            problems += job_problems
    return notes, problems


def _check_job(
    job: Job, stages: Stages, cluster: ClusterConfig, gpu: GPU, networks: Networks
) -> tuple[list[str], list[str]]:
    """Estimates memory, time and cost of a training stage.

    Returns:
        notes for the user, and its problems.
    """
    settings: DistillConfig = stages[job.name][1]
    live = [own for own in settings.all_teachers.values() if not _is_cache(own.teacher, stages)]
    if unknown := [folder for folder in (settings.student, *(own.teacher for own in live)) if folder not in networks]:
        return [f"{job.name}: not checked whether it fits, for {' and '.join(unknown)} cannot be read here"], []
    student, teachers = networks[settings.student], _largest_at_once(live, networks)
    layout = settings.parallel.in_world(job.ranks)
    if problems := [p for n in (student, *teachers) for p in layout_problems(n, layout, job.name)]:
        return [], problems
    memory = estimate_memory(student, teachers, settings, layout)
    if not memory.fits(gpu):
        nearest = nearest_layout(student, teachers, settings, layout, gpu, cluster.ranks_per_node)
        fix = "no layout does"
        if nearest:
            changes = " ".join(f"{name}={show(value)}" for name, value in nearest[0].items())
            fix = f"it fits with {changes} ({nearest[1].total / GIB:.1f} GiB)"
        return [], [
            f"stages.{job.name} needs about {memory.total / GIB:.0f} GiB on every GPU, and cluster.gpu = {cluster.gpu} "
            f"has {gpu.memory_gib}: {fix}; cluster.gpu=null launches without looking"
        ]
    step = estimate_step(student, teachers, settings, layout, gpu, price=cluster.gpu_hour_price)
    cost = "" if step.cost is None else f", which cost {step.cost:,.0f}"
    notes = [
        f"{job.name}: about {memory.total / GIB:.1f} of {gpu.memory_gib} GiB on each of {job.ranks} {cluster.gpu}, "
        f"{step.seconds:.1f} s a step, {step.gpu_hours:,.0f} GPU-hours{cost}"
    ]
    if step.seconds >= cluster.signal_s:
        notes.append(
            f"{job.name}: told cluster.signal_s = {cluster.signal_s} s before its end, a rank may have no time "
            f"to end a step and save: set it to more than {step.seconds:.0f} s and those of a save"
        )
    return notes, []


def networks_of(stages: Stages, recipe: CompressConfig | None) -> Networks:
    """Returns the networks that stages read and write, as far as they are known before any stage has run."""
    networks: Networks = {}
    for verb, settings in stages.values():
        if verb == "import":
            path = Path(settings.source) / "config.json"
            config = json.loads(path.read_text()) if path.is_file() else recipe and recipe.architecture
            if config:
                networks[settings.output] = network_from_config(config, settings.max_positions)
        elif verb == "prune":
            source = _known(settings.checkpoint, networks)
            if source and settings.plan is None:
                target = resolve_target(source, settings.target, settings.parallel)
                if left := target.network_of(source):
                    networks[settings.output] = left
        elif verb in ("sparsify", "quantize"):
            if source := _known(settings.checkpoint, networks):
                networks[settings.output] = source
        elif verb == "distill":
            for folder in (settings.student, *(own.teacher for own in settings.all_teachers.values())):
                _known(folder, networks)
            if settings.student in networks:
                networks[settings.output] = networks[settings.student]
    return networks


def _largest_at_once(teachers: Sequence[TeacherConfig], networks: Networks) -> list[Network]:
    """Returns the networks of those that teach at the same time, when they have the most parameters."""
    at_once = [[networks[own.teacher] for own in teachers if own.teaches_at(begins.first_step)] for begins in teachers]
    return max(at_once, key=lambda some: sum(map(num_parameters, some)), default=[])


def _is_cache(teacher: str, stages: Stages) -> bool:
    """Returns whether a teacher is a cache of predictions, that is there or that a stage makes: it takes no memory."""
    made = any(verb == "cache" and settings.output == teacher for verb, settings in stages.values())
    return made or Manifest.is_of_kind(CACHE, Path(teacher))


def _known(folder: str, networks: Networks) -> Network | None:
    """Returns the network of a folder that a stage writes, or that has a manifest."""
    for manifest in (Path(folder) / "manifest.json", Path(folder) / "checkpoints" / "manifest.json"):
        if folder not in networks and manifest.is_file():
            values = json.loads(manifest.read_text())
            if network := values.get("network") or values.get("shape"):  # as earlier versions called it
                networks[folder] = Network.from_dict(network)
    return networks.get(folder)
