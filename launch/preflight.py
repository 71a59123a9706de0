"""Checks every node before the ranks start: `python -m minitron_megatron.launch.preflight`.

Runs as one task per node. Each node writes `NODE.ok` or `NODE.bad` to the folder of the checks; if all are ok, they do
an all-reduce. Problems go to the job's log, with the name of the node.
"""

import importlib
import os
import shutil
import socket
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

from minitron_megatron.launch.version import digest
from minitron_megatron.process import address_problems

MIN_FREE_GIB = 1.0
MEETING_S = 300
"""Seconds that a node waits for the others, which may have cold file systems."""


def main(checks: str, run_dir: str, expected_digest: str, num_gpus: str) -> int:
    """Checks this node, and whether it reaches the others.

    Args:
        checks: folder that all nodes share.
        run_dir: folder of the run.
        expected_digest: of the code that the run was launched with.
        num_gpus: number of GPUs that this node must have.

    Returns:
        exit status: 0 if this node has no problem.
    """
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    problems = [*code_problems(expected_digest), *folder_problems(Path(run_dir)), *gpu_problems(int(num_gpus))]
    if os.environ["SLURM_PROCID"] == "0":
        problems += port_problems(int(os.environ["MASTER_PORT"]))
    (Path(checks) / f"{node}.{'bad' if problems else 'ok'}").touch()
    problems = problems or absence_problems(Path(checks)) or meeting_problems(int(num_gpus) > 0)
    for problem in problems:
        print(f"preflight: {node}: {problem}", flush=True)
    return int(bool(problems))


def code_problems(expected: str) -> list[str]:
    """Returns a problem if this node has other code than the run was launched with."""
    if digest() == expected:
        return []
    return [f"has other code of minitron_megatron ({digest()}) than the run was launched with ({expected})"]


def folder_problems(folder: Path) -> list[str]:
    """Returns a problem if the run's folder is missing, cannot be written, or is on a full disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [f"cannot write in {folder} ({error.strerror}): is it mounted?"]
    free = shutil.disk_usage(folder).free / 2**30
    return [f"has {free:.1f} GiB left for {folder}"] if free < MIN_FREE_GIB else []


def gpu_problems(num_gpus: int) -> list[str]:
    """Returns a problem for each GPU that is missing or does not compute."""
    if not num_gpus:
        return []
    torch = importlib.import_module("torch")  # by name, because this package must not import it
    if torch.cuda.device_count() < num_gpus:
        return [f"has {torch.cuda.device_count()} GPUs, and the job takes {num_gpus}"]
    problems = []
    for device in range(num_gpus):
        try:
            if float(torch.ones(1024, 1024, device=f"cuda:{device}").sum()) != 2**20:
                problems.append(f"GPU {device} adds up wrongly")
        except RuntimeError as error:
            problems.append(f"GPU {device} fails: {str(error).splitlines()[0]}")
    return problems


def port_problems(port: int) -> list[str]:
    """Returns a problem if the port at which the ranks will meet on this node is taken."""
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(("", port))
        except OSError as error:
            return [f"port {port} cannot be opened ({error.strerror}): set cluster.port to another"]
    return []


def absence_problems(checks: Path) -> list[str]:
    """Waits for the other nodes; returns a problem if one is bad or does not report in time."""
    num_nodes, end = int(os.environ["SLURM_STEP_NUM_TASKS"]), time.monotonic() + MEETING_S
    while True:
        bad = sorted(path.stem for path in checks.glob("*.bad"))
        num_ok = len(list(checks.glob("*.ok")))
        if bad or num_ok == num_nodes:
            return [f"does not meet the others, because of {', '.join(bad)}"] if bad else []
        if time.monotonic() > end:
            return [f"waited {MEETING_S} seconds, and {num_nodes - num_ok} of {num_nodes} nodes have said nothing"]
        time.sleep(0.2)


def meeting_problems(on_gpus: bool) -> list[str]:
    """Returns the problem of a small all-reduce with the other nodes, if any."""
    num_nodes, rank = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ["SLURM_PROCID"])
    if num_nodes == 1:
        return []
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if problems := address_problems(address):
        return problems
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    wait = timedelta(seconds=MEETING_S)
    try:
        store = dist.TCPStore(address, port, num_nodes, rank == 0, wait, wait_for_workers=False)
        world = {"store": store, "rank": rank, "world_size": num_nodes, "timeout": wait}
        dist.init_process_group("nccl" if on_gpus else "gloo", **world)
        one = torch.ones(1, device="cuda" if on_gpus else "cpu")
        dist.all_reduce(one)
        dist.destroy_process_group()
        # The first process hosts the store, so it leaves last.
        store.set(f"left/{rank}", "")
        if rank == 0:
            store.wait([f"left/{other}" for other in range(num_nodes)], wait)
    except RuntimeError as error:
        return [f"does not reach the other nodes: {str(error).splitlines()[0]}"]
    return [] if one.item() == num_nodes else [f"an all-reduce over {num_nodes} nodes gave {one.item()}"]


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
