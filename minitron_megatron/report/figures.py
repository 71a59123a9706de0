"""Figures of how important neurons, heads, query groups and channels are, and of where a plan cuts.

Every function returns a figure and leaves no state behind. Where the plan is optional and not given, nothing is cut.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape
from minitron_megatron.plotting import (
    CUT,
    INK,
    group_edges,
    group_ticks,
    heading,
    label,
    log_scale,
    new_figure,
    sequential,
    tidy,
    whole_numbers,
)
from minitron_megatron.pruning.kept import kept_groups, kept_heads, kept_hidden_share, kept_sublayers, num_kept_ffn
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores, descending, group_scores

_FAINT = 0.01  # of the layer's largest score: smaller ones have one colour
_SUBLAYERS = {ATTENTION: "attention sublayer", MLP: "MLP sublayer"}


def ffn_importance(scores: Scores, plan: Plan | None = None) -> Figure:
    """Neurons of every MLP by rank, each layer relative to its largest score, and how many of them stay."""
    ranked = _ranked(_relative(scores.ffn), scores.ffn, scores.rounds.get("ffn"))
    layers, ffn = ranked.shape
    figure = new_figure("Neurons of each MLP, most important first", _height(layers))
    axes = figure.subplots()
    # Neuron k spans k - 1 to k, so that a cut after k is at k.
    image = _heat_map(axes, ranked, LogNorm(_FAINT, 1, clip=True), (0, ffn, layers - 0.5, -0.5))
    tidy(axes, "rank of the neuron within its layer", _rows(scores.shape, MLP))
    _scale(image, [_FAINT, 0.1, 1], ["≤ 1%", "10%", "100%"])
    if plan is not None:
        cuts, kept = num_kept_ffn(plan), np.flatnonzero(kept_sublayers(plan, MLP))
        axes.barh(np.arange(layers), ffn - cuts, left=cuts, height=1, color="white", alpha=0.6)
        if (size := plan.target.ffn) < ffn:
            axes.vlines(cuts[kept], kept - 0.5, kept + 0.5, color=CUT, linewidth=2, clip_on=False)
            label(axes, f"{size} of {ffn} stay", (size, -0.5), (0, 5), ha="right", color=CUT)
    return figure


def head_importance(scores: Scores, plan: Plan | None = None) -> Figure:
    """Query heads of every attention, by place and by rank; a dot marks those that go."""
    rounds = scores.rounds.get("head")
    figure = _by_place_and_rank(
        "Query heads of each attention",
        "head",
        scores.shape,
        scores.head.flatten(1),
        rounds if rounds is None else rounds.flatten(1),
        kept_heads(plan) if plan else None,
    )
    places = figure.axes[0]
    groups, per_group = scores.shape.num_query_groups, scores.shape.heads_per_group
    white = min(3, 80 / scores.shape.num_heads)
    places.vlines(group_edges(groups, per_group), -0.5, len(scores.head) - 0.5, color="white", linewidth=white)
    group_ticks(places.xaxis, groups, per_group)
    places.set_xlabel("query group")
    return figure


def group_importance(scores: Scores, plan: Plan | None = None) -> Figure:
    """Whole query groups of every attention, by place and by rank; a dot marks those that go."""
    values, rounds = group_scores(scores.head, scores.rounds.get("head"))
    kept = kept_groups(plan) if plan else None
    return _by_place_and_rank("Query groups of each attention", "query group", scores.shape, values, rounds, kept)


def hidden_importance(scores: Scores, plan: Plan | None = None) -> Figure:
    """Channels of the residual stream by rank, and how many of them stay."""
    ranked = _ranked(scores.hidden.numpy(), scores.hidden, scores.rounds.get("hidden"))
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


def _by_place_and_rank(
    title: str, what: str, shape: ModelShape, scores: Tensor, rounds: Tensor | None, kept: np.ndarray | None
) -> Figure:
    """Parts of every attention, relative to the layer's largest score: by their place, and sorted.

    Args:
        title: of the figure.
        what: one part is.
        shape: of the whole network.
        scores, rounds: `[attention sublayer, part]`.
        kept: whether each stays; None if nothing is cut. Sublayers that go as a whole are veiled.
    """
    relative = _relative(scores)
    layers, count = relative.shape
    figure = new_figure(title, _height(layers))
    panels = figure.subplots(1, 2, sharey=True)
    for axes, values, first in zip(panels, (relative, _ranked(relative, scores, rounds)), (0, 1), strict=True):
        image = _heat_map(axes, values, Normalize(0, 1), (first - 0.5, first + count - 0.5, layers - 0.5, -0.5))
    for axes, how, counted in zip(panels, ("by place", "by rank"), (what, "rank within the layer"), strict=True):
        heading(axes, how)
        tidy(axes, counted)
        whole_numbers(axes.xaxis)
    panels[0].set_ylabel(_rows(shape, ATTENTION))
    _scale(image, [0, 0.5, 1], ["0%", "50%", "100%"])
    if kept is None:
        return figure
    stay = kept.any(1)
    cut = stay[:, None] & ~kept
    cell = 72 * min(3.1 / count, (_height(layers) - 1.2) / layers)  # its smaller side, in points
    dots = dict(s=min(20, (0.5 * cell) ** 2), color=CUT, edgecolors="white", linewidths=min(0.6, cell / 12))
    for axes, marks, first in zip(panels, (cut, _ranked(cut, scores, rounds)), (0, 1), strict=True):
        axes.barh(np.flatnonzero(~stay), count, left=first - 0.5, height=1, color="white", alpha=0.6)
        rows, columns = np.nonzero(marks)
        axes.scatter(first + columns, rows, **dots)
    if cut.any():
        text = f"dots: the {cut.sum(1).max()} of {count} that go"
        label(panels[1], text, (1, 1), (0, 5), ha="right", color=CUT, xycoords="axes fraction")
    return figure


def _ranked(values: np.ndarray, scores: Tensor, rounds: Tensor | None) -> np.ndarray:
    """`values` in the order of falling importance."""
    return np.take_along_axis(values, descending(scores, rounds), axis=-1)


def _relative(scores: Tensor) -> np.ndarray:
    """Each row divided by its largest value; a row of zeros stays."""
    largest = scores.numpy().max(axis=1, keepdims=True)
    return scores.numpy() / np.where(largest > 0, largest, 1)


def _height(layers: int) -> float:
    """Inches of a heat map with a row per layer."""
    return 1.2 + min(max(0.11 * layers, 1.5), 7)


def _rows(shape: ModelShape, kind: str) -> str:
    """What a row per sublayer of a kind counts."""
    return "layer" if shape.is_uniform else _SUBLAYERS[kind]


def _heat_map(axes: Axes, values: np.ndarray, norm: Normalize, extent: tuple) -> AxesImage:
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=sequential(), norm=norm, extent=extent)
    whole_numbers(axes.yaxis)
    return image


def _scale(image: AxesImage, ticks: list[float], labels: list[str]) -> None:
    bar = image.figure.colorbar(image, ax=image.figure.axes, fraction=0.04, pad=0.02, aspect=30)
    tidy(bar.ax, ylabel="score, relative to the layer's largest")
    bar.set_ticks(ticks, labels=labels)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)
