"""Determines the world of ranks of a process from its environment."""

import re
from collections.abc import Mapping
from typing import Any

from minitron_megatron.config.parallel import DataParallelConfig
from minitron_megatron.config.verbs import DISTRIBUTED, SHARED


def required_ranks(parallel: DataParallelConfig) -> int:
    """Returns the number of ranks of a layout without a launcher: one replica unless `data` says more."""
    return parallel.model_ranks * (parallel.data or 1)


def ranks_to_start(verb: str, settings: Any) -> int:
    """Returns the number of ranks to start for a verb without a launcher."""
    if verb in DISTRIBUTED:
        return required_ranks(settings.parallel)
    return settings.workers if verb in SHARED and not getattr(settings, "dry_run", False) else 1


def slurm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns torch's environment variables for a process that srun started as one of several tasks; else nothing.

    A batch script also has SLURM_PROCID and SLURM_NTASKS, but is not a rank: only srun's tasks have
    SLURM_STEP_NUM_TASKS. Variables that are already set are kept.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environ or "SLURM_PROCID" not in environ or int(tasks) < 2:
        return {}
    variables = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        # Derived from the job id, since jobs may share a node; below 32768, where Linux's ephemeral ports begin.
        "MASTER_PORT": str(12000 + int(environ["SLURM_JOB_ID"]) % 20000),
    }
    return {name: value for name, value in variables.items() if name not in environ}


def world_problems(environ: Mapping[str, str]) -> list[str]:
    """Returns what is wrong with the variables by which the ranks of a job find each other, if there is a job."""
    given = {name: environ[name] for name in ("RANK", "WORLD_SIZE") if name in environ}
    if given in ({}, {"WORLD_SIZE": "1"}):  # which some images set
        return []
    if len(given) == 1:
        [(name, value)] = given.items()
        missing = "WORLD_SIZE" if name == "RANK" else "RANK"
        return [f"{name} = {value} is set and {missing} is not: set both, use torchrun or srun, or unset {name}"]
    if problems := [
        f"{name} = {value!r}: must be a whole number" for name, value in given.items() if not _is_whole(value)
    ]:
        return problems
    rank, size = int(given["RANK"]), int(given["WORLD_SIZE"])
    if rank >= size:
        return [f"RANK = {rank} with WORLD_SIZE = {size}: ranks go from 0 to WORLD_SIZE - 1"]
    return []


def _is_whole(text: str) -> bool:
    return text.isascii() and text.isdigit()


def first_host(nodelist: str) -> str:
    """Returns the first host of Slurm's compressed list: `gpu07` of `gpu[07-09,12],login`."""
    first = re.match(r"([^,\[]|\[[^\]]*\])*", nodelist)
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
