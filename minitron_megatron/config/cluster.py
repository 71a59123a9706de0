"""The settings of `minitron launch`: what is run, and on which cluster."""

import re
from dataclasses import dataclass, field
from enum import Enum

from minitron_megatron.config.checks import at_least
from minitron_megatron.config.plugins import PluginConfig

# Of Slurm's forms: minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes[:seconds].
_TIME = re.compile(r"\d+(:\d+){0,2}|\d+-\d+(:\d+){0,2}")
# Options that the job script sets by itself, or that would take what it relies on from it.
_OWN_OPTIONS = {
    *("job-name", "output", "error", "open-mode", "nodes", "ntasks", "ntasks-per-node", "gpus-per-node", "signal"),
    *("requeue", "no-requeue", "array", "dependency", "chdir", "partition", "account", "qos", "time", "constraint"),
    *("exclusive", "reservation", "cpus-per-task", "mem"),
}

# What is of use where there is no Slurm: the latter three say whether a layout fits.
_LOCAL = ("kind", "gpu", "gpu_hour_price", "ranks_per_node")


def _seconds(time: str) -> int:
    """A time limit in seconds."""
    days, _, clock = time.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    # Minutes come first, unless days do or all three are there.
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
    """A container that the ranks run in, by pyxis and enroot.

    Attributes:
        image: squashfs file or registry image; null for none.
        mounts: HOST:CONTAINER[:FLAGS] each. The run's folder and the one that is launched from are mounted besides.
        mount_home: mount the home directory as well.
        environment: names of variables whose values on the node win over the image's.
    """

    image: str | None = None
    mounts: list[str] = field(default_factory=list)
    mount_home: bool = False
    environment: list[str] = field(default_factory=list)

    def problems(self, where: str) -> list[str]:
        found = []
        if self.image is None and (self.mounts or self.environment):
            found.append(f"{where}mounts and {where}environment are of a container: set {where}image")
        for mount in self.mounts:
            if not re.fullmatch(r"[^:,\n]+:[^:,\n]+(:[^:,\n]+)?", mount):
                found.append(f"{where}mounts has {mount!r}: write HOST:CONTAINER or HOST:CONTAINER:FLAGS, no commas")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                found.append(f"{where}environment has {name!r}: give names of variables, not values")
        return found


