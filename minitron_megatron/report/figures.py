"""Draws the importance of channels and of the elements of sublayers, and where a plan cuts.

Every function returns a figure and leaves no state behind. Without a plan no cut is drawn.
"""

from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter

from minitron_megatron.model.axes import HIDDEN
from minitron_megatron.model.layers import prunable_axes
from minitron_megatron.plotting import (
    CUT,
    FEW,
    INK,
    MUTED,
    heading,
    label,
    log_scale,
    new_figure,
    outer_edges,
    outer_ticks,
    sequential,
    span,
    tidy,
    whole_numbers,
)
from minitron_megatron.pruning.kept_shares import kept_elements, kept_hidden_share
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores, descending

_FAINT = 0.01  # share of the layer's largest score; smaller ones have the same colour


def axis_importance(scores: Scores, setting: str, plan: Plan | None = None) -> Figure:
    """Draws the elements of an axis, a row for each sublayer that has it, relative to that sublayer's largest score.

    Few elements are drawn by position and by rank, with a dot on those that the plan drops; many only by rank, with a
    line where the plan cuts. The score of an outer element is the sum over its elements.

    Args:
        scores: of the network.
        setting: of the axis, as in `target.*`; at least one sublayer of the network has it.
        plan: draws its cut.
    """
    rows = _Rows(scores, setting, plan)
    return _by_place_and_rank(rows) if max(rows.sizes) <= FEW else _by_rank(rows)


def hidden_importance(scores: Scores, plan: Plan | None = None) -> Figure:
    """Draws the channels of the residual stream by rank, and how many of them are kept."""
    ranked = scores.hidden.numpy()[descending(scores.hidden, scores.rounds.get(HIDDEN.name))]
    figure = new_figure("Channels of the residual stream, most important first", 3.2)
    axes = figure.subplots()
    axes.plot(np.arange(1, len(ranked) + 1), ranked, color=INK, linewidth=1.6)
    axes.set_xlim(0, len(ranked))
    tidy(axes, "rank of the channel", "score (log scale)", grid="y")
    log_scale(axes)
    if plan is not None and (cut := len(plan.hidden)) < len(ranked):
        axes.axvspan(cut, len(ranked), color=CUT, alpha=0.12, linewidth=0)
        axes.axvline(cut, color=CUT, linewidth=2)
        text = f"{cut} of {len(ranked)} stay, with {kept_hidden_share(plan, scores):.1%} of all scores"
        side = "right" if cut > len(ranked) / 2 else "left"
        label(axes, text, (cut, 1), (0, 5), ha=side, color=CUT, xycoords=("data", "axes fraction"))
    return figure


