"""Logs the metrics of a run: always to `metrics.jsonl`, and to the trackers that are asked for."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.config.schema import TrackingConfig
from minitron_megatron.errors import CheckpointError, UserError
from minitron_megatron.files import write_atomically
from minitron_megatron.tracking.trackers import STEP, TensorBoard, Wandb, start_trackers

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class Metrics:
    """Logs the metrics of one run, over all of its restarts. A context manager, for one process.

    Trackers start here, so that one that cannot start is an error before any work. Later failures of a tracker do not
    stop training: they are a single warning, and `metrics.jsonl` has everything.

    Args:
        folder: of the run.
        tracking: the trackers.
        manifest: of the run, for its settings and lineage.

    Raises:
        CheckpointError: a line of an earlier start is damaged.
        ConfigError: a tracker does not start.
    """

    def __init__(self, folder: Path, tracking: TrackingConfig, manifest: Manifest):
        if (folder / FILE).exists():
            read_metrics(folder)
        self._folder = folder
        self._file: TextIO | None = None
        self._trackers = start_trackers(folder, tracking, manifest)
        self._warned: set[str] = set()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        self._notify(lambda tracker: tracker.finish(failed=exception[0] is not None))

    def resume(self, step: int) -> None:
        """Starts to log, or resumes after `step`; drops later lines, whose steps will be repeated."""
        path, kept = self._folder / FILE, []
        if path.exists():
            kept = [values for values in read_metrics(self._folder) if values[STEP] <= step]
            write_atomically(path, "".join(json.dumps(values) + "\n" for values in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115
        self._notify(lambda tracker: tracker.resume(kept))

    def log(self, values: dict[str, float]) -> None:
        """Writes one line. `progress/step` must be among the values."""
        assert self._file is not None, "resume comes first"
        self._file.write(json.dumps(values) + "\n")
        self._notify(lambda tracker: tracker.log(values))

    def log_figures(self, files: list[Path]) -> None:
        """Logs PNG files under their stems."""
        self._notify(lambda tracker: tracker.log_figures(files))

    def log_results(self, results: dict[str, dict[str, float]]) -> None:
        """Logs results of models: numbers by model and by name."""
        self._notify(lambda tracker: tracker.log_results(results))

    def log_output(self, role: str, path: Path) -> None:
        """Logs the path of the result."""
        if self._trackers:
            output = Parent.of(role, path)
            self._notify(lambda tracker: tracker.log_output(output))

    def _notify(self, call: Callable[[Wandb | TensorBoard], None]) -> None:
        for tracker in self._trackers:
            try:
                call(tracker)
            except Exception as error:
                name = type(tracker).__name__
                if name not in self._warned:
                    self._warned.add(name)
                    logger.warning("%s fails (%r): training goes on, and %s has everything", name, error, FILE)


def log_report(
    run: Path, tracking: TrackingConfig, steps: int, figures: list[Path], results: dict[str, dict[str, float]]
) -> None:
    """Logs a whole report to the trackers of a finished training run.

    A tracker that does not start is only a warning, because everything is on disk.

    Args:
        run: folder of the training run.
        tracking: its trackers.
        steps: its number of steps.
        figures: PNG files.
        results: numbers by model and by name; see `Metrics.log_results`.
    """
    try:
        with Metrics(run, tracking, Manifest.read(run)) as metrics:
            metrics.resume(steps)
            metrics.log_output(run.name, run / "checkpoints")
            metrics.log_figures(figures)
            metrics.log_results(results)
    except UserError as error:
        logger.warning("the report is in no tracker: %s", error)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Reads all whole lines of a run's `metrics.jsonl`; a killed run may leave a partial one.

    Raises:
        CheckpointError: a line is damaged.
    """
    path = folder / FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    return [_read_line(line, f"{path}, line {i}") for i, line in enumerate(lines, start=1) if line.endswith("\n")]


def _read_line(line: str, where: str) -> dict[str, float]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is damaged ({error}): remove that line and run it again") from error
    if not isinstance(values, dict) or not isinstance(values.get(STEP), int):
        raise CheckpointError(f"{where} has no {STEP}: remove that line and run it again")
    return values
