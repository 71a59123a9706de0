"""Metrics of a run: always to `metrics.jsonl`, and to a tracker where one is asked for."""

import json
import uuid
from pathlib import Path

import psutil
import torch

from minitron_megatron.checkpoint.manifest import write_atomically
from minitron_megatron.config.schema import Tracker, TrackingConfig
from minitron_megatron.errors import ConfigError

FILE = "metrics.jsonl"
WANDB_ID = "wandb_id"


class Metrics:
    """The metrics of one run, over all of its restarts. A context manager; one process alone uses it.

    Args:
        folder: of the run.
        step: the step the run goes on from; later lines, which will be made again, are dropped.
        tracking: the tracker, if any.
        config: the run's settings, for the tracker.

    Raises:
        ConfigError: the tracker that was asked for does not start.
    """

    def __init__(self, folder: Path, step: int, tracking: TrackingConfig, config: dict):
        path = folder / FILE
        if path.exists():
            kept = [json.dumps(values) + "\n" for values in read_metrics(folder) if values["progress/step"] <= step]
            write_atomically(path, "".join(kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115
        self._wandb = _start_wandb(folder, tracking, config) if tracking.tracker is Tracker.WANDB else None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        self._file.close()
        if self._wandb is not None:
            self._wandb.finish(exit_code=int(exception[0] is not None))

    def log(self, values: dict[str, float]) -> None:
        """Write one line. `progress/step` must be among the values."""
        self._file.write(json.dumps(values) + "\n")
        if self._wandb is not None:
            self._wandb.log(values, step=values["progress/step"])


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """All lines of a run's `metrics.jsonl`, without the half of one that a killed run leaves."""
    lines = (folder / FILE).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def memory_gib(device: torch.device) -> dict[str, float]:
    """Memory of this process now, by the names of the metrics."""
    found = {"memory/rss_gib": psutil.Process().memory_info().rss / 2**30}
    if device.type == "cuda":
        found["memory/allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        found["memory/reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
    return found


def _start_wandb(folder: Path, tracking: TrackingConfig, config: dict):
    import wandb

    path = folder / WANDB_ID
    if not path.exists():
        write_atomically(path, uuid.uuid4().hex[:8])
    try:
        return wandb.init(
            project=tracking.project,
            name=tracking.name or folder.name,
            mode=tracking.mode,
            id=path.read_text(),
            resume="allow",
            dir=folder,
            config=config,
        )
    except wandb.Error as e:
        problem = f"tracking.tracker = wandb does not start ({e}): log in, or set tracking.mode=offline"
        raise ConfigError([problem]) from e
