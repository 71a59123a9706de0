"""The verb `launch`: a verb or a recipe becomes jobs of a cluster, or ranks here. Needs no torch."""

import dataclasses
import itertools
import re
import shlex
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from minitron_megatron.artifacts.lease import lease
from minitron_megatron.config.cluster import ClusterConfig, ClusterKind, LaunchConfig
from minitron_megatron.config.compose import as_used, compose, read_settings, resolve_stages, sweep, to_plain
from minitron_megatron.config.reader import near
from minitron_megatron.config.text import as_value
from minitron_megatron.config.verbs import VERBS
from minitron_megatron.disk import convert_os_errors
from minitron_megatron.errors import PREEMPTED, ConfigError, raise_if_any
from minitron_megatron.files import write_atomically, write_json
from minitron_megatron.fit_check import check_fit
from minitron_megatron.launch import slurm
from minitron_megatron.launch.jobs import REPORT, Job, Stages, file_stem, jobs_of, missing_inputs
from minitron_megatron.launch.local import run_ranks
from minitron_megatron.launch.run_folder import (
    FOLDER,
    LOGS,
    RECIPE,
    Launched,
    is_done,
    other_run_problems,
    write_settings,
)
from minitron_megatron.launch.script import render
from minitron_megatron.launch.status import status_table
from minitron_megatron.launch.version import code_version

OWN = ("cluster", "dry_run")
"""Settings of the launch itself; all others, plugins included, are of what is launched."""

LAUNCHED = [verb for verb in VERBS if verb not in ("compare", "inspect")]
"""Verbs that can be launched."""


@dataclass
class Run:
    """One run of a launch.

    Attributes:
        folder: of the run.
        stages: in order; a single verb is one stage.
        recipe: settings of the recipe, if it is one.
    """

    folder: Path
    stages: Stages
    recipe: Any = None


def launch(verb: str, overrides: list[str], multirun: bool = False) -> int:
    """Runs a verb or a recipe where the cluster's settings say.

    Args:
        verb: what to run.
        overrides: of its settings, and of `LaunchConfig`'s.
        multirun: sweep over overrides with several values, a run for each combination.

    Returns:
        exit status.

    Raises:
        ConfigError: a setting is wrong, the layout does not fit the cluster, the folder holds another run, or Slurm
            refuses.
    """
    own, others = _of_launch(overrides)
    config: LaunchConfig = compose("launch", own)
    base, runs = _runs(verb, others, multirun)
    jobs = _jobs(runs, config.cluster)
    launched = Launched(
        jobs, str(Path.cwd()), {}, len(runs) if multirun else None, to_plain(config.cluster), code_version()
    )
    checked = [check_fit(run.stages, jobs, config.cluster, run.recipe) for run in runs]
    raise_if_any(list(dict.fromkeys(problem for _, problems in checked for problem in problems)))
    for line in dict.fromkeys(line for notes, _ in checked for line in notes):
        print(line, file=sys.stderr)
    if config.dry_run:
        print("\n".join(_planned(launched, base, runs, config.cluster)))
        return 0
    if config.cluster.kind is ClusterKind.SLURM:
        slurm.require_slurm()
    raise_if_any([*_partition_problems(config.cluster), *_name_problems(launched, base, config.cluster)])
    raise_if_any(_folder_problems(launched, base, runs))
    if not _waiting(launched, runs):
        print(f"{base} is finished: nothing to do")
        return 0
    with convert_os_errors(base), lease(base):
        raise_if_any(_folder_problems(launched, base, runs))  # what another launch has submitted meanwhile
        _prepare_folders(launched, base, runs)
        if config.cluster.kind is ClusterKind.LOCAL:
            launched.write(base)
            return _run_here(launched, runs)
        _submit(launched, base, _waiting(launched, runs), config.cluster)
    return 0


def _waiting(launched: Launched, runs: list[Run]) -> list[Job]:
    """Returns the jobs that are not done in every run."""
    return [job for job in launched.jobs if not all(is_done(run.folder, job, launched.work_dir) for run in runs)]


def _prepare_folders(launched: Launched, base: Path, runs: list[Run]) -> None:
    """Writes the settings of every job, and removes what earlier attempts left of jobs that are not done."""
    (base / FOLDER).mkdir(parents=True, exist_ok=True)
    (base / LOGS).mkdir(exist_ok=True)
    for run in runs:
        for job in launched.jobs:
            if not is_done(run.folder, job, launched.work_dir):
                for left in ("done", "state", "restarts", "spent"):
                    (run.folder / FOLDER / f"{job.file}.{left}").unlink(missing_ok=True)
        write_settings(run.folder, launched.jobs, run.stages, run.recipe)


