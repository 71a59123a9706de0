"""Saves checkpoints, and removes old ones once the latest is known to work."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

from minitron_megatron.checkpoint.dist_reader import TRACKER
from minitron_megatron.training.optimizer import TrainableModel
from minitron_megatron.training.state import RunState, remove_old, save_state, step_back

logger = logging.getLogger(__name__)


class Saver:
    """Saves a run, and keeps older checkpoints until the weights of the latest have given a finite loss.

    All methods but `advice` are collective.

    Args:
        root: folder of the run's checkpoints.
        keep: number of latest checkpoints to keep.
        models: trained models, by the prefix of their keys; the student's is empty.
        args: of Megatron-LM, which describe the network; None if none do.

    Attributes:
        loss_seen_since_save: whether the weights of the latest checkpoint have given a finite loss.
        cleanup_pending: whether checkpoints before it are still to be removed.
    """

    def __init__(self, root: Path, keep: int, models: Mapping[str, TrainableModel], args: argparse.Namespace | None):
        self.root = root
        self.keep = keep
        self.models = models
        self.args = args
        self.loss_seen_since_save = False
        self.cleanup_pending = True

    def weights_updated(self) -> None:
        """Removes old checkpoints: loss and gradient were finite, so the latest one works."""
        if self.cleanup_pending:
            remove_old(self.root, self.keep)
            self.cleanup_pending = False

    def save(self, run: RunState, is_best: bool, is_last: bool, is_validated: bool, is_suspect: bool) -> None:
        """Saves the run.

        Args:
            run: its progress.
            is_best: whether it has the lowest held-out loss so far.
            is_last: whether training ends here, so that no later step can test the weights.
            is_validated: whether the held-out loss of these weights is known.
            is_suspect: whether these weights may be broken; then nothing is removed.
        """
        for model in self.models.values():
            if model.masks:
                model.masks.check()
        save_state(self.root, run, self.models, is_best, self.args)
        self.loss_seen_since_save = is_validated
        self.cleanup_pending = is_suspect or not (is_validated or is_last)
        if is_suspect:
            logger.warning("the weights saved at step %d may be broken: earlier checkpoints are kept", run.step)
        elif not self.cleanup_pending:
            remove_old(self.root, self.keep)

    def distrust_latest(self) -> None:
        """Steps back to the checkpoint before the latest, if the latest has not given a finite loss."""
        if not self.loss_seen_since_save:
            step_back(self.root)

    def advice(self) -> str:
        """Returns what a user can do after training has failed."""
        if (self.root / TRACKER).is_file():
            return f"start a new output from the last checkpoint in {self.root}"
        return "begin anew"
