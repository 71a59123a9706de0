"""Saves and resumes a training run: weights, optimiser and schedule, in Megatron's own format."""

import argparse
import logging
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import unwrap_model

from minitron_megatron.checkpoint.dist_reader import (
    TRACKER,
    Checkpoint,
    iteration_folder,
    latest_folder,
    newest_whole,
    require_plain,
)
from minitron_megatron.disk import convert_enospc
from minitron_megatron.files import link_or_copy, publish, write_atomically
from minitron_megatron.parallel.collectives import rank0_first
from minitron_megatron.training.optimizer import TrainableModel

logger = logging.getLogger(__name__)

# Folder of the checkpoint with the lowest held-out loss, beside the folder of the latest ones.
BEST = "best"
# Names in Megatron-LM's checkpoints, and one of ours.
_OPTIMIZER, _SCHEDULE, _RUN = "optimizer", "opt_param_scheduler", "run"


@dataclass
class RunState:
    """Progress of a run, apart from its weights and optimisers.

    Attributes:
        step: steps done, including skipped ones.
        skipped: skipped steps, whose loss or gradient was not finite, or which had no token to learn from.
        skipped_in_a_row: skipped steps that were not finite since the last one that was.
        empty_in_a_row: length of the current series of steps without a token to learn from.
        best_loss: lowest held-out loss so far.
        alpha: see `DistillationStep`.
        zeros_before: share of zeros of a student with masks, before the first step.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    empty_in_a_row: int = 0
    best_loss: float = math.inf
    alpha: float | None = None
    zeros_before: float | None = None


def save_state(
    root: Path,
    run: RunState,
    models: Mapping[str, TrainableModel],
    best: bool = False,
    args: argparse.Namespace | None = None,
) -> None:
    """Writes `root/iter_STEP` and makes it the latest. Collective.

    The tracker file names a whole checkpoint at all times: the new one is written under another name, renamed when it
    is whole, and only then announced.

    Args:
        root: folder of the run's checkpoints.
        run: its progress.
        models: trained models, by the prefix of their keys; the student's is empty.
        best: also make it the checkpoint `BEST` beside `root`, replacing the previous best.
        args: of Megatron-LM, which describe the network.

    Raises:
        DiskSpaceError: the disk is full. The previous checkpoint is still there.
    """
    folder = root / iteration_folder(run.step)
    temporary = root / f".{folder.name}.partial"
    rank0_first(lambda: _make_empty(temporary))
    state = _sharded_state(models, is_loading=False)
    state |= {"iteration": run.step, "checkpoint_version": 3.0, _RUN: asdict(run)}
    if args is not None:
        state["args"] = argparse.Namespace(**{**vars(args), "iteration": run.step})
    state |= {f"{prefix}{_SCHEDULE}": model.schedule.state_dict() for prefix, model in models.items()}
    try:
        with convert_enospc(root):
            dist_checkpointing.save(state, str(temporary))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # it may be what fills the disk
        raise
    dist.barrier()
    rank0_first(lambda: _announce(temporary, folder, best))


def _make_empty(temporary: Path) -> None:
    """Makes the folder of a checkpoint that is written, and removes what a process that was killed has left."""
    for old in temporary.parent.glob(".*.partial"):
        if old.is_dir():
            shutil.rmtree(old)
        else:  # of a small file, such as the tracker
            old.unlink()
    temporary.mkdir(parents=True)


def remove_old(root: Path, keep: int) -> None:
    """Removes all but the `keep` latest checkpoints. Collective."""

    def remove() -> None:
        for old in _announced(root)[:-keep]:
            shutil.rmtree(old)

    rank0_first(remove)


def step_back(root: Path) -> None:
    """Makes the checkpoint before the latest one the latest, if there is one. Collective."""

    def announce() -> None:
        if before := _announced(root)[:-1]:
            write_atomically(root / TRACKER, _step_of(before[-1]))

    rank0_first(announce)


def _announced(root: Path) -> list[Path]:
    """Returns the checkpoints up to the one that the tracker file names.

    Later ones are from an interrupted save, or were stepped back from.
    """
    if not (root / TRACKER).is_file():
        return []
    latest = latest_folder(root)
    return sorted(folder for folder in root.glob("iter_*") if folder.name <= latest.name)


def _step_of(folder: Path) -> str:
    return str(int(folder.name.removeprefix("iter_")))


def _announce(temporary: Path, folder: Path, best: bool) -> None:
    """Makes a whole checkpoint the latest one."""
    root, step = folder.parent, _step_of(folder)
    if folder.exists():
        shutil.rmtree(folder)  # left by a run that ended before it was announced
    if best:  # first: a run that ends in between repeats this step
        _announce_best(temporary, folder, step)
    publish(temporary, folder)
    write_atomically(root / TRACKER, step)
    for later in set(root.glob("iter_*")) - set(_announced(root)):
        shutil.rmtree(later)


def _announce_best(temporary: Path, folder: Path, step: str) -> None:
    """Makes a checkpoint the best one, by hard links to its files, which will be those of `folder`."""
    root = folder.parent
    best, new, old = (root.with_name(name) for name in (BEST, f".{BEST}.new", f".{BEST}.old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(temporary, new / folder.name, copy_function=link_or_copy)
    shutil.copytree(
        root,
        new,
        copy_function=link_or_copy,
        ignore=shutil.ignore_patterns("iter_*", ".*", TRACKER),
        dirs_exist_ok=True,
    )
    write_atomically(new / TRACKER, step)
    if best.exists():
        os.replace(best, old)
    publish(new, best)
    shutil.rmtree(old, ignore_errors=True)


def load_state(root: Path, models: Mapping[str, TrainableModel]) -> RunState:
    """Loads the latest checkpoint below `root`, whatever layout wrote it. Collective.

    Args:
        root: folder of the run's checkpoints.
        models: trained models, by the prefix of their keys; weights, optimisers and schedules are overwritten.

    Returns:
        progress of the run; a new state if there is no checkpoint.

    Raises:
        CheckpointError: the checkpoint is damaged, or holds objects other than plain values.
    """
    rank0_first(lambda: _restore_tracker(root))
    if not (root / TRACKER).is_file():
        return RunState()
    folder = latest_folder(root)
    require_plain(folder)
    loaded = dist_checkpointing.load(_sharded_state(models, is_loading=True), str(folder))
    for prefix, model in models.items():
        for name, chunk in _named(model, prefix):
            weights = {key.removeprefix(prefix): weight for key, weight in loaded[name].items()}
            chunk.load_state_dict(weights, strict=True)
        model.optimizer.load_state_dict(loaded[f"{prefix}{_OPTIMIZER}"])
        model.schedule.load_state_dict(loaded[f"{prefix}{_SCHEDULE}"])
        if model.masks:
            model.masks.read(Checkpoint(root))
    return RunState(**loaded[_RUN])


def _restore_tracker(root: Path) -> None:
    """Writes a tracker file that is missing or empty beside whole checkpoints, which would count as left over."""
    text = (root / TRACKER).read_text(errors="replace") if (root / TRACKER).is_file() else ""
    newest = newest_whole(root)
    if not text.strip(" \t\r\n\0") and newest:
        logger.warning(
            "%s was missing or empty: going on from %s, the newest that is whole", root / TRACKER, newest.name
        )
        write_atomically(root / TRACKER, _step_of(newest))


def _named(model: TrainableModel, prefix: str) -> list[tuple[str, MegatronModule]]:
    """Returns a model's chunks with the names that Megatron-LM gives them."""
    model_chunks = unwrap_model(model.model_chunks)
    names = ["model"] if len(model_chunks) == 1 else [f"model{i}" for i in range(len(model_chunks))]
    return [(f"{prefix}{name}", chunk) for name, chunk in zip(names, model_chunks, strict=True)]


def _sharded_state(models: Mapping[str, TrainableModel], is_loading: bool) -> dict[str, Any]:
    """Returns weights and optimisers as Megatron-Core's sharded tensors."""
    state: dict[str, Any] = {}
    for prefix, model in models.items():
        own = {name: chunk.sharded_state_dict(prefix=prefix) for name, chunk in _named(model, prefix)}
        state |= own
        if model.masks and not is_loading:  # `Masks.read` reads them
            state |= model.masks.sharded_state()
        if model.fake_quant and not is_loading:  # they stay those of the start
            state |= model.fake_quant.sharded_state()
        state[f"{prefix}{_OPTIMIZER}"] = model.optimizer.sharded_state_dict(
            own, is_loading=is_loading, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
        )
    return state