def _submit(launched: Launched, base: Path, waiting: list[Job], cluster: ClusterConfig) -> None:
    """Writes all job scripts, and submits those of the jobs that are not done."""
    for file, text in _scripts(launched, base, cluster).items():
        write_atomically(base / FOLDER / f"{file}.sh", text)

    def keep(script: Path, job_id: str) -> None:
        launched.ids[script.stem] = job_id
        launched.write(base)

    scripts = [base / FOLDER / f"{job.file}.sh" for job in waiting]
    slurm.submit_chain(scripts, base / LOGS, launched.num_runs is not None, keep)
    for job in waiting:
        print(f"job {launched.ids[job.file]}: {job.name} on {job.nodes} x {job.ranks_per_node} ranks")
    print(f"see how far it is: minitron launch status {shlex.quote(str(base))}")


def status(run_dir: str) -> int:
    """Prints the progress of each stage of a launched run."""
    Console().print(status_table(Path(run_dir)))
    return 0


def cancel(run_dir: str) -> int:
    """Cancels all jobs of a launched run that are not over."""
    launched = Launched.read(Path(run_dir))
    slurm.cancel(list(launched.ids.values()))
    launched.cancelled = True
    launched.write(Path(run_dir))
    return 0


def report(run_dir: str) -> int:
    """Writes the report of a launched recipe, from the stages that are done."""
    from minitron_megatron.recipe import SECONDS, finish

    recipe = read_settings("compress", Path(run_dir) / RECIPE)
    stages = resolve_stages(recipe)
    done = {name: Path(run_dir) / FOLDER / f"{file_stem(n, name)}.done" for n, name in enumerate(stages, start=1)}
    seconds = {}
    for name, path in done.items():
        with suppress(OSError, ValueError):  # a stage that is not done, or a file that a full disk left empty
            seconds[name] = float(path.read_text())
    with lease(Path(run_dir)):
        write_json(Path(run_dir) / SECONDS, seconds)
        finish(recipe, stages)
    return 0


ACTIONS = {"status": status, "cancel": cancel, REPORT: report}
"""Commands on the folder of a launched run."""


def command(arguments: list[str], multirun: bool, show: bool) -> int:
    """Runs `minitron launch [VERB] key=value ...`, or `minitron launch ACTION RUN`.

    Args:
        arguments: of the command line.
        multirun: see `launch`.
        show: only print the resolved settings.

    Raises:
        ConfigError: see `launch`; or the verb or action does not exist.
    """
    words = list(itertools.takewhile(lambda argument: "=" not in argument, arguments))
    if words and words[0] in ACTIONS:
        if len(arguments) != 2 or multirun or show:
            raise ConfigError([f"launch {words[0]} takes the folder of a run and nothing else"])
        return ACTIONS[words[0]](arguments[1])
    verb = words[0] if words else "compress"
    if verb not in LAUNCHED or len(words) > 1:
        known = [*LAUNCHED, *ACTIONS]
        raise ConfigError(
            [
                f"launch {' '.join(words)}: give one verb, or one of {', '.join(ACTIONS)} and a folder; "
                f"{near(verb, known)}"
            ]
        )
    overrides = arguments[len(words) :]
    if show:
        own, others = _of_launch(overrides)
        combinations = sweep(others) if multirun else [others]
        shown = [compose("launch", own), *(compose(verb, given) for given in combinations)]
        print("---\n".join(map(as_used, shown)), end="")
        return 0
    return launch(verb, overrides, multirun)


def _of_launch(overrides: list[str]) -> tuple[list[str], list[str]]:
    """Separates the overrides of the launch from those of what is launched."""
    own = [override for override in overrides if re.match(rf"\+*({'|'.join(OWN)})\b", override)]
    others = [override for override in overrides if override not in own]
    return [*own, *(override for override in others if re.match(r"\+*plugins\b", override))], others


def _runs(verb: str, overrides: list[str], multirun: bool) -> tuple[Path, list[Run]]:
    """Returns the folder of the launch, and every run; a single run has the same folder."""
    if not multirun:
        run = _run(verb, overrides)
        return run.folder, [run]
    combinations = sweep(overrides)
    settings = compose(verb, combinations[0])
    base = Path(settings.run_dir if verb == "compress" else settings.output).absolute()
    runs = []
    for number, given in enumerate(combinations):
        folder = base / str(number)
        place = f"run_dir={as_value(str(folder))}" if verb == "compress" else f"output={as_value(str(folder / verb))}"
        runs.append(dataclasses.replace(_run(verb, [*given, place]), folder=folder))
    return base, runs


def _run(verb: str, overrides: list[str]) -> Run:
    """Returns one run. That of a single verb has its folder beside the verb's output."""
    settings = compose(verb, overrides)
    if verb == "compress":
        stages = resolve_stages(settings)
        raise_if_any(missing_inputs(stages, settings.run_dir))
        return Run(Path(settings.run_dir).absolute(), stages, settings)
    output = Path(settings.output).absolute()
    return Run(output.with_name(f"{output.name}.launch"), {verb: (verb, settings)})


