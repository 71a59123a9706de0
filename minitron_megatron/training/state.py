"""Saving and resuming a training run: weights, optimiser and schedule, in Megatron's own format."""

import os
import shutil
from pathlib import Path

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.utils import unwrap_model

from minitron_megatron.checkpoint.manifest import write_atomically
from minitron_megatron.checkpoint.sharded import TRACKER, iteration_folder
from minitron_megatron.disk import told_when_full
from minitron_megatron.distillation.step import TeacherStudent
from minitron_megatron.parallel.collectives import main_first
from minitron_megatron.training.optimizer import Optimization


def save_state(root: Path, step: int, training: Optimization, pair: TeacherStudent) -> None:
    """Write `root/iter_STEP`, make it the latest, and then remove the one before. Collective.

    At every moment the tracker names a whole checkpoint: the new one is written beside, renamed when it is
    whole, and only then announced.

    Raises:
        DiskSpaceError: the disk got full. The checkpoint before is still there.
    """
    folder = root / iteration_folder(step)
    temporary = root / f".{folder.name}.partial"
    main_first(lambda: _make_empty(temporary))
    state = _sharded_state(training, is_loading=False)
    state |= {
        "iteration": step,
        "checkpoint_version": 3.0,
        "opt_param_scheduler": training.schedule.state_dict(),
        "distillation_alpha": pair.alpha,
    }
    try:
        with told_when_full(root):
            dist_checkpointing.save(state, str(temporary))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)  # what is left of it may be what fills the disk
        raise
    dist.barrier()
    main_first(lambda: _announce(temporary, folder, step))


def _make_empty(temporary: Path) -> None:
    for old in temporary.parent.glob(".*.partial"):
        shutil.rmtree(old)
    temporary.mkdir(parents=True)


def _announce(temporary: Path, folder: Path, step: int) -> None:
    """Make a whole checkpoint the latest one, and the only one."""
    if folder.exists():
        shutil.rmtree(folder)  # not announced, so left by a run that ended between these lines
    os.replace(temporary, folder)
    write_atomically(folder.parent / TRACKER, str(step))
    for old in folder.parent.glob("iter_*"):
        if old != folder:
            shutil.rmtree(old)


def load_state(root: Path, training: Optimization, pair: TeacherStudent) -> int:
    """Go on from the latest checkpoint below `root`. Collective.

    Returns:
        the step it was saved after; 0 if there is none.
    """
    if not (root / TRACKER).is_file():
        return 0
    step = int((root / TRACKER).read_text())
    folder = root / iteration_folder(step)
    loaded = dist_checkpointing.load(_sharded_state(training, is_loading=True), str(folder))
    for name, chunk in _named(unwrap_model(training.chunks)):
        chunk.load_state_dict(loaded[name], strict=True)
    training.optimizer.load_state_dict(loaded["optimizer"])
    training.schedule.load_state_dict(loaded["opt_param_scheduler"])
    pair.alpha = loaded["distillation_alpha"]
    return step


def _named(chunks: list) -> list[tuple[str, object]]:
    """Chunks under the names that Megatron-LM gives them."""
    return [("model", chunks[0])] if len(chunks) == 1 else [(f"model{i}", chunk) for i, chunk in enumerate(chunks)]


def _sharded_state(training: Optimization, is_loading: bool) -> dict:
    state = {name: chunk.sharded_state_dict() for name, chunk in _named(unwrap_model(training.chunks))}
    state["optimizer"] = training.optimizer.sharded_state_dict(dict(state), is_loading=is_loading)
    return state
