"""Sends a run's metrics to trackers: Weights & Biases, TensorBoard.

When a killed run resumes, a tracker gets its whole history again from `metrics.jsonl`. Both trackers buffer what is
logged, W&B for 15 s and TensorBoard for 120 s, so after a kill they may lack steps, or have steps that will be
repeated.
"""

import json
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron_megatron.artifacts.lineage import Origin, in_creation_order, origin_of, origins_of
from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.config.schema import Tracker, TrackingConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.files import write_atomically
from minitron_megatron.tracking.provenance import provenance

WANDB_ID = "wandb_id"
TENSORBOARD = "tensorboard"
MADE_WITH = "made_with"
STEP = "progress/step"
EVALUATE = "evaluate"


class Wandb:
    """One Weights & Biases run over all restarts, whose id lies in the run's folder.

    Args:
        folder: of the run.
        tracking: its settings.
        manifest: of the run, for its settings and its lineage.

    Raises:
        ConfigError: the package is missing, the key is missing or refused, or the server does not answer.
    """

    def __init__(self, folder: Path, tracking: TrackingConfig, manifest: Manifest):
        try:
            import wandb
        except ImportError as e:
            raise _does_not_start(Tracker.WANDB, tracking, e, "pip install wandb") from e
        self._wandb, self._manifest = wandb, manifest
        path = folder / WANDB_ID
        if not path.exists():
            write_atomically(path, uuid.uuid4().hex[:8])
        try:
            self._run = wandb.init(
                project=tracking.project,
                name=tracking.name or folder.name,
                mode=tracking.mode,  # type: ignore[arg-type]  # one of these words, which `problems` checks
                id=path.read_text(),
                resume="allow",
                dir=folder,
                config={**manifest.config, MADE_WITH: provenance()},
                reinit="create_new",  # not a run that the caller has open
                settings=wandb.Settings(
                    init_timeout=tracking.timeout_s,
                    finish_timeout=tracking.timeout_s,
                    allow_val_change=True,  # of the host, if the run resumes elsewhere
                    # Do not upload output, code, or the URL of a git remote, which may contain a password.
                    console="off",
                    disable_code=True,
                    disable_git=True,
                ),
            )
        except Exception as e:  # whatever the reason, a requested tracker that does not start is an error
            limit = f"tracking.timeout_s = {tracking.timeout_s:g}"
            fix = f"run `wandb login`, see whether the server answers within {limit}, or set tracking.mode=offline"
            raise _does_not_start(Tracker.WANDB, tracking, e, fix) from e
        # W&B ignores lines whose `step=` is not above the last one, as for repeated steps. So it numbers the lines
        # itself, and draws curves over our steps, where the last line of a step counts.
        self._run.define_metric("*", step_metric=STEP, step_sync=False)

    def resume(self, lines: list[dict[str, float]]) -> None:
        """Logs the lines that W&B does not have yet, and the run's inputs.

        Offline, W&B does not know earlier sessions, so each session logs everything and can be synced by itself.
        """
        seen = self._run.summary.get(STEP) or 0
        for values in lines:
            if values[STEP] > seen:
                self.log(values)
        for origin in in_creation_order(origins_of(self._manifest)):
            artifact = self._artifact(origin)
            # `use_artifact` waits for the server, and does not work offline; this is what it does before it waits.
            self._run._log_artifact(artifact, is_user_created=True, use_after_commit=True)

    def log(self, values: dict[str, float]) -> None:
        self._run.log(values)

    def log_figures(self, files: list[Path]) -> None:
        self._run.log({f"figures/{file.stem}": self._wandb.Image(str(file)) for file in files})

    def log_results(self, results: dict[str, dict[str, float]]) -> None:
        table = self._wandb.Table(columns=["model", "measure", "value"])
        for model, name, value in _listed(results):
            table.add_data(model, name, value)
        numbers = {f"{EVALUATE}/{model}/{name}": value for model, name, value in _listed(results)}
        self._run.log({**numbers, "evaluations": table})

    def log_output(self, output: Parent) -> None:
        self._run.log_artifact(self._artifact(origin_of(output)))

    def finish(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))

    def _artifact(self, origin: Origin) -> Any:
        """Returns an artifact that refers to files in place, under the same name in every run."""
        parent, manifest = origin.parent, origin.manifest
        path = Path(parent.path).resolve()
        folder = path.parent.name if path.name == "checkpoints" else path.name
        metadata = {
            "role": parent.role,
            "path": str(path),
            "fingerprint": parent.fingerprint,
            "parents": {p.role: p.fingerprint for p in manifest.parents} if manifest else {},
        }
        # W&B allows only these characters, at most 128.
        name = f"{re.sub(r'[^A-Za-z0-9_.-]', '_', folder)[:100]}-{parent.fingerprint[:12]}"
        artifact = self._wandb.Artifact(name, type=manifest.kind if manifest else "source", metadata=metadata)
        if path.exists():
            # Without checksums W&B identifies a version by the names in it.
            artifact.add_reference(path.as_uri(), name=parent.fingerprint, checksum=False)
        return artifact


