"""What is checked on every node before the ranks start: `python -m minitron_megatron.launch.preflight`.

One task per node. A node that is all right leaves `NODE.ok` in the folder of the checks, and the first one takes back
that of a node which it does not meet; what is wrong with one is said in the job's log, under its name.
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
    if is_first := os.environ["SLURM_PROCID"] == "0":
        problems += port_problems(int(os.environ["MASTER_PORT"]))
    _tell(node, problems)
    own = Path(checks) / f"{node}.ok"
    if not problems:
        own.write_text(os.environ["SLURM_PROCID"])
    if is_first and problems:
        return 1  # and nobody to be met
    missing, reached = meet(int(num_gpus) > 0)
    _tell(node, reached)
    if is_first:
        for ok in Path(checks).glob("*.ok"):
            if ok.read_text() in missing:
                ok.unlink()
    return int(bool(problems or reached))


def _tell(node: str, problems: list[str]) -> None:
    for problem in problems:
        print(f"preflight: {node}: {problem}", flush=True)


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


def port_problems(port: int) -> list[str]:
    """That the port at which ranks will meet on this node is taken."""
    with socket.socket() as own:
        own.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            own.bind(("", port))
        except OSError as error:
            return [f"port {port} cannot be opened ({error.strerror}): set cluster.port to another"]
    return []


def meet(on_gpus: bool) -> tuple[list[str], list[str]]:
    """Meet the other nodes for a small all-reduce.

    Returns:
        numbers of the nodes that did not come, and what is wrong.
    """
    num_nodes, rank = int(os.environ["SLURM_STEP_NUM_TASKS"]), int(os.environ["SLURM_PROCID"])
    if num_nodes == 1:
        return [], []
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    torch = importlib.import_module("torch")
    dist = importlib.import_module("torch.distributed")
    wait = timedelta(seconds=MEETING_S)
    try:
        store = dist.TCPStore(address, port, num_nodes, rank == 0, wait, wait_for_workers=False)
        store.set(f"came/{rank}", "")
        if missing := _missing(store, num_nodes):
            names = ", ".join(missing)
            return missing, [f"of the job's nodes, counted from 0, number {names} did not come to {address}:{port}"]
        world = {"store": store, "rank": rank, "world_size": num_nodes, "timeout": wait}
        dist.init_process_group("nccl" if on_gpus else "gloo", **world)
        one = torch.ones(1, device="cuda" if on_gpus else "cpu")
        dist.all_reduce(one)
        dist.destroy_process_group()
        # The store lives in the first process, which leaves last.
        store.set(f"left/{rank}", "")
        if rank == 0:
            store.wait([f"left/{other}" for other in range(num_nodes)], wait)
    except RuntimeError as error:
        return [], [f"does not reach the other nodes: {str(error).splitlines()[0]}"]
    return [], [] if one.item() == num_nodes else [f"an all-reduce over {num_nodes} nodes gave {one.item()}"]


def _missing(store, num_nodes: int) -> list[str]:
    """Numbers of the nodes that have not come in time."""
    end = time.monotonic() + MEETING_S
    while True:
        missing = [str(rank) for rank in range(num_nodes) if not store.check([f"came/{rank}"])]
        if not missing or time.monotonic() > end:
            return missing
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
