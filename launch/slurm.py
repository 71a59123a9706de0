"""Slurm commands: submits a chain of jobs, queries and cancels them."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from minitron_megatron.errors import ConfigError

ACTIVE = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "REQUEUED", "REQUEUE_HOLD")
"""States of jobs that have not ended."""


def require_slurm() -> None:
    """Raises `ConfigError` if sbatch is not installed."""
    if shutil.which("sbatch") is None:
        raise ConfigError(
            ["cluster.kind = slurm, but there is no sbatch on the PATH: launch from a login node, or set cluster=local"]
        )


def submit_chain(scripts: list[Path], folder: Path, is_array: bool, on_id: Callable[[Path, str], None]) -> None:
    """Submits scripts so that each starts when the previous one has succeeded.

    In a sweep each run's stage waits for the previous stage of the same run. If a job fails, Slurm cancels those that
    wait for it. If sbatch refuses a job, those submitted before are cancelled.

    Args:
        scripts: in order.
        folder: where the jobs' logs go.
        is_array: whether the jobs are arrays.
        on_id: called with each script and its job id right after submission.

    Raises:
        ConfigError: sbatch refused a job; with its message.
    """
    ids: list[str] = []
    try:
        for script in scripts:
            after = [f"--dependency={'aftercorr' if is_array else 'afterok'}:{ids[-1]}"] if ids else []
            command = ["sbatch", "--parsable", f"--chdir={folder}", "--kill-on-invalid-dep=yes", *after, str(script)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = done.stderr.strip().removeprefix("sbatch: ")
                raise ConfigError([f"sbatch refused {script.name}: {said}"])
            # ID, or ID;CLUSTER
            ids.append(done.stdout.strip().split(";")[0])
            on_id(script, ids[-1])
    except BaseException:
        cancel(ids)
        raise


def states(ids: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Returns state and reason of the jobs that Slurm still knows, by id; several for the tasks of an array.

    Raises:
        ConfigError: Slurm does not answer.
    """
    by_id: dict[str, list[tuple[str, str]]] = {}
    if not ids:
        return by_id
    command = ["squeue", "--noheader", "--states=all", "--format=%F|%T|%r", f"--jobs={','.join(ids)}"]
    done = subprocess.run(command, capture_output=True, text=True)
    # squeue fails on ids that Slurm has forgotten.
    if done.returncode and "Invalid job id" not in done.stderr:
        raise ConfigError([f"squeue fails for jobs {', '.join(ids)}: {done.stderr.strip()}"])
    for line in done.stdout.splitlines():
        job, state, reason = line.split("|", 2)
        by_id.setdefault(job, []).append((state, reason))
    return by_id


def cancel(ids: list[str]) -> None:
    """Cancels jobs, except those that are over."""
    if ids:
        subprocess.run(["scancel", "--quiet", *ids], capture_output=True)


def known_partitions() -> set[str]:
    """Returns the names of all partitions."""
    done = subprocess.run(["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True)
    return set(re.findall(r"\S+", done.stdout))