def _jobs(runs: list[Run], cluster: ClusterConfig) -> list[Job]:
    """Returns the jobs that every run has.

    Raises:
        ConfigError: see `jobs_of`; or the runs of a sweep need jobs of different sizes.
    """
    if cluster.kind is ClusterKind.LOCAL:
        cluster = dataclasses.replace(cluster, nodes=None, ranks_per_node=sys.maxsize)
    jobs, *others = [jobs_of(run.stages, cluster, run.recipe is not None) for run in runs]
    if any(other != jobs for other in others):
        raise ConfigError(["the runs of a sweep must have the same stages on as many ranks: launch them one by one"])
    return jobs


def _scripts(launched: Launched, base: Path, cluster: ClusterConfig) -> dict[str, str]:
    """Renders the batch script of every job, by the stem of its file."""
    own = "python" if cluster.venv else "python3" if cluster.container.image else sys.executable
    python, digest = cluster.python or own, launched.code["digest"]
    return {
        job.file: render(job, cluster, base, Path(launched.work_dir), python, digest, launched.num_runs)
        for job in launched.jobs
    }


def _command(run: Path, job: Job) -> list[str]:
    """Returns the arguments of `minitron` for a job."""
    if job.verb == REPORT:
        return ["launch", REPORT, str(run)]
    return [job.verb, "--config", str(run / FOLDER / f"{job.file}.yaml")]


def _planned(launched: Launched, base: Path, runs: list[Run], cluster: ClusterConfig) -> list[str]:
    """Returns the scripts that would be submitted, or the commands that would be run here."""
    if cluster.kind is ClusterKind.SLURM:
        return list(_scripts(launched, base, cluster).values())
    return [
        f"{shlex.join(['minitron', *_command(run.folder, job)])}  # {job.ranks} rank(s)"
        for run in runs
        for job in launched.jobs
    ]


def _run_here(launched: Launched, runs: list[Run]) -> int:
    """Runs all jobs of all runs on this machine, one after another, until one fails."""
    for run in runs:
        for job in launched.jobs:
            if is_done(run.folder, job, launched.work_dir):
                continue
            state = run.folder / FOLDER / f"{job.file}.state"
            write_atomically(state, "running - 0\n")
            started = time.perf_counter()
            if status := run_ranks(job.ranks, _command(run.folder, job)):
                write_atomically(state, f"{'stopped' if status == PREEMPTED else 'failed'} - 0\n")
                return status
            write_atomically(state.with_suffix(".done"), f"{time.perf_counter() - started:.0f}\n")
    return 0


def _partition_problems(cluster: ClusterConfig) -> list[str]:
    names = {"partition": cluster.partition, "cpu_partition": cluster.cpu_partition}
    if cluster.kind is ClusterKind.LOCAL or not any(names.values()):
        return []
    known = slurm.known_partitions()
    return [
        f"cluster.{name} = {value}: there is no such partition; {near(value, sorted(known))}"
        for name, value in names.items()
        if value and known and not set(value.split(",")) <= known
    ]


def _name_problems(launched: Launched, base: Path, cluster: ClusterConfig) -> list[str]:
    """Returns a problem for each folder whose name Slurm or pyxis would misread."""
    if cluster.kind is ClusterKind.LOCAL:
        return []
    taken = [(base, "%\\", "Slurm, which replaces it in the names of logs")]
    if cluster.container.image:
        taken += [(folder, ":,", "the list of a container's mounts") for folder in (base, Path(launched.work_dir))]
    return [
        f"{folder} has {character!r} in it, which is special to {whom}: choose another folder"
        for folder, characters, whom in taken
        for character in characters
        if character in str(folder)
    ]


def _folder_problems(launched: Launched, base: Path, runs: list[Run]) -> list[str]:
    """Returns a problem if the folders hold another run, or one that is still in the queue."""
    problems = [p for run in runs for p in other_run_problems(run.folder, launched.jobs, run.stages)]
    if (base / FOLDER / "launch.json").is_file():
        before = Launched.read(base)
        if before.num_runs != launched.num_runs:
            problems.append(
                f"{base} holds {'a single run' if before.num_runs is None else 'a sweep'}: choose another folder"
            )
        known = slurm.states(list(before.ids.values()))
        if active := [job for job, states in known.items() if any(state in slurm.ACTIVE for state, _ in states)]:
            problems.append(
                f"{base} is in the queue already, as jobs {', '.join(active)}: wait for them, or end them with "
                f"`minitron launch cancel {shlex.quote(str(base))}`"
            )
    return problems
