"""Logs the metrics of a run: always to `metrics.jsonl`, and to the trackers that are asked for."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from minitron_megatron.artifacts.files import write_atomically
from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.config.schema import TrackingConfig
from minitron_megatron.errors import UserError
from minitron_megatron.tracking.trackers import STEP, TensorBoard, Wandb, start_trackers

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"


class Metrics:
    """Logs the metrics of one run, over all of its restarts. A context manager; one process alone uses it.

    Trackers start here, so that one that cannot start is an error before any work. Later nothing that goes wrong with a
    tracker stops training: it is a warning, once, and `metrics.jsonl` has everything.

    Args:
        folder: of the run.
        tracking: the trackers.
        manifest: of the run, for the trackers: its settings and what it is made from.

    Raises:
        ConfigError: a tracker that was asked for does not start.
    """

    def __init__(self, folder: Path, tracking: TrackingConfig, manifest: Manifest):
        self._folder = folder
        self._file: TextIO | None = None
        self._trackers = start_trackers(folder, tracking, manifest)
        self._warned: set[str] = set()

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()
        self._tell(lambda tracker: tracker.finish(failed=exception[0] is not None))

    def go_on(self, step: int) -> None:
        """Begins to log, or goes on after `step`; drops later lines, whose steps will be made again."""
        path, kept = self._folder / FILE, []
        if path.exists():
            kept = [values for values in read_metrics(self._folder) if values[STEP] <= step]
            write_atomically(path, "".join(json.dumps(values) + "\n" for values in kept))
        self._file = open(path, "a", buffering=1)  # noqa: SIM115
        self._tell(lambda tracker: tracker.go_on(kept))

    def log(self, values: dict[str, float]) -> None:
        """Writes one line. `progress/step` must be among the values."""
        assert self._file is not None, "go_on comes first"
        self._file.write(json.dumps(values) + "\n")
        self._tell(lambda tracker: tracker.log(values))

    def log_figures(self, files: list[Path]) -> None:
        """Hands PNG files to the trackers, which name each by its stem."""
        self._tell(lambda tracker: tracker.log_figures(files))

    def log_results(self, results: dict[str, dict[str, float]]) -> None:
        """Hands over what was measured of models: numbers by model and by name."""
        self._tell(lambda tracker: tracker.log_results(results))

    def log_output(self, role: str, path: Path) -> None:
        """Tells the trackers where the result lies."""
        if self._trackers:
            output = Parent.of(role, path)
            self._tell(lambda tracker: tracker.log_output(output))

    def _tell(self, call: Callable[[Wandb | TensorBoard], None]) -> None:
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
    """Hands a whole report to the trackers of a training run that has ended.

    A tracker that does not start any more is a warning: everything is on disk by now.

    Args:
        run: folder of the training run.
        tracking: its trackers.
        steps: that it has made.
        figures: PNG files.
        results: numbers by model and by name; see `Metrics.log_results`.
    """
    try:
        with Metrics(run, tracking, Manifest.read(run)) as metrics:
            metrics.go_on(steps)
            metrics.log_output(run.name, run / "checkpoints")
            metrics.log_figures(figures)
            metrics.log_results(results)
    except UserError as error:
        logger.warning("the report is in no tracker: %s", error)


def read_metrics(folder: Path) -> list[dict[str, float]]:
    """Reads all lines of a run's `metrics.jsonl`, without the half of one that a killed run leaves."""
    lines = (folder / FILE).read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]
