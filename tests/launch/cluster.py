"""A real Slurm of two nodes on this machine, for as long as a test session lasts.

munged with a key and socket of its own, slurmctld, and two slurmd as nodes n1 and n2 of one host, each with its own
port and spool folder. Everything lies in one folder, and only what was started here is ended.
"""

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")

CONFIG = """
ClusterName=tiny
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
AuthType=auth/munge
CredType=cred/munge
# A job that is put back waits until the credentials of its last start are over.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,requeue_delay=0
MpiDefault=none
SlurmdParameters=config_overrides
ReturnToService=2
MinJobAge=3600
KillWait=5
SlurmctldTimeout=300
SlurmdTimeout=300
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 State=UNKNOWN
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 State=UNKNOWN
# A job of the second partition takes the nodes from those of the first.
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=120
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE State=UP PriorityTier=2 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Which of Slurm's and munge's programs are not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@contextmanager
def slurm(folder: Path) -> Iterator[dict[str, str]]:
    """Start the cluster in `folder`. Yields the variables that its commands need."""
    folder.chmod(0o755)
    for name in ("state", "spool.n1", "spool.n2"):
        (folder / name).mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    with socket.socket() as a, socket.socket() as b, socket.socket() as c:
        for own in (a, b, c):
            own.bind(("127.0.0.1", 0))
        ports = [own.getsockname()[1] for own in (a, b, c)]
    user = subprocess.run(["id", "-un"], capture_output=True, text=True, check=True).stdout.strip()
    host = socket.gethostname().split(".")[0]
    config = folder / "slurm.conf"
    config.write_text(CONFIG.format(folder=folder, ports=ports, user=user, host=host))
    environment = {"SLURM_CONF": str(config), "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
    processes: list[subprocess.Popen] = []

    def start(*command: str) -> None:
        log = open(folder / f"{command[0]}.out", "a")  # noqa: SIM115
        own = {**os.environ, **environment}
        processes.append(subprocess.Popen(command, env=own, stdout=log, stderr=log, start_new_session=True))

    try:
        files = ("pid", "log", "seed")
        start(
            *("munged", "--foreground", "--force", f"--key-file={key}", f"--socket={folder}/munge.socket"),
            *(f"--{name}-file={folder}/munge.{name}" for name in files),
        )
        _wait_for(lambda: (folder / "munge.socket").exists(), "munged", folder)
        start("slurmctld", "-D")
        for node in ("n1", "n2"):
            start("slurmd", "-D", "-N", node)
        _wait_for(lambda: _idle_nodes(environment) == 2, "two idle nodes", folder)
        yield environment
    finally:
        subprocess.run(["scancel", "--user", user], env={**os.environ, **environment}, capture_output=True)
        deadline = time.monotonic() + 15
        while _jobs(environment) and time.monotonic() < deadline:
            time.sleep(0.2)
        for process in reversed(processes):
            process.send_signal(signal.SIGTERM)
        for process in reversed(processes):
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()


def _idle_nodes(environment: dict[str, str]) -> int:
    found = subprocess.run(
        ["sinfo", "--noheader", "--Node", "--states=idle", "--partition=all"],
        env={**os.environ, **environment},
        capture_output=True,
    )
    return len(found.stdout.splitlines())


def _jobs(environment: dict[str, str]) -> bytes:
    return subprocess.run(["squeue", "--noheader"], env={**os.environ, **environment}, capture_output=True).stdout


def _wait_for(condition, what: str, folder: Path, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}:\n{path.read_text()[-2000:]}" for path in sorted(folder.glob("*.log")))
            raise TimeoutError(f"{what} did not come up\n{logs}")
        time.sleep(0.2)
