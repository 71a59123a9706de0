"""Status of the jobs of a run: from Slurm, the job's own files, and the last line of its metrics."""

import json
from collections import Counter
from datetime import timedelta
from pathlib import Path

from rich.table import Table

from minitron_megatron.launch import slurm
from minitron_megatron.launch.jobs import Job
from minitron_megatron.launch.run_folder import FOLDER, Launched, is_done, read_stage


def status_table(run_dir: Path) -> Table:
    """Returns a row per stage, and per run of a sweep: state, restarts, step, loss and remaining time.

    Raises:
        ConfigError: nothing was launched into `run_dir`.
    """
    launched = Launched.read(run_dir)
    in_slurm = slurm.states(list(launched.ids.values()))
    table = Table(title=str(run_dir), title_justify="left")
    runs = launched.runs(run_dir)
    columns = ["stage", "job", "state", "restarts", "step", "loss", "left"]
    for column in ["run", *columns] if launched.num_runs is not None else columns:
        table.add_column(column)
    for run in runs:
        for job in launched.jobs:
            job_id = launched.ids.get(job.file, "")
            state, restarts = _state(run, job, launched, in_slurm.get(job_id, []))
            row = [job.name, job_id, state, restarts, *_progress(run, job, launched.work_dir)]
            table.add_row(*([run.name, *row] if launched.num_runs is not None else row))
    return table


def _state(run: Path, job: Job, launched: Launched, known: list[tuple[str, str]]) -> tuple[str, str]:
    """Returns the state in a word or two, and the restarts so far."""
    path = run / FOLDER / f"{job.file}.state"
    words = path.read_text().split() if path.is_file() else []
    own, _, restarts = words if len(words) == 3 else ("", "", "")
    if is_done(run, job, launched.work_dir):
        return "done", restarts
    if launched.num_runs is None and known:
        [(state, reason)] = known
        waits = state == "PENDING" and reason not in ("None", "")
        return f"{state.lower()}{f' ({reason})' if waits else ''}", restarts
    if known and own in ("", "requeued"):
        return ", ".join(f"{count} {state.lower()}" for state, count in Counter(s for s, _ in known).items()), restarts
    if launched.cancelled:
        return "cancelled", restarts
    # A job that Slurm no longer knows ended without recording its state.
    return ("ended" if own == "running" and not known else own) or "not started", restarts


def _progress(run: Path, job: Job, work_dir: str) -> list[str]:
    """Returns step, loss and remaining time of a training stage."""
    stage = read_stage(run, job, work_dir)
    if job.verb != "distill" or stage is None:
        return ["", "", ""]
    settings, output = stage
    path = output / "metrics.jsonl"
    if not path.is_file():
        return ["", "", ""]
    lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    if not lines:
        return ["", "", ""]
    try:
        last, steps = json.loads(lines[-1]), settings["steps"]
        left = (steps - last["progress/step"]) * last["time/step_s"]
    except (ValueError, TypeError, KeyError):  # damaged, as the next run of it says
        return ["", "", ""]
    return [
        f"{last['progress/step']} of {steps}",
        f"{last['loss/total']:.4f}",
        str(timedelta(seconds=round(left))) if left else "",
    ]
