"""What is checked on every node before the ranks start: `python -m minitron_megatron.launch.preflight`.

One task per node. A node that is all right leaves `NODE.ok` in the folder of the checks; what is wrong with one is said
in the job's log, under the node's name.
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

MIN_FREE_GIB = 1.0
MEETING_S = 60
"""So long a node waits for the others."""


def main(checks: str, run_dir: str, expected_digest: str, num_gpus: str) -> int:
    """Check this node, and that it reaches the others.

    Args:
        checks: folder that all nodes see.
        run_dir: folder of the run.
        expected_digest: of the code that the run was launched with.
        num_gpus: GPUs that this node must have.

    Returns:
        exit status: 0 if all is well with this node.
    """
    node = os.environ.get("SLURMD_NODENAME", socket.gethostname())
    problems = [*code_problems(expected_digest), *folder_problems(Path(run_dir)), *gpu_problems(int(num_gpus))]
    reached = meeting_problems(int(num_gpus) > 0)
    for problem in [*problems, *reached]:
        print(f"preflight: {node}: {problem}", flush=True)
    if not problems and not any("did not come" not in problem for problem in reached):
        (Path(checks) / f"{node}.ok").touch()
    return int(bool(problems or reached))


def code_problems(expected: str) -> list[str]:
    """That this node has other code than the run was launched with."""
    if digest() == expected:
        return []
    return [f"has other code of minitron_megatron ({digest()}) than the run was launched with ({expected})"]


def folder_problems(folder: Path) -> list[str]:
    """That the run's folder is not there, cannot be written, or lies on a full disk."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [f"cannot write in {folder} ({error.strerror}): is it mounted?"]
    free = shutil.disk_usage(folder).free / 2**30
    return [f"has {free:.1f} GiB left for {folder}"] if free < MIN_FREE_GIB else []


def gpu_problems(num_gpus: int) -> list[str]:
    """That GPUs are missing, or do not compute."""
    if not num_gpus:
        return []
    torch = importlib.import_module("torch")  # by name, for this package must not need it
    if torch.cuda.device_count() < num_gpus:
        return [f"has {torch.cuda.device_count()} GPUs, and the job takes {num_gpus}"]
    found = []
    for device in range(num_gpus):
        try:
            if float(torch.ones(1024, 1024, device=f"cuda:{device}").sum()) != 2**20:
                found.append(f"GPU {device} adds up wrongly")
        except RuntimeError as error:
            found.append(f"GPU {device} fails: {str(error).splitlines()[0]}")
    return found


def meeting_problems(on_gpus: bool) -> list[str]:
    """That the port is taken, or that nodes do not come to a small all-reduce, or get a wrong sum from it."""
    num_nodes, rank = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ["SLURM_PROCID"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if rank == 0:
        with socket.socket() as own:
            own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                own.bind(("", port))
            except OSError as error:
                return [f"port {port} cannot be opened ({error.strerror}): set cluster.port to another"]
    if num_nodes == 1:
        return []
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    name, wait = os.environ.get("SLURMD_NODENAME", socket.gethostname()), timedelta(seconds=MEETING_S)
    try:
        store = dist.TCPStore(address, port, num_nodes, rank == 0, wait, wait_for_workers=False)
        store.set(f"came/{rank}", name)
        missing = _missing(store, num_nodes)
        if missing:
            return [f"the nodes number {missing} of the job did not come to port {port} of {address}"]
        dist.init_process_group(
            "nccl" if on_gpus else "gloo", store=store, rank=rank, world_size=num_nodes, timeout=wait
        )
        one = torch.ones(1, device="cuda" if on_gpus else "cpu")
        dist.all_reduce(one)
        dist.destroy_process_group()
        # The store lives in the first process, which leaves last.
        store.set(f"left/{rank}", "")
        if rank == 0:
            store.wait([f"left/{other}" for other in range(num_nodes)], wait)
    except RuntimeError as error:
        return [f"does not reach the other nodes: {str(error).splitlines()[0]}"]
    return [] if one.item() == num_nodes else [f"an all-reduce over {num_nodes} nodes gave {one.item()}"]


def _missing(store, num_nodes: int) -> list[int]:
    """Ranks of the nodes that have not come in time."""
    end = time.monotonic() + MEETING_S
    while True:
        missing = [rank for rank in range(num_nodes) if not store.check([f"came/{rank}"])]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
