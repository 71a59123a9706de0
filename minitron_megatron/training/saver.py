"""When checkpoints of a run are removed: not before the next one is seen to work."""

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path

from minitron_megatron.checkpoint.dist_reader import TRACKER
from minitron_megatron.training.optimizer import TrainableModel
from minitron_megatron.training.state import RunState, remove_old, save_state, step_back

logger = logging.getLogger(__name__)


class Saver:
    """Saves a run, and keeps the checkpoints before until a finite loss has come from the weights of the latest.

    Its methods are collective, but for `way_out`.

    Args:
        root: folder of the run's checkpoints.
        keep: how many of the latest stay.
        models: what is trained, by the prefix of its keys; the student has none.
        args: that tell Megatron-LM what the network is.

    Attributes:
        loss_seen_since_save: whether a finite loss has come from the weights of the latest checkpoint.
        cleanup_pending: whether checkpoints before it are still to be removed.
    """

    def __init__(self, root: Path, keep: int, models: Mapping[str, TrainableModel], args: argparse.Namespace):
        self.root = root
        self.keep = keep
        self.models = models
        self.args = args
        self.loss_seen_since_save = False
        self.cleanup_pending = True

    def weights_updated(self) -> None:
        """Removes what is not kept: loss and gradient were finite, so that the latest checkpoint works."""
        if self.cleanup_pending:
            remove_old(self.root, self.keep)
            self.cleanup_pending = False

    def save(self, run: RunState, is_best: bool, is_last: bool, is_validated: bool, is_suspect: bool) -> None:
        """Saves the run.

        Args:
            run: how far it has come.
            is_best: whether it has the lowest held-out loss so far.
            is_last: whether training ends here, so that no step can show whether the weights work.
            is_validated: whether there is a held-out loss of these weights.
            is_suspect: whether these weights may be what is wrong; then nothing is removed.
        """
        save_state(self.root, run, self.models, is_best, self.args)
        self.loss_seen_since_save = is_validated
        self.cleanup_pending = is_suspect or not (is_validated or is_last)
        if is_suspect:
            logger.warning("step %d is saved in doubt: the checkpoints before it stay", run.step)
        elif not self.cleanup_pending:
            remove_old(self.root, self.keep)

    def distrust_latest(self) -> None:
        """Makes the checkpoint before the latest one the latest, if no finite loss has come from the latest."""
        if not self.loss_seen_since_save:
            step_back(self.root)

    def way_out(self) -> str:
        """Returns what a user can do after training has failed."""
        if (self.root / TRACKER).is_file():
            return f"start a new output from the last checkpoint in {self.root}"
        return "begin anew"
