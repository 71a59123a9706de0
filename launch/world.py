"""Which world of ranks a process belongs to, from its environment alone."""

import re
from collections.abc import Mapping
from typing import Any

from minitron_megatron.config.schema import InferenceParallelConfig
from minitron_megatron.config.verbs import DISTRIBUTED, SHARED


def required_ranks(parallel: InferenceParallelConfig) -> int:
    """Ranks that a layout needs when nobody has started any: one replica unless it says more."""
    return parallel.tensor * parallel.pipeline * (parallel.data or 1)


def ranks_to_start(verb: str, settings: Any) -> int:
    """Ranks that a verb with these settings is run by when nobody has started any."""
    if verb in DISTRIBUTED:
        return required_ranks(settings.parallel)
    return settings.workers if verb in SHARED and not getattr(settings, "dry_run", False) else 1


def slurm_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that torch reads, for a process that srun started as one task of several; else nothing.

    A batch script has SLURM_PROCID and SLURM_NTASKS too, but is no rank: only srun's tasks have a
    SLURM_STEP_NUM_TASKS. What is set already stays.
    """
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environ or "SLURM_PROCID" not in environ or int(tasks) < 2:
        return {}
    found = {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": tasks,
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": first_host(environ["SLURM_STEP_NODELIST"]),
        # By job, since jobs may share a node; below 32768, where Linux begins to hand out ports by itself.
        "MASTER_PORT": str(12000 + int(environ["SLURM_JOB_ID"]) % 20000),
    }
    return {name: value for name, value in found.items() if name not in environ}


def first_host(nodelist: str) -> str:
    """The first host of SLURM's compressed list: `gpu[07-09,12],login` begins with `gpu07`."""
    first = re.match(r"([^,\[]|\[[^\]]*\])*", nodelist)
    assert first is not None
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", first[0])
