"""The files of `minitron launch` in a run's folder: the list of jobs, and settings and script of each.

`launch/launch.json` names the jobs; `launch/NN_STAGE.yaml` holds the settings of a stage, every value resolved, and
`launch/NN_STAGE.sh` its script. Jobs leave `NN_STAGE.state` and, at the end, `NN_STAGE.done`. The runs of a sweep have
folders of their own below, by number, with all of these but the scripts and `launch.json`.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from minitron_megatron.config.changes import content, differences
from minitron_megatron.config.compose import to_plain, to_yaml
from minitron_megatron.config.reader import show
from minitron_megatron.config.schema import SCHEMAS
from minitron_megatron.errors import ConfigError
from minitron_megatron.files import write_atomically, write_json
from minitron_megatron.launch.jobs import REPORT, Job, Stages

FOLDER = "launch"
RECIPE = "config.yaml"
LOGS = "logs"


@dataclass
class Launched:
    """A launch, as recorded in its folder.

    Attributes:
        jobs: in order.
        work_dir: base of relative paths in the settings.
        ids: Slurm's id of each submitted job, by the job's file; jobs that were done before have none.
        num_runs: number of runs of a sweep; None for a single run.
        cluster: its settings, as plain values.
        code: see `version.code_version`.
        cancelled: whether the chain was cancelled.
    """

    jobs: list[Job]
    work_dir: str
    ids: dict[str, str] = field(default_factory=dict)
    num_runs: int | None = None
    cluster: dict = field(default_factory=dict)
    code: dict = field(default_factory=dict)
    cancelled: bool = False

    @classmethod
    def read(cls, run_dir: Path) -> "Launched":
        """Reads what was launched into `run_dir`.

        Raises:
            ConfigError: nothing was.
        """
        path = run_dir / FOLDER / "launch.json"
        if not path.is_file():
            raise ConfigError([f"{run_dir} is not the folder of a launched run: it has no {FOLDER}/{path.name}"])
        try:
            values = json.loads(path.read_text())
            return cls(**{**values, "jobs": [Job(**job) for job in values["jobs"]]})
        except (ValueError, TypeError, KeyError) as error:
            raise ConfigError([f"{path} is damaged ({error}): remove it and launch the run again"]) from error

    def write(self, run_dir: Path) -> None:
        write_json(run_dir / FOLDER / "launch.json", asdict(self))

    def runs(self, run_dir: Path) -> list[Path]:
        """Returns the folder of each run."""
        return [run_dir] if self.num_runs is None else [run_dir / str(number) for number in range(self.num_runs)]


def other_run_problems(run: Path, jobs: list[Job], stages: Stages) -> list[str]:
    """Returns a problem if `run` holds something other than these stages, judging by their settings.

    Only settings that affect the result count, and only of stages that have an output.
    """
    if run.is_dir() and any(run.iterdir()) and not (run / FOLDER).is_dir() and not (run / RECIPE).is_file():
        return [f"{run} exists and is not a run: choose another folder"]
    problems = []
    for job, (verb, settings) in zip(jobs, stages.values(), strict=False):
        path = run / FOLDER / f"{job.file}.yaml"
        if path.is_file() and Path(settings.output).exists():
            before, now = yaml.safe_load(path.read_text()), to_plain(settings)
            changed = differences(content(SCHEMAS[verb], before), content(SCHEMAS[verb], now))
            if changes := [f"{verb}.{name} was {show(old)} and is {show(new)}" for name, old, new in changed]:
                problems.append(
                    f"{run} holds another run: in its stage {job.name} {'; '.join(changes)}. Choose another folder, or "
                    f"remove {settings.output}"
                )
    return problems


def write_settings(run: Path, jobs: list[Job], stages: Stages, recipe: Any) -> None:
    """Writes the settings that the jobs of one run read."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    (run / LOGS).mkdir(exist_ok=True)
    for job, (_, settings) in zip(jobs, stages.values(), strict=False):
        write_atomically(folder / f"{job.file}.yaml", to_yaml(settings))
        # The script finds the job's output by this link.
        made = folder / f"{job.file}.output"
        made.unlink(missing_ok=True)
        made.symlink_to(Path(settings.output).absolute())
    if recipe is not None:
        write_atomically(run / RECIPE, to_yaml(recipe))


def read_stage(run: Path, job: Job, work_dir: str) -> tuple[dict, Path] | None:
    """Returns the settings of a job's stage and its output folder; None if it has no stage, or none yet."""
    path = run / FOLDER / f"{job.file}.yaml"
    if not path.is_file():
        return None
    settings = yaml.safe_load(path.read_text())
    return settings, Path(work_dir) / settings["output"]


def is_done(run: Path, job: Job, work_dir: str) -> bool:
    """Returns whether a job has succeeded and its output is still there."""
    stage = read_stage(run, job, work_dir)
    made = job.verb == REPORT or (stage is not None and (stage[1] / "manifest.json").is_file())
    return made and (run / FOLDER / f"{job.file}.done").is_file()
