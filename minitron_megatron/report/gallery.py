"""Makes the figures of a report, with captions."""

from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from minitron_megatron.artifacts.manifest import MANIFEST, Manifest
from minitron_megatron.config.schema import DepthSearch
from minitron_megatron.files import replacing
from minitron_megatron.model.axes import HIDDEN
from minitron_megatron.model.layers import PrunableAxis, Sublayer
from minitron_megatron.plotting import FEW, png
from minitron_megatron.pruning import plan as plans
from minitron_megatron.pruning.kept_shares import kept_share, kept_sublayers
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores, scored_axes
from minitron_megatron.report.before_after import before_after
from minitron_megatron.report.depth import depth_importance
from minitron_megatron.report.figures import axis_importance, hidden_importance
from minitron_megatron.report.plan_figure import has_bars, kept_map
from minitron_megatron.report.results import Evaluation, Stage
from minitron_megatron.tracking import metrics
from minitron_megatron.tracking.curves import loss_curves
from minitron_megatron.tracking.metrics import read_metrics


@dataclass
class Picture:
    """A figure of the report.

    Attributes:
        name: of its file, without suffix.
        caption: how to read it.
    """

    name: str
    figure: Figure
    caption: str


def draw(folder: Path, scores: Scores | None = None, plan: Plan | None = None) -> list[Path]:
    """Writes the figures of scores, of a plan, or of a plan and its scores, as PNG files.

    Returns:
        the files in `folder`, which is created if needed.
    """
    return write_pictures(pruning_pictures(scores, plan), folder)


def write_pictures(pictures: list[Picture], folder: Path) -> list[Path]:
    """Writes `NAME.png` of every picture into `folder`, and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{picture.name}.png" for picture in pictures]
    for picture, path in zip(pictures, paths, strict=True):
        with replacing(path) as temporary:
            temporary.write_bytes(png(picture.figure))
    return paths


def gallery(stages: list[Stage], evaluations: list[Evaluation]) -> list[Picture]:
    """Draws every figure for which the stages left the data, the result first."""
    pictures = []
    if evaluations:
        pictures.append(Picture("before_after", before_after(evaluations), _BEFORE_AFTER))
    pictures += loss_pictures({s.name: s.output for s in stages if s.verb == "distill"})
    used: set[Path | None] = set()
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
    """Draws the losses of training runs, by the run's name; nothing before the first step."""
    lines = {name: read_metrics(folder) for name, folder in runs.items() if (folder / metrics.FILE).is_file()}
    return [Picture("loss", loss_curves(lines), _LOSS)] if any(lines.values()) else []


def pruning_pictures(scores: Scores | None, plan: Plan | None = None, prefix: str = "") -> list[Picture]:
    """Draws the figures of scores, of a plan, or of both, beginning with what is kept.

    Args:
        scores, plan: at least one of them.
        prefix: of all names.
    """
    figures = {}
    if plan is not None:
        figures["kept"] = kept_map(plan, scores), _kept_caption(plan, scores)
    if scores is not None:
        rounds = _ROUNDS if HIDDEN.name in scores.rounds else ""
        for kind, axis in _drawn_axes(scores):
            caption = _axis_caption(scores, kind, axis) + rounds
            figures[axis.setting] = axis_importance(scores, axis.setting, plan), caption
        figures[HIDDEN.name] = hidden_importance(scores, plan), _HIDDEN + rounds
        if scores.depth:
            figures["layers"] = depth_importance(scores, plan), _LAYERS[scores.depth_settings.search] + rounds
    return [Picture(prefix + name, figure, caption) for name, (figure, caption) in figures.items()]


def scores_of(folder: Path) -> Scores | None:
    """Reads the scores that the plan in `folder` was made from, if they are still there."""
    scores = _folder_of_scores(folder)
    return Scores.read(scores) if scores and (scores / MANIFEST).is_file() else None


def _folder_of_scores(folder: Path) -> Path | None:
    if not (folder / MANIFEST).is_file():
        return None
    scores = Manifest.read(folder).parent("scores")
    return Path(scores.path).resolve() if scores else None


def _drawn_axes(scores: Scores) -> list[tuple[type[Sublayer], PrunableAxis]]:
    """Returns the scored axes, each followed by its outer axis, unless that has one element within each of its own."""
    drawn, network = [], scores.network
    for kind, axis in scored_axes(network):
        drawn.append((kind, axis))
        shapes = [network.sublayers[position].score_shape(axis) for position in network.positions(kind)]
        if (outer := kind.outer(axis)) and any(min(shape) > 1 for shape in shapes):
            drawn.append((kind, outer))
    return drawn


def _axis_caption(scores: Scores, kind: type[Sublayer], axis: PrunableAxis) -> str:
    """Returns the caption of the figure of an axis."""
    element, outer = axis.elements, kind.outer(axis)
    if axis not in kind.scored():
        inner = next(other for other in kind.prunable if kind.outer(other) == axis)
        return f"The score of a {element} is the sum over its {inner.elements}s, which are kept or dropped with it."
    network = scores.network
    if max(network.sublayers[position].total(axis) for position in network.positions(kind)) > FEW:
        return _BY_RANK.format(element=element)
    caption = f"A cell is one {element}."
    return caption if outer is None else f"{caption} {_NESTED.format(element=element, outer=outer.elements)}"


def _kept_caption(plan: Plan, scores: Scores | None) -> str:
    caption, source = "Blue is kept, grey is dropped.", plan.source
    if scores is None:
        return caption
    for kind, axis in scored_axes(source):
        stays = kept_sublayers(plan, kind)
        if stays.any() and has_bars(source, kind, axis):
            shares = kept_share(plan, scores, kind, axis)[stays]
            least, most = f"{shares.min():.0%}", f"{shares.max():.0%}"
            caption += f" The kept {axis.elements}s of each {kind.title} hold between {least} and {most} of its scores."
    return caption


_BEFORE_AFTER = (
    "Further left is smaller, further down is better. The dashed line is the teacher's loss; an arrow shows what "
    "training after pruning recovered."
)
_LOSS = (
    "Every panel is one term of the loss. Dots are the same term on held-out text: where they rise above the line, the "
    "student overfits its training text."
)
_BY_RANK = (
    "A row is a layer. Where its colour is still strong at the cut, its {element}s are about equally important and the "
    "cut costs most; where it has faded before, the cut removes little."
)
_NESTED = (
    "Every kept {outer} keeps the same number of {element}s, those of highest score, so an important one can be "
    "dropped where its whole {outer} is important: a dot far to the left in the right panel."
)
_HIDDEN = (
    "A steep start means that a few channels stand out. Where the curve is flat at the cut, the channels on both sides "
    "of it are about equally important."
)
_LAYERS = {
    DepthSearch.SINGLE: (
        "The lowest dot is the least important by itself; dropping several together can cost more than the sum of "
        "their values. Units on a grey background are protected and never dropped."
    ),
    DepthSearch.BLOCK: (
        "A dot is the block that begins there; the lowest is the least important. Layers on an orange background are "
        "dropped; those on a grey background are protected and never dropped."
    ),
    DepthSearch.GREEDY: (
        "From left to right, each step drops the unit that is then the least important. A value is the effect of all "
        "units dropped so far, except for Block Influence, which is that of the last one."
    ),
}
_ROUNDS = " Scored in several rounds: elements cut in an earlier round have their score of that round, and rank last."
