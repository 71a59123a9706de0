"""Runs a function on real gloo processes."""

import gc
import multiprocessing
import os

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Imported once, by a server that the ranks are forked from: it takes each of them several seconds otherwise. The first
# step of an optimiser loads torch's compiler, and a tokenizer transformers.
multiprocessing.set_forkserver_preload(
    [
        "torch._dynamo",
        "transformers.models.auto.tokenization_auto",
        "minitron_megatron.training.distill",
        "minitron_megatron.pruning.score",
        "minitron_megatron.evaluation.evaluate",
    ]
)


def run_on_ranks(num_ranks: int, function, *args) -> None:
    """Call `function(*args)` in `num_ranks` processes that form one world."""
    # The ranks meet at a store that listens already: a port that is only looked up may be taken before they are up.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    arguments = num_ranks, store.port, function, args
    mp.start_processes(_enter, arguments, nprocs=num_ranks, start_method="forkserver")


def _enter(rank: int, num_ranks: int, port: int, function, args) -> None:
    # Nothing that was imported is ever freed: looking through it again and again copies the server's memory.
    gc.freeze()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    function(*args)