class _Rows:
    """An axis over all sublayers that have it. Lists have an entry for each, arrays the shape of its scores.

    Attributes:
        axis, outer: the axis, and its outer axis, if any.
        title: `Neurons of each MLP`.
        layers: numbers of the transformer layers.
        shapes: of the scores.
        sizes: numbers of elements.
        relative: scores divided by the sublayer's largest; zeros stay.
        scores, rounds: what elements are ranked by.
        kept: whether each element is kept; None without a plan.
    """

    def __init__(self, scores: Scores, setting: str, plan: Plan | None):
        kind, self.axis = prunable_axes()[setting]
        self.outer = kind.outer(self.axis)
        self.title = f"{self.axis.elements.capitalize()}s of each {kind.title}"
        positions = scores.network.positions(kind)
        self.layers = [scores.network.layer_of(position) for position in positions]
        pairs = [scores.along(position, self.axis) for position in positions]
        self.scores, self.rounds = [values for values, _ in pairs], [rounds for _, rounds in pairs]
        self.shapes = [tuple(values.shape) for values in self.scores]
        self.sizes = np.array([values.numel() for values in self.scores])
        self.relative = [_relative(values.numpy()) for values in self.scores]
        self.kept = None if plan is None else [kept_elements(plan, position, self.axis) for position in positions]

    def by_place(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Returns the values of every element by position, a row for each sublayer."""
        return _stacked([array.ravel() for array in arrays])

    def by_rank(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Returns the same in the order of falling importance within the sublayer."""
        ordered = []
        for array, scores, rounds in zip(arrays, self.scores, self.rounds, strict=True):
            ordered.append(array.ravel()[descending(scores.flatten(), None if rounds is None else rounds.flatten())])
        return _stacked(ordered)

    def by_rank_within(self, arrays: list[np.ndarray]) -> np.ndarray:
        """Returns the same in the order of falling importance within each outer element, as a mean over these."""
        ordered = []
        for array, scores, rounds in zip(arrays, self.scores, self.rounds, strict=True):
            ranked = np.take_along_axis(array, descending(scores, rounds), axis=-1)
            ordered.append(ranked.reshape(-1, ranked.shape[-1]).mean(0))
        return _stacked(ordered)


def _by_rank(rows: _Rows) -> Figure:
    """Draws a map of the elements by rank, and where the plan cuts."""
    lengths = np.array([shape[-1] for shape in rows.shapes])
    num_rows, longest = len(lengths), max(lengths)
    title = f"{rows.title}, most important first"
    figure = new_figure(f"{title}, mean over its {rows.outer.elements}s" if rows.outer else title, _height(num_rows))
    axes = figure.subplots()
    # Element k spans k - 1 to k, so that a cut after k is at k.
    extent = (0, longest, num_rows - 0.5, -0.5)
    image = _heat_map(axes, rows.by_rank_within(rows.relative), LogNorm(_FAINT, 1, clip=True), extent, rows.layers)
    within = rows.outer.elements if rows.outer else "layer"
    tidy(axes, f"rank of the {rows.axis.elements} within its {within}", "layer")
    _scale(image, [_FAINT, 0.1, 1], ["≤ 1%", "10%", "100%"])
    if min(lengths) < longest:  # tells blank from faint
        axes.vlines(lengths, np.arange(num_rows) - 0.5, np.arange(num_rows) + 0.5, color=MUTED, linewidth=0.8)
    if rows.kept is None:
        return figure
    cuts = np.array([kept.sum(-1).max() for kept in rows.kept])  # 0 for a dropped sublayer
    axes.barh(np.arange(num_rows), lengths - cuts, left=cuts, height=1, color="white", alpha=0.6)
    lines = np.flatnonzero((cuts > 0) & (cuts < lengths))
    if len(lines):
        axes.vlines(cuts[lines], lines - 0.5, lines + 0.5, color=CUT, linewidth=2, clip_on=False)
        text = f"{span(cuts[cuts > 0])} of {span(lengths)} stay"
        text += f" in each {rows.outer.elements}" if rows.outer else ""
        label(axes, text, (max(cuts[lines]), -0.5), (0, 5), ha="right", color=CUT)
    return figure


def _by_place_and_rank(rows: _Rows) -> Figure:
    """Draws two maps of the elements, by position and by rank. Sublayers that are dropped as a whole are faded."""
    num_rows, longest = len(rows.sizes), max(rows.sizes)
    figure = new_figure(rows.title, _height(num_rows))
    panels = figure.subplots(1, 2, sharey=True)
    orders = (rows.by_place, rows.by_rank)
    for axes, order, first in zip(panels, orders, (0, 1), strict=True):
        extent = (first - 0.5, first + longest - 0.5, num_rows - 0.5, -0.5)
        image = _heat_map(axes, order(rows.relative), Normalize(0, 1), extent, rows.layers)
    counted = (rows.axis.elements, "rank within the layer")
    for axes, how, xlabel in zip(panels, ("by place", "by rank"), counted, strict=True):
        heading(axes, how)
        tidy(axes, xlabel)
        whole_numbers(axes.xaxis)
    panels[0].set_ylabel("layer")
    _scale(image, [0, 0.5, 1], ["0%", "50%", "100%"])
    if rows.kept is not None:
        cell = 72 * min(3.1 / longest, (_height(num_rows) - 1.2) / num_rows)  # its smaller side, in points
        stay = np.array([kept.any() for kept in rows.kept])
        gone = [kept.any() & ~kept for kept in rows.kept]
        for axes, order, first in zip(panels, orders, (0, 1), strict=True):
            axes.barh(np.flatnonzero(~stay), rows.sizes[~stay], left=first - 0.5, height=1, color="white", alpha=0.6)
            places, columns = np.nonzero(order(gone) == 1)
            size, edge = min(20, (0.5 * cell) ** 2), min(0.6, cell / 12)
            axes.scatter(first + columns, places, s=size, color=CUT, edgecolors="white", linewidths=edge)
        if counts := [marked.sum() for marked, stays in zip(gone, stay, strict=True) if stays and marked.any()]:
            text = f"dots: the {span(counts)} of {span(rows.sizes)} that go"
            label(panels[1], text, (1, 1), (0, 5), ha="right", color=CUT, xycoords="axes fraction")
    if rows.outer is not None:
        _mark_outer(panels[0], rows)
    return figure


def _mark_outer(axes: Axes, rows: _Rows) -> None:
    """Draws white lines between the outer elements of a map by position, with ticks if all rows have the same."""
    assert rows.outer is not None
    for places, low, high in outer_edges(rows.shapes):
        axes.vlines(places, low, high, color="white", linewidth=min(3, 80 / max(rows.sizes)))
    if all(before == after for before, after in pairwise(rows.shapes)):
        outer_ticks(axes.xaxis, *rows.shapes[0])
        axes.set_xlabel(rows.outer.elements)


def _relative(scores: np.ndarray) -> np.ndarray:
    """Divides by the largest value; zeros stay."""
    return scores / (scores.max() or 1)


def _stacked(rows: list[np.ndarray]) -> np.ndarray:
    """Stacks rows of unequal lengths, filled up with NaN."""
    stacked = np.full((len(rows), max(map(len, rows))), np.nan)
    for number, row in enumerate(rows):
        stacked[number, : len(row)] = row
    return stacked


def _height(rows: int) -> float:
    """Returns the height of a heat map in inches."""
    return 1.2 + min(max(0.11 * rows, 1.5), 7)


def _heat_map(
    axes: Axes, values: np.ndarray, norm: Normalize, extent: tuple[float, float, float, float], layers: list[int]
) -> AxesImage:
    """Draws a map with a row for each of some layers, blank where a value is NaN."""

    def layer_at(row: float, _: int) -> str:
        return str(layers[round(row)]) if 0 <= row < len(layers) else ""

    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=sequential(), norm=norm, extent=extent)
    whole_numbers(axes.yaxis)
    axes.yaxis.set_major_formatter(FuncFormatter(layer_at))
    return image


def _scale(image: AxesImage, ticks: list[float], labels: list[str]) -> None:
    bar = image.figure.colorbar(image, ax=image.figure.axes, fraction=0.04, pad=0.02, aspect=30)
    tidy(bar.ax, ylabel="score, relative to the layer's largest")
    bar.set_ticks(ticks, labels=labels)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
