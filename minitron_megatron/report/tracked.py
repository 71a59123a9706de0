"""The verb `distill` with what its trackers get from the report, of which training itself knows nothing."""

import logging
from pathlib import Path

from minitron_megatron.checkpoint.manifest import Manifest
from minitron_megatron.config.schema import DistillConfig
from minitron_megatron.config.verbs import import_for_good
from minitron_megatron.errors import UserError
from minitron_megatron.report.results import Evaluation

logger = logging.getLogger(__name__)


def distill(config: DistillConfig) -> Path:
    """`training.distill.distill`; at the end trackers get the run's loss curves as an image."""
    train = import_for_good("minitron_megatron.training.distill").distill
    return train(config, _draw)


def log_report(config: DistillConfig, figures: list[Path], evaluations: list[Evaluation]) -> None:
    """Hand a whole report to the trackers of a training run that has ended.

    A tracker that does not start any more is a warning, for everything is on disk by now.

    Args:
        config: of the training run.
        figures: PNG files.
        evaluations: of all models of the recipe.
    """
    from minitron_megatron.training.metrics import Metrics

    output = Path(config.output)
    try:
        with Metrics(output, config.tracking, Manifest.read(output)) as metrics:
            metrics.go_on(config.steps)
            metrics.log_output(output.name, output / "checkpoints")
            metrics.log_figures(figures)
            metrics.log_results({evaluation.name: evaluation.numbers() for evaluation in evaluations})
    except UserError as error:
        logger.warning("the report is in no tracker: %s", error)


def _draw(run: Path) -> list[Path]:
    from minitron_megatron.report.gallery import loss_pictures, write_pictures
    from minitron_megatron.report.html import FIGURES

    return write_pictures(loss_pictures({run.name: run}), run / FIGURES)
