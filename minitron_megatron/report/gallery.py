"""The figures of a report, with captions that say what to see in them."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from minitron_megatron.checkpoint.manifest import MANIFEST, Manifest
from minitron_megatron.config.schema import DepthSearch
from minitron_megatron.model.shape import MLP
from minitron_megatron.plotting import png
from minitron_megatron.pruning import plan as plans
from minitron_megatron.pruning.kept import kept_ffn_share, kept_sublayers
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores
from minitron_megatron.report.before_after import before_after
from minitron_megatron.report.depth import depth_importance
from minitron_megatron.report.figures import ffn_importance, group_importance, head_importance, hidden_importance
from minitron_megatron.report.kept import kept_map
from minitron_megatron.report.results import Evaluation, Stage
from minitron_megatron.tracking import metrics
from minitron_megatron.tracking.curves import loss_curves
from minitron_megatron.tracking.metrics import read_metrics


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


def draw(folder: Path, scores: Scores | None = None, plan: Plan | None = None) -> list[Path]:
    """Write the figures of scores, of a plan, or of a plan and the scores it was made from, as PNG files.

    Returns:
        the files, in `folder`, which is made if it is not there.
    """
    return write_pictures(pruning_pictures(scores, plan), folder)


def write_pictures(pictures: list[Picture], folder: Path) -> list[Path]:
    """Write `NAME.png` of every picture into `folder`, and say where they are."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{picture.name}.png" for picture in pictures]
    for picture, path in zip(pictures, paths, strict=True):
        path.write_bytes(png(picture.figure))
    return paths


def gallery(stages: list[Stage], evaluations: list[Evaluation]) -> list[Picture]:
    """Every figure for which the stages left the data, the result first."""
    pictures = []
    if evaluations:
        pictures.append(Picture("before_after", before_after(evaluations), _BEFORE_AFTER))
    pictures += loss_pictures({s.name: s.output for s in stages if s.verb == "distill"})
    used = set()
    for stage in stages:
        if stage.verb == "prune" and (stage.output / plans.FILE).is_file():
            used.add(_folder_of_scores(stage.output))
            scores = scores_of(stage.output)
            pictures += pruning_pictures(scores, Plan.read(stage.output), f"{stage.name}_")
    for stage in stages:
        if stage.verb == "score" and stage.output.resolve() not in used and (stage.output / MANIFEST).is_file():
            pictures += pruning_pictures(Scores.read(stage.output), prefix=f"{stage.name}_")
    return pictures


def loss_pictures(runs: dict[str, Path]) -> list[Picture]:
    """The losses of training runs, by the run's name; nothing if none has made a step."""
    lines = {name: read_metrics(folder) for name, folder in runs.items() if (folder / metrics.FILE).is_file()}
    return [Picture("loss", loss_curves(lines), _LOSS)] if any(lines.values()) else []


def pruning_pictures(scores: Scores | None, plan: Plan | None = None, prefix: str = "") -> list[Picture]:
    """The figures of scores, of a plan, or of both, what stays first.

    Args:
        scores, plan: what is known.
        prefix: of all names.
    """
    figures = {}
    if plan is not None:
        figures["kept"] = kept_map(plan, scores), _kept_caption(plan, scores)
    if scores is not None:
        rounds = _ROUNDS if "ffn" in scores.rounds else ""
        figures["ffn"] = ffn_importance(scores, plan), _FFN + rounds
        figures["heads"] = head_importance(scores, plan), _HEADS + rounds
        if 1 < scores.shape.num_query_groups < scores.shape.num_heads:
            figures["groups"] = group_importance(scores, plan), _GROUPS + rounds
        figures["hidden"] = hidden_importance(scores, plan), _HIDDEN + rounds
        if scores.depth:
            figures["layers"] = depth_importance(scores, plan), _LAYERS[scores.depth_settings.search] + rounds
    return [Picture(prefix + name, figure, caption) for name, (figure, caption) in figures.items()]


def scores_of(folder: Path) -> Scores | None:
    """The scores that the plan in `folder` was made from, if they are where they were."""
    found = _folder_of_scores(folder)
    return Scores.read(found) if found and (found / MANIFEST).is_file() else None


def _folder_of_scores(folder: Path) -> Path | None:
    if not (folder / MANIFEST).is_file():
        return None
    return next((Path(p.path).resolve() for p in Manifest.read(folder).parents if p.role == "scores"), None)


def _kept_caption(plan: Plan, scores: Scores | None) -> str:
    caption = "Blue stays, grey goes."
    if scores is None:
        return caption
    share = kept_ffn_share(plan, scores)[kept_sublayers(plan, MLP)]
    return f"{caption} The kept neurons of an MLP hold between {share.min():.0%} and {share.max():.0%} of its scores."


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
    "A cell is a query head. Every query group that stays keeps the same number of heads, those of its highest scores, "
    "so a strong head can go where its whole group is strong: a dot far to the left of the right panel."
)
_GROUPS = "A query group is as important as the sum of its heads, and takes its key and value head with it."
_HIDDEN = (
    "A steep start means that a few channels stand out. Where the curve is flat at the cut, the channels just "
    "before it and just behind it matter about alike."
)
_LAYERS = {
    DepthSearch.SINGLE: (
        "A low dot is missed least by itself; several of them together can be missed more than their sum. What is on "
        "grey ground is protected and never goes."
    ),
    DepthSearch.BLOCK: (
        "A dot is the block that begins there, and the lowest one is missed least. What is on orange ground goes; what "
        "is on grey ground is protected and never does."
    ),
    DepthSearch.GREEDY: (
        "From left to right, each time that one goes which is missed least beside those that are gone already. A "
        "value is of all that are gone by then, except for Block Influence, which is of the last one alone."
    ),
}
_ROUNDS = " Scored in several rounds: what an earlier round cut has the score it had then, and ranks behind the rest."
