"""The settings of `minitron launch`."""

import re
from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.checks import at_least
from minitron_megatron.config.plugins import PluginConfig

# Of Slurm's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds].
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
# Options that the job script sets itself, or that would break it.
_OWN_OPTIONS = {
    *("job-name", "output", "error", "open-mode", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "signal"),
    *("requeue", "no-requeue", "array", "dependency", "chdir", "partition", "account", "qos", "time", "constraint"),
    *("exclusive", "reservation", "cpus-per-task", "mem"),
}

# Settings that also apply without Slurm; the last three are for the memory check.
_LOCAL = ("kind", "gpu", "gpu_hour_price", "ranks_per_node")


def _seconds(time: str) -> int:
    """Returns a time limit in seconds."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # One or two parts are minutes[:seconds], unless days precede them.
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return int(days or 0) * 86400 + sum(part * unit for part, unit in zip(parts, units))


class ClusterKind(str, Enum):
    LOCAL = "local"  # ranks on this machine
    SLURM = "slurm"


class Rendezvous(str, Enum):
    """How the ranks of a job find each other."""

    SRUN = "srun"  # one task of srun per rank
    TORCHRUN = "torchrun"  # one torchrun per node, under srun


@dataclass
class ContainerConfig:
    """The container that the ranks run in (pyxis and enroot).

    Attributes:
        image: squashfs file or registry image; null for no container.
        mounts: further mounts, HOST:CONTAINER[:FLAGS]. The run's folder and the working directory are always mounted.
        mount_home: also mount the home directory.
        environment: variables whose values on the node override those of the image.
    """

    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    mount_home: bool = False
    environment: list[str] = field(default_factory=list)

    def problems(self, where: str) -> list[str]:
        problems = []
        if self.image is None and (self.mounts or self.environment):
            problems.append(f"{where}mounts and {where}environment need a container: set {where}image")
        for mount in self.mounts:
            if not re.fullmatch(r"[^:,\n]+:[^:,\n]+(:[^:,\n]+)?", mount):
                problems.append(f"{where}mounts has {mount!r}: write HOST:CONTAINER or HOST:CONTAINER:FLAGS, no commas")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                problems.append(f"{where}environment has {name!r}: give names of variables, not values")
        return problems


@dataclass
class ClusterConfig:
    """Where ranks run.

    Attributes:
        kind: run on this machine, or as Slurm jobs.
        nodes: nodes of stages that run on several ranks; null for as many as the layout needs. parallel.data=null
            fills them all.
        ranks_per_node: ranks per node, one per GPU where there are GPUs.
        gpus_per_node: GPUs to request per node of such stages; null for one per rank, 0 on a cluster without GPUs.
        cpus_per_rank: cores to request per rank; null for the cluster's default.
        memory: memory to request per node of stages on several ranks or GPUs, in Slurm's notation: 200G, or 0 for all
            of a node; null for the cluster's default.
        partition: partition to submit to; null for the cluster's default, as for the next four.
        cpu_partition: partition of stages that need no GPU; null for the same.
        account: account to charge.
        qos: quality of service.
        constraint: features that nodes must have.
        reservation: reservation to run in.
        exclusive: do not share nodes with other jobs, for stages on several ranks.
        time: time limit of every job, in Slurm's notation: minutes, h:m:s or d-h:m:s.
        extra: further sbatch options, as in [--mail-type=FAIL].
        rendezvous: start every rank as a task of srun, or start torchrun on every node.
        port: port on the first node where the ranks meet; null derives one from the job id.
        signal_s: seconds before the time limit at which the ranks are told to save and stop.
        max_restarts: requeue a job that was preempted, lost a rank or timed out at most this often in a row; a new
            checkpoint resets the count.
        max_parallel: runs of a sweep that run at the same time; null for all.
        preflight: check every node before the ranks start.
        exclude_bad_nodes: requeue without the nodes that fail the preflight check.
        container: the container that the ranks run in.
        modules: environment modules to load.
        venv: virtual environment to activate.
        python: interpreter of the job; null for the virtual environment's, the container's python3, or the current one.
        gpu: GPU model, one of `parallel/gpus.py`, to check before the launch whether the layout fits its memory; null
            skips the check.
        gpu_hour_price: price of a GPU-hour, in any currency, to estimate the cost of a run.
    """

    kind: ClusterKind = ClusterKind.LOCAL
    nodes: int | None = None
    ranks_per_node: int = 8
    gpus_per_node: int | None = None
    cpus_per_rank: int | None = None
    memory: str | None = None
    partition: str | None = None
    cpu_partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    reservation: str | None = None
    exclusive: bool = False
    time: str = "4:00:00"
    extra: list[str] = field(default_factory=list)
    rendezvous: Rendezvous = Rendezvous.SRUN
    port: int | None = None
    signal_s: int = 300
    max_restarts: int = 3
    max_parallel: int | None = None
    preflight: bool = True
    exclude_bad_nodes: bool = False
    container: ContainerConfig = field(default_factory=ContainerConfig)
    modules: list[str] = field(default_factory=list)
    venv: str | None = None
    python: str | None = None
    gpu: str | None = None
    gpu_hour_price: float | None = None

    @property
    def gpus(self) -> int:
        """GPUs per node of a stage on several ranks."""
        return self.ranks_per_node if self.gpus_per_node is None else self.gpus_per_node

    def problems(self, where: str = "cluster.") -> list[str]:
        problems = []
        for name in ("nodes", "ranks_per_node", "cpus_per_rank", "max_parallel"):
            problems += at_least(where, name, getattr(self, name), 1)
        for name in ("gpus_per_node", "max_restarts", "gpu_hour_price"):
            problems += at_least(where, name, getattr(self, name), 0)
        problems += at_least(where, "signal_s", self.signal_s, 1)
        if self.port is not None and not 1024 <= self.port < 65536:
            problems.append(f"{where}port = {self.port}: must be from 1024 to 65535, or null for one of the job's own")
        if not _TIME.fullmatch(self.time):
            problems.append(f"{where}time = {self.time!r}: write minutes, hours:minutes:seconds or days-hours:minutes")
        if 0 < self.gpus < self.ranks_per_node:
            problems.append(
                f"{where}gpus_per_node = {self.gpus} is fewer than {where}ranks_per_node = {self.ranks_per_node}: "
                f"every rank takes one"
            )
        for name in ("partition", "cpu_partition", "account", "qos", "constraint", "reservation", "venv", "python"):
            value = getattr(self, name)
            if value is not None and (not value or re.search(r"[\x00-\x1f]", value)):
                problems.append(f"{where}{name} = {value!r}: must be text without line breaks, or null")
        for option in self.extra:
            match = re.match(r"--([a-z][a-z-]*)(=[^\x00-\x1f]*)?$", option)
            if match is None:
                problems.append(f"{where}extra has {option!r}: write an option of sbatch as --NAME or --NAME=VALUE")
            elif match[1] in _OWN_OPTIONS:
                problems.append(f"{where}extra has {option!r}, which the job script sets: use the setting of its own")
        for module in self.modules:
            if not re.fullmatch(r"[\w./+-]+", module):
                problems.append(f"{where}modules has {module!r}: give names as `module load` takes them")
        others = {"venv": self.venv, "python": self.python, "container.image": self.container.image}
        if self.venv and len(given := [name for name, value in others.items() if value]) > 1:
            problems.append(f"{' and '.join(where + name for name in given)} are all set: set one interpreter alone")
        if self.memory is not None and not re.fullmatch(r"\d+[KMGT]?", self.memory):
            problems.append(f"{where}memory = {self.memory!r}: write it as Slurm does, 200G, or 0 for all of a node")
        if _TIME.fullmatch(self.time) and (seconds := _seconds(self.time)) <= self.signal_s:
            problems.append(
                f"{where}time = {self.time!r} is {seconds} seconds, and ranks stop {where}signal_s = {self.signal_s} "
                f"before the end: raise the one or lower the other"
            )
        return [*problems, *self.container.problems(f"{where}container.")]


@dataclass
class LaunchConfig(PluginConfig):
    """`minitron launch`: run a verb or a recipe on this machine or a cluster.

    Attributes:
        dry_run: print the job scripts, or the commands to run here, and write nothing.
        cluster: where to run.
    """

    dry_run: bool = False
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def problems(self, where: str = "") -> list[str]:
        return [*self.cluster.problems(f"{where}cluster."), *self._local_problems(f"{where}cluster.")]

    def _local_problems(self, where: str) -> list[str]:
        """Returns a problem if settings are given that only apply to Slurm."""
        if self.cluster.kind is not ClusterKind.LOCAL:
            return []
        defaults = ClusterConfig()
        given = [name for name, value in vars(self.cluster).items() if value != getattr(defaults, name)]
        if not (of_slurm := [f"{where}{name}" for name in given if name not in _LOCAL]):
            return []
        return [
            f"{' and '.join(of_slurm)} are for Slurm, and {where}kind = local: set cluster=slurm, or leave them out"
        ]