class TensorBoard:
    """TensorBoard's event files, in `tensorboard/` of the run's folder. Values are float32 there."""

    def __init__(self, folder: Path, tracking: TrackingConfig, manifest: Manifest):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as e:
            raise _does_not_start(Tracker.TENSORBOARD, tracking, e, "pip install tensorboard") from e
        # Purging from step 0 makes readers ignore earlier files: `resume` writes everything again.
        self._writer = SummaryWriter(str(folder / TENSORBOARD), purge_step=0)
        self._writer.add_text("config", _as_text(manifest.config))
        self._writer.add_text(MADE_WITH, _as_text(provenance()))

    def resume(self, lines: list[dict[str, float]]) -> None:
        for values in lines:
            self.log(values)

    def log(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, values[STEP])

    def log_figures(self, files: list[Path]) -> None:
        from matplotlib.image import imread

        for file in files:
            self._writer.add_image(f"figures/{file.stem}", imread(file), dataformats="HWC")

    def log_results(self, results: dict[str, dict[str, float]]) -> None:
        for model, name, value in _listed(results):
            self._writer.add_scalar(f"{EVALUATE}/{model}/{name}", value)

    def log_output(self, output: Parent) -> None:
        """Does nothing: TensorBoard has no lineage."""

    def finish(self, failed: bool) -> None:
        self._writer.close()


_KINDS: dict[Tracker, type[Wandb] | type[TensorBoard]] = {Tracker.WANDB: Wandb, Tracker.TENSORBOARD: TensorBoard}


def start_trackers(folder: Path, tracking: TrackingConfig, manifest: Manifest) -> list[Wandb | TensorBoard]:
    """Starts all trackers that are asked for.

    Raises:
        ConfigError: one of them does not start.
    """
    started: list[Wandb | TensorBoard] = []
    try:
        for kind in tracking.trackers:
            started.append(_KINDS[kind](folder, tracking, manifest))
    except ConfigError:
        for tracker in started:
            tracker.finish(failed=True)
        raise
    return started


def _listed(results: dict[str, dict[str, float]]) -> Iterator[tuple[str, str, float]]:
    for model, numbers in results.items():
        for name, value in numbers.items():
            yield model, name, float(value)


def _does_not_start(tracker: Tracker, tracking: TrackingConfig, error: Exception, fix: str) -> ConfigError:
    asked = ", ".join(t.value for t in tracking.trackers)
    settings = f"tracking.trackers = [{asked}]"
    if tracker is Tracker.WANDB:
        settings += f" with tracking.mode = {tracking.mode}"
    reason = " ".join(str(error).split())  # on one line
    return ConfigError([f"{settings}: {tracker.value} does not start ({reason}): {fix}, or leave it out"])


def _as_text(values: dict) -> str:
    """Formats values for TensorBoard, which reads text as Markdown: four spaces make a line code."""
    return "".join(f"    {line}\n" for line in json.dumps(values, indent=2).splitlines())