@dataclass
class ClusterConfig:
    """Where ranks run.

    Attributes:
        kind: this machine, or Slurm's jobs.
        nodes: of stages that run on several ranks; null takes as many as the layout needs. Data parallelism that is
            null uses all of them.
        ranks_per_node: ranks on a node, one per GPU where there are GPUs.
        gpus_per_node: GPUs to ask for on each node of such stages; null for one per rank, 0 on a cluster without.
        cpus_per_rank: cores to ask for per rank; null leaves it to the cluster.
        memory: to ask for on each node of stages on several ranks or GPUs, as Slurm writes it: 200G, or 0 for all that
            a node has; null leaves it to the cluster.
        partition: as Slurm names it; null for the cluster's own choice, as for the four below.
        cpu_partition: of stages that need no GPU; null for the same.
        account: to charge.
        qos: quality of service.
        constraint: features that nodes must have.
        reservation: to run in.
        exclusive: nodes are shared with nobody, for stages on several ranks.
        time: limit of every job, as Slurm writes it: minutes, h:m:s or d-h:m:s.
        extra: further options of sbatch, `--mail-type=FAIL`, each as a text of its own.
        rendezvous: one task of srun per rank, or torchrun on every node.
        port: at which ranks meet on the first node; null derives one from the job's id.
        signal_s: so many seconds before the end the ranks are told to save and stop.
        max_restarts: how often in a row a job that was preempted, lost a rank or timed out is put back into the queue
            without having come further; a checkpoint in between starts the count anew.
        max_parallel: how many runs of a sweep go at a time; null for all of them.
        preflight: check every node before the ranks start.
        exclude_bad_nodes: go on without nodes that fail it, by putting the job back into the queue.
        container: what the ranks run in.
        modules: environment modules to load.
        venv: virtual environment to activate.
        python: interpreter of the job; null for the virtual environment's, the container's python3, or this one.
        gpu: which GPU a rank has, by its name in `parallel/gpus.py`, to check before a launch whether the layout fits;
            null does not check.
        gpu_hour_price: what an hour of one GPU costs, in any currency, to say what a run will cost.
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
        """GPUs on each node of a stage on several ranks."""
        return self.ranks_per_node if self.gpus_per_node is None else self.gpus_per_node

    def problems(self, where: str = "cluster.") -> list[str]:
        found = []
        for name in ("nodes", "ranks_per_node", "cpus_per_rank", "max_parallel"):
            found += at_least(where, name, getattr(self, name), 1)
        for name in ("gpus_per_node", "max_restarts", "gpu_hour_price"):
            found += at_least(where, name, getattr(self, name), 0)
        found += at_least(where, "signal_s", self.signal_s, 1)
        if self.port is not None and not 1024 <= self.port < 65536:
            found.append(f"{where}port = {self.port}: must be from 1024 to 65535, or null for one of the job's own")
        if not _TIME.fullmatch(self.time):
            found.append(f"{where}time = {self.time!r}: write minutes, hours:minutes:seconds or days-hours:minutes")
        if 0 < self.gpus < self.ranks_per_node:
            found.append(
                f"{where}gpus_per_node = {self.gpus} is fewer than {where}ranks_per_node = {self.ranks_per_node}: "
                f"every rank takes one"
            )
        for name in ("partition", "cpu_partition", "account", "qos", "constraint", "reservation", "venv", "python"):
            value = getattr(self, name)
            if value is not None and (not value or re.search(r"[\x00-\x1f]", value)):
                found.append(f"{where}{name} = {value!r}: must be text without line breaks, or null")
        for option in self.extra:
            match = re.match(r"--([a-z][a-z-]*)(=[^\x00-\x1f]*)?$", option)
            if match is None:
                found.append(f"{where}extra has {option!r}: write an option of sbatch as --NAME or --NAME=VALUE")
            elif match[1] in _OWN_OPTIONS:
                found.append(f"{where}extra has {option!r}, which the job script sets: use the setting of its own")
        for module in self.modules:
            if not re.fullmatch(r"[\w./+-]+", module):
                found.append(f"{where}modules has {module!r}: give names as `module load` takes them")
        others = {"venv": self.venv, "python": self.python, "container.image": self.container.image}
        if self.venv and len(given := [name for name, value in others.items() if value]) > 1:
            found.append(f"{' and '.join(where + name for name in given)} are all set: set one interpreter alone")
        if self.memory is not None and not re.fullmatch(r"\d+[KMGT]?", self.memory):
            found.append(f"{where}memory = {self.memory!r}: write it as Slurm does, 200G, or 0 for all of a node")
        if _TIME.fullmatch(self.time) and (seconds := _seconds(self.time)) <= self.signal_s:
            found.append(
                f"{where}time = {self.time!r} is {seconds} seconds, and ranks stop {where}signal_s = {self.signal_s} "
                f"before the end: raise the one or lower the other"
            )
        return [*found, *self.container.problems(f"{where}container.")]


@dataclass
class LaunchConfig(PluginConfig):
    """`minitron launch`: a verb or a recipe is run on this machine or a cluster.

    Attributes:
        dry_run: print the job scripts, or what would be run here, and write nothing.
        cluster: where.
    """

    dry_run: bool = False
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def problems(self, where: str = "") -> list[str]:
        return [*self.cluster.problems(f"{where}cluster."), *self._local_problems(f"{where}cluster.")]

    def _local_problems(self, where: str) -> list[str]:
        """The problem, if any, of settings that only Slurm has a use for."""
        if self.cluster.kind is not ClusterKind.LOCAL:
            return []
        defaults = ClusterConfig()
        given = [name for name, value in vars(self.cluster).items() if value != getattr(defaults, name)]
        if not (of_slurm := [f"{where}{name}" for name in given if name not in _LOCAL]):
            return []
        return [
            f"{' and '.join(of_slurm)} are for Slurm, and {where}kind = local: set cluster=slurm, or leave them out"
        ]
