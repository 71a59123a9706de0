"""The verb `compress`: a recipe, a chain of verbs that skips finished stages."""

import logging
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from minitron_megatron.artifacts.lease import sole_writer
from minitron_megatron.artifacts.manifest import MANIFEST
from minitron_megatron.config.compose import Stages, resolve_stages, to_yaml
from minitron_megatron.config.schema import CompressConfig
from minitron_megatron.config.verbs import verb_function
from minitron_megatron.errors import PREEMPTED, CheckpointError, ConfigError, Preempted, raise_if_any
from minitron_megatron.files import read_json, write_atomically, write_json
from minitron_megatron.launch.jobs import missing_inputs
from minitron_megatron.launch.local import run_ranks
from minitron_megatron.launch.world import ranks_to_start

logger = logging.getLogger(__name__)

SECONDS = "seconds.json"


@sole_writer
def compress(config: CompressConfig) -> Path:
    """Runs a recipe's stages in order, and ends with a table and a report.

    Every stage is checked before the first one starts. A stage whose layout needs several ranks runs in processes of
    its own.

    Returns:
        the run's folder.

    Raises:
        UserError: of the stage that failed. Finished stages are skipped the next time.
    """
    run_dir = Path(config.run_dir)
    stages = resolve_stages(config)
    raise_if_any(missing_inputs(stages, config.run_dir))
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(run_dir / "config.yaml", to_yaml(config))
    seconds = _read_seconds(run_dir)
    for number, (name, (verb, settings)) in enumerate(stages.items(), start=1):
        logger.info("stage %d of %d: %s (%s)", number, len(stages), name, verb)
        before = _newest(Path(settings.output))
        started = time.perf_counter()
        _run(run_dir, name, verb, settings)
        if _newest(Path(settings.output)) != before:
            seconds[name] = time.perf_counter() - started
            write_json(run_dir / SECONDS, seconds)
    finish(config, stages)
    return run_dir


def finish(config: CompressConfig, stages: Stages) -> None:
    """Writes the report of a recipe's stages, prints the table, and marks the run as done."""
    from minitron_megatron.plotting import FIGURES
    from minitron_megatron.report.html import write_report
    from minitron_megatron.report.results import Stage, read_evaluations
    from minitron_megatron.report.table import summary_table
    from minitron_megatron.tracking.metrics import log_report

    run_dir, marker = Path(config.run_dir), Path(config.run_dir) / "DONE"
    finished = marker.stat().st_mtime_ns if marker.exists() else 0
    seconds = _read_seconds(run_dir)
    done = [Stage(name, verb, Path(s.output), seconds.get(name)) for name, (verb, s) in stages.items()]
    report = write_report(run_dir, config.title, done)
    evaluations = read_evaluations(done)
    # Trackers get a report only once.
    is_new = any((_newest(stage.output) or 0) > finished for stage in done)
    for verb, settings in stages.values():
        if is_new and verb == "distill" and settings.tracking.trackers:
            figures = sorted((run_dir / FIGURES).glob("*.png"))
            results = {evaluation.name: evaluation.numbers() for evaluation in evaluations}
            log_report(Path(settings.output), settings.tracking, settings.steps, figures, results)
    console = Console()
    console.print(summary_table(evaluations))
    console.print(f"report: {report}", soft_wrap=True)
    marker.touch()


def _read_seconds(run_dir: Path) -> dict[str, float]:
    """Returns how long each stage took when it was made; without any if the file is damaged."""
    path = run_dir / SECONDS
    if not path.exists():
        return {}
    try:
        seconds = read_json(path, "the times of the stages")
    except CheckpointError as error:
        logger.warning("%s: the report leaves them out", error)
        return {}
    return {stage: float(took) for stage, took in seconds.items() if isinstance(took, int | float)}


def _run(run_dir: Path, name: str, verb: str, settings: Any) -> None:
    if ranks_to_start(verb, settings) > 1:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", prefix=f".{verb}.", dir=run_dir) as file:
            file.write(to_yaml(settings))
            file.flush()
            status = run_ranks(ranks_to_start(verb, settings), [verb, "--config", file.name])
        if status == PREEMPTED:
            raise Preempted(f"stages.{name} ({verb}) was stopped by a signal: run this again to resume")
        if status:
            raise ConfigError([f"stages.{name} ({verb}) failed: fix what its messages above say, and run this again"])
        return
    verb_function(verb)(settings)


def _newest(output: Path) -> int | None:
    """Returns the time at which a stage's output was finished, if it was."""
    manifest = output / MANIFEST
    return manifest.stat().st_mtime_ns if manifest.exists() else None
