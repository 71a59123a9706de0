"""Draws the depth scores, with a panel for each criterion."""

from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from minitron_megatron.config.schema import DepthCriterion, DepthSearch, Unit
from minitron_megatron.plotting import (
    CUT,
    GRID,
    KEPT,
    MUTED,
    heading,
    label,
    log_scale,
    new_figure,
    tidy,
    whole_numbers,
)
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import DEPTH, DepthSettings, Scores

_PANELS = {
    DepthCriterion.BLOCK_INFLUENCE: "Block Influence: 1 − cosine between input and output",
    DepthCriterion.LOSS: "increase of the loss, in nats per token",
    DepthCriterion.KL: "divergence from the whole network's predictions, in nats per token",
    DepthCriterion.LOGITS: "squared change of the logits, relative to their square",
    DepthCriterion.ACCURACY: "decrease of the accuracy",
}
_WIDE = 10  # times the smallest value: wider ranges are drawn on a logarithmic scale
# Layers have the first style; kinds of sublayers take turns.
_STYLES: list[dict[str, Any]] = [
    dict(marker="o", markersize=5.5, linestyle="solid", linewidth=0.9),
    dict(marker="D", markersize=5, linestyle=(0, (3, 2)), linewidth=0.9, markerfacecolor="white"),
    dict(marker="s", markersize=5, linestyle=(0, (1, 2)), linewidth=0.9),
    dict(marker="^", markersize=5.5, linestyle=(0, (5, 1, 1, 1)), linewidth=0.9, markerfacecolor="white"),
]


def depth_importance(scores: Scores, plan: Plan | None = None) -> Figure:
    """Draws what skipping each unit, each block, or one unit after another does, and marks what the plan drops.

    Args:
        scores: with at least one depth criterion.
        plan: marks what it drops.
    """
    units = _Units(scores, plan)
    figure = new_figure(_title(scores.depth_settings), 0.75 + 1.75 * len(scores.depth))
    panels = figure.subplots(len(scores.depth), sharex=True, squeeze=False)[:, 0]
    for axes, (name, values) in zip(panels, scores.depth.items(), strict=True):
        tidy(axes, grid="y")
        criterion = DepthCriterion(name)
        heading(axes, _PANELS[criterion])
        units.draw(axes, values.numpy())
        if criterion is not DepthCriterion.ACCURACY:
            _scale(axes)
    panels[-1].set_xlabel(units.xlabel)
    if units.dropped.any():
        text = f"{units.dropped.sum()} of {len(units.dropped)} {scores.depth_settings.unit.value}s are dropped"
        label(panels[0], text, (1, 1), (0, 5), ha="right", color=CUT, xycoords="axes fraction")
    if scores.depth_settings.unit is Unit.SUBLAYER:
        for (title, _), style in zip(units.kinds, cycle(_STYLES)):
            panels[0].plot([], [], color=MUTED, label=title, **style)
        corner = "upper left" if scores.depth_settings.search is DepthSearch.GREEDY else "upper center"
        panels[0].legend(loc=corner, ncols=2, frameon=False, labelcolor=MUTED, fontsize=8.5)
    return figure


class _Units:
    """The skipped units as arrays: position, kind, and whether the plan drops them.

    Attributes:
        kinds: title of each kind, and which units are of it; all layers are of one kind.
        numbers: of their transformer layers.
        dropped: whether the plan drops each.
        protected: units that are never dropped.
        xlabel: what the horizontal axis counts.
    """

    def __init__(self, scores: Scores, plan: Plan | None):
        network, self.settings = scores.network, scores.depth_settings
        units = self.settings.units(network)
        if self.settings.unit is Unit.LAYER:
            self.kinds = [(self.settings.unit.value, np.ones(len(units), dtype=bool))]
        else:
            first = [unit[0] for unit in units]
            self.kinds = [(kind.title, np.isin(first, network.positions(kind))) for kind in network.kinds]
        self.numbers = np.array([network.layer_of(unit[0]) for unit in units])
        kept = range(len(network.sublayers)) if plan is None else plan.sublayers
        self.dropped = np.array([not np.isin(unit, kept).any() for unit in units])
        self.protected = self.settings.protected(network)
        self.x, self.shown, self.xlabel = self.numbers, np.ones(len(units), dtype=bool), Unit.LAYER.value
        if self.settings.search is DepthSearch.GREEDY:
            self.x = scores.rounds[DEPTH].numpy()
            self.shown = self.x <= self.settings.drop
            self.xlabel += ", in the order of dropping"
        elif self.settings.search is DepthSearch.BLOCK:
            self.xlabel = f"first layer of the block of {self.settings.drop}"

    def draw(self, axes: Axes, values: np.ndarray) -> None:
        """Draws values of one criterion `[unit]`; what was not measured leaves a gap."""
        greedy, block = (self.settings.search is search for search in (DepthSearch.GREEDY, DepthSearch.BLOCK))
        styled = [(own, style) for (_, own), style in zip(self.kinds, cycle(_STYLES))]
        if greedy:
            order = np.argsort(self.x)[: self.settings.drop]
            axes.plot(self.x[order], values[order], color=MUTED, linewidth=0.9)
        else:
            for own, style in styled:
                axes.plot(self.x[own], values[own], color=MUTED, **{**style, "marker": ""})
        marked = self.dropped
        if block:  # a value is of the block that begins there
            marked = np.array([self.dropped[i : i + self.settings.drop].all() for i in range(len(self.dropped))])
            for number in self.numbers[self.dropped]:
                axes.axvspan(number - 0.5, number + 0.5, color=CUT, alpha=0.12, linewidth=0)
        for own, style in styled:
            for which, colour in ((~marked, KEPT), (marked, CUT)):
                where = which & self.shown & own
                axes.plot(self.x[where], values[where], color=colour, **{**style, "linestyle": ""})
        if greedy:
            axes.set_xticks(self.x[order], labels=[str(number) for number in self.numbers[order]])
            return
        for number in dict.fromkeys(self.numbers[self.protected].tolist()):
            axes.axvspan(number - 0.5, number + 0.5, color=GRID, alpha=0.6, linewidth=0)
        axes.set_xlim(-0.6, self.numbers[-1] + 0.6)
        whole_numbers(axes.xaxis)


def _scale(axes: Axes) -> None:
    """Chooses a logarithmic scale for values of different magnitudes, linear around zero if some are not positive."""
    drawn = np.concatenate([line.get_ydata() for line in axes.lines])
    drawn = drawn[np.isfinite(drawn)]
    sizes = np.abs(drawn)
    if sizes.max() <= _WIDE * sizes.min():
        axes.set_ylim(1.15 * min(0, drawn.min()), 1.15 * max(0, drawn.max()) or 1)
    elif drawn.min() > 0:
        log_scale(axes)
    else:
        least = 10 ** np.floor(np.log10(max(np.median(sizes), sizes.max() / 1000)))
        axes.set_yscale("symlog", linthresh=least)
        axes.set_ylim(2 * min(drawn.min(), -least / 4), 2 * max(drawn.max(), least / 4))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _title(settings: DepthSettings) -> str:
    return {
        DepthSearch.SINGLE: f"Effect of skipping each {settings.unit.value} by itself",
        DepthSearch.BLOCK: f"Effect of skipping each block of {settings.drop} layers",
        DepthSearch.GREEDY: f"Effect of skipping one {settings.unit.value} after another",
    }[settings.search]
