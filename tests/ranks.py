"""Runs a function on real gloo processes."""

import os
import socket

import torch
import torch.multiprocessing as mp


def run_on_ranks(num_ranks: int, function, *args) -> None:
    """Call `function(*args)` in `num_ranks` processes that form one world."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_enter, (num_ranks, port, function, args), nprocs=num_ranks)


def _enter(rank: int, num_ranks: int, port: int, function, args) -> None:
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(*args)
