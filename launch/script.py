"""Renders the script of a job: a pure function from settings to text."""

import re
import shlex
from pathlib import Path

import jinja2

from minitron_megatron.config.cluster import ClusterConfig, Rendezvous
from minitron_megatron.launch.jobs import Job


def render(
    job: Job, cluster: ClusterConfig, run_dir: Path, work_dir: Path, python: str, digest: str, num_runs: int | None
) -> str:
    """Renders the batch script of a job.

    Args:
        job: the job.
        cluster: its settings.
        run_dir: folder of the run, or of the sweep.
        work_dir: base of relative paths in the settings.
        python: interpreter.
        digest: of the code that every node must have.
        num_runs: number of runs of a sweep, one per task of a job array; None for a single run.
    """
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {"sh": lambda value: shlex.quote(str(value)), "comment": lambda text: ascii(text)[1:-1]}
    return templates.get_template("job.sh.j2").render(
        job=job,
        cluster=cluster,
        options=_options(job, cluster, num_runs),
        run_dir=run_dir,
        work_dir=work_dir,
        python=python,
        digest=digest,
        is_array=num_runs is not None,
        cpus=_cpus(job, cluster),
        container="".join(f" {shlex.quote(option)}" for option in _container(cluster, run_dir, work_dir)),
    )


def _options(job: Job, cluster: ClusterConfig, num_runs: int | None) -> list[str]:
    """Returns the options of sbatch. Paths are relative to the folder of the logs, where the job is submitted."""
    on_gpus = job.gpus_per_node > 0
    partition = cluster.partition if on_gpus or not cluster.cpu_partition else cluster.cpu_partition
    limit = f"%{cluster.max_parallel}" if cluster.max_parallel else ""
    values = {
        "job-name": f"minitron-{job.file[3:]}",
        "output": f"{job.file}-%j.log",
        "open-mode": "append",
        "array": None if num_runs is None else f"0-{num_runs - 1}{limit}",
        "nodes": job.nodes,
        "ntasks": job.ranks,
        "ntasks-per-node": job.ranks_per_node,
        "gpus-per-node": job.gpus_per_node or None,
        "cpus-per-task": cluster.cpus_per_rank,
        "mem": cluster.memory if job.ranks > 1 or on_gpus else None,
        "partition": partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "reservation": cluster.reservation,
        "time": cluster.time,
        "signal": f"USR1@{cluster.signal_s}",
    }
    flags = ["--exclusive"] if cluster.exclusive and job.ranks > 1 else []
    given = [f"--{name}={_quoted(str(value))}" for name, value in values.items() if value is not None]
    return [*given, *flags, "--requeue", *map(_quoted, cluster.extra)]


def _cpus(job: Job, cluster: ClusterConfig) -> str:
    """Returns srun's option for the cores of a task, which is a rank or, with torchrun, a node."""
    per_task = 1 if cluster.rendezvous is Rendezvous.SRUN else job.ranks_per_node
    return f" --cpus-per-task={per_task * cluster.cpus_per_rank}" if cluster.cpus_per_rank else ""


def _quoted(value: str) -> str:
    """Quotes a value for a `#SBATCH` comment, where quotes and backslashes work as in a shell."""
    if re.fullmatch(r"[\w@%+=:,./-]+", value):
        return value
    return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'


def _container(cluster: ClusterConfig, run_dir: Path, work_dir: Path) -> list[str]:
    """Returns the options of srun for pyxis."""
    container = cluster.container
    if container.image is None:
        return []
    own = [f"{folder}:{folder}" for folder in dict.fromkeys((run_dir, work_dir))]
    return [
        f"--container-image={container.image}",
        f"--container-mounts={','.join([*own, *container.mounts])}",
        "--container-mount-home" if container.mount_home else "--no-container-mount-home",
        *([f"--container-env={','.join(container.environment)}"] if container.environment else []),
        f"--container-workdir={work_dir}",
    ]
