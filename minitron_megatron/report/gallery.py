"""The figures of a report, with captions that say what to see in them."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from minitron_megatron.checkpoint.manifest import MANIFEST, Manifest
from minitron_megatron.pruning import plan as plans
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores
from minitron_megatron.report.curves import before_after, loss_curves
from minitron_megatron.report.figures import (
    ffn_importance,
    head_importance,
    hidden_importance,
    kept_map,
    layer_importance,
)
from minitron_megatron.report.kept import kept_ffn_share, kept_layers
from minitron_megatron.report.results import Evaluation, Stage
from minitron_megatron.training import metrics
from minitron_megatron.training.metrics import read_metrics


@dataclass
class Picture:
    """A figure of the report.

    Attributes:
        name: of its file, without the ending.
        caption: what to see in it.
    """

    name: str
    figure: Figure
    caption: str


def gallery(stages: list[Stage], evaluations: list[Evaluation]) -> list[Picture]:
    """Every figure for which the stages left the data, the result first."""
    pictures = []
    if evaluations:
        pictures.append(Picture("before_after", before_after(evaluations), _BEFORE_AFTER))
    trained = [s for s in stages if s.verb == "distill" and (s.output / metrics.FILE).is_file()]
    runs = {s.name: read_metrics(s.output) for s in trained}
    if any(runs.values()):
        pictures.append(Picture("loss", loss_curves(runs), _LOSS))
    used = set()
    for stage in stages:
        if stage.verb == "prune" and (stage.output / plans.FILE).is_file():
            folder = _scores_of(stage)
            used.add(folder)
            scores = Scores.read(folder) if folder and (folder / MANIFEST).is_file() else None
            pictures += _pruning(stage.name, Plan.read(stage.output), scores)
    for stage in stages:
        if stage.verb == "score" and stage.output.resolve() not in used and (stage.output / MANIFEST).is_file():
            pictures += _importance(stage.name, Scores.read(stage.output), None)
    return pictures


def _scores_of(stage: Stage) -> Path | None:
    """The folder of scores that a pruned checkpoint was cut by."""
    if not (stage.output / MANIFEST).is_file():
        return None
    return next((Path(p.path).resolve() for p in Manifest.read(stage.output).parents if p.role == "scores"), None)


def _pruning(name: str, plan: Plan, scores: Scores | None) -> list[Picture]:
    caption = "Blue stays, grey goes."
    if scores is None:
        return [Picture(f"{name}_kept", kept_map(plan), caption)]
    share = kept_ffn_share(plan, scores)[kept_layers(plan)]
    caption += f" The kept neurons of an MLP hold between {share.min():.0%} and {share.max():.0%} of its scores."
    return [Picture(f"{name}_kept", kept_map(plan, scores), caption), *_importance(name, scores, plan)]


def _importance(name: str, scores: Scores, plan: Plan | None) -> list[Picture]:
    return [
        Picture(f"{name}_ffn", ffn_importance(scores, plan), _FFN),
        Picture(f"{name}_heads", head_importance(scores, plan), _HEADS),
        Picture(f"{name}_hidden", hidden_importance(scores, plan), _HIDDEN),
        Picture(f"{name}_layers", layer_importance(scores, plan), _LAYERS),
    ]


_BEFORE_AFTER = (
    "Further left is smaller, further down is better. The dashed line is the teacher's loss, and an arrow is what "
    "training after pruning brought back."
)
_LOSS = (
    "Every panel is one term of the loss. Dots are the same term on held-out text: where they leave the line "
    "upwards, the student has begun to learn its training text by heart."
)
_FFN = (
    "A row is a layer. Where its colour is still strong at the cut, its neurons share the work evenly and the cut "
    "costs most; where it has faded before, the cut takes little away."
)
_HEADS = (
    "A cell is a query head. Every query group keeps the same number of heads, those of its highest scores, so a "
    "strong head can go where its whole group is strong."
)
_HIDDEN = (
    "A steep start means that a few channels stand out. Where the curve is flat at the cut, the channels just "
    "before it and just behind it matter about alike."
)
_LAYERS = (
    "One minus the mean cosine between what enters a layer and what leaves it. A short bar is a layer that "
    "changes its input little, and so is missed least; the first and the last are seldom among them."
)
