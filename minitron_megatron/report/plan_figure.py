"""Draws what a plan keeps: a map of the channels, and layer by layer of the sublayers and their elements."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, PercentFormatter

from minitron_megatron.model.layers import PrunableAxis, Sublayer
from minitron_megatron.model.network import Network
from minitron_megatron.plotting import (
    FEW,
    GRID,
    KEPT,
    heading,
    new_figure,
    outer_edges,
    outer_ticks,
    span,
    tidy,
    whole_numbers,
)
from minitron_megatron.pruning.kept_shares import kept_elements, kept_share, kept_sublayers
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores, scored_axes


def kept_map(plan: Plan, scores: Scores | None = None) -> Figure:
    """Draws what is kept of the network: channels, and layer by layer the sublayers and the elements of their axes.

    Elements within an outer axis are drawn one by one if they are few. For others a bar is the share of the sublayer's
    scores that the kept elements hold or, without scores, their share of the number.
    """
    rows = _sublayer_rows(plan)
    axes = [_Axis(plan, kind, axis) for kind, axis in scored_axes(plan.source)]
    ratios = [0.4, 0.25 * len(rows), *(axis.height for axis in axes)]
    figure = new_figure("What the plan keeps", 1.9 + sum(ratios))
    channels, strip, *panels = figure.subplots(len(ratios), gridspec_kw={"height_ratios": ratios})
    _draw_channels(channels, plan)
    _draw_sublayers(strip, plan, rows)
    for panel, axis in zip(panels, axes, strict=True):
        axis.draw(panel, scores)
        whole_numbers(panel.xaxis)
        panel.set_xlim(-0.5, len(plan.source.layers) - 0.5)
        panel.tick_params(labelbottom=panel is panels[-1])
    if panels:
        panels[-1].set_xlabel("layer")
    return figure


def has_bars(network: Network, kind: type[Sublayer], axis: PrunableAxis) -> bool:
    """Returns whether `kept_map` draws the kept share of an axis, rather than its elements one by one."""
    sizes = [network.sublayers[position].total(axis) for position in network.positions(kind)]
    return kind.outer(axis) is None or max(sizes) > FEW


class _Axis:
    """A panel for an axis over all sublayers that have it. Lists have an entry for each.

    Attributes:
        layers: numbers of the transformer layers.
        kept: whether each element is kept, in the shape of the scores.
        height: of the panel, in inches.
    """

    def __init__(self, plan: Plan, kind: type[Sublayer], axis: PrunableAxis):
        self.plan, self.kind, self.axis, self.outer = plan, kind, axis, kind.outer(axis)
        positions = plan.source.positions(kind)
        self.layers = [plan.source.layer_of(position) for position in positions]
        self.kept = [kept_elements(plan, position, axis) for position in positions]
        self.has_bars = has_bars(plan.source, kind, axis)
        self.height = 1.1 if self.has_bars else min(max(0.2 * max(kept.size for kept in self.kept), 0.6), 3.0)

    @property
    def counts(self) -> str:
        """How many elements the kept sublayers keep: `6 of 10`."""
        return f"{span(kept.sum() for kept in self.kept if kept.any())} of {span(kept.size for kept in self.kept)}"

    def draw(self, panel: Axes, scores: Scores | None) -> None:
        if self.has_bars:
            self._draw_bars(panel, scores)
        else:
            self._draw_elements(panel)

    def _draw_bars(self, panel: Axes, scores: Scores | None) -> None:
        by_number = np.array([kept.mean() for kept in self.kept])
        shares = kept_share(self.plan, scores, self.kind, self.axis) if scores else by_number
        panel.bar(self.layers, np.ones(len(self.layers)), color=GRID)
        panel.bar(self.layers, shares, color=KEPT)
        panel.set_ylim(0, 1)
        tidy(panel)
        panel.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
        panel.yaxis.set_major_formatter(PercentFormatter(1))
        what = ", and the share of its scores that they hold" if scores else ""
        heading(panel, f"{self.axis.elements}s of each {self.kind.title}: {self.counts}{what}")

    def _draw_elements(self, panel: Axes) -> None:
        """Draws a map with a column for each layer, and lines between the elements of the outer axis."""
        assert self.outer is not None
        cells = np.full((max(kept.size for kept in self.kept), len(self.plan.source.layers)), np.nan)
        shapes: list[tuple[int, ...] | None] = [None] * cells.shape[1]
        for layer, kept in zip(self.layers, self.kept, strict=True):
            cells[: kept.size, layer], shapes[layer] = kept.ravel(), kept.shape
        _binary(panel, cells)
        row = 72 * self.height / len(cells)  # in points
        _cell_edges(panel, cells.shape, min(1, row / 5))
        for places, low, high in outer_edges(shapes):
            panel.hlines(places, low, high, color="white", linewidth=min(3, row / 2))
        if len({kept.shape for kept in self.kept}) == 1:
            tidy(panel, ylabel=self.outer.elements)
            outer_ticks(panel.yaxis, *self.kept[0].shape)
        else:
            tidy(panel, ylabel=self.axis.elements)
            whole_numbers(panel.yaxis)
        outer = [kept.any(1) for kept in self.kept]
        within = ""
        if any(stays.any() and not stays.all() for stays in outer):
            kept_outer = span(stays.sum() for stays in outer if stays.any())
            within = f", in {kept_outer} of {span(stays.size for stays in outer)} {self.outer.elements}s"
        heading(panel, f"{self.axis.elements}s: {self.counts}{within}")


def _sublayer_rows(plan: Plan) -> np.ndarray:
    """Returns whether sublayers are kept `[kind, layer]`, NaN where a layer has none; one row if all kinds agree."""
    source = plan.source
    rows = np.full((len(source.kinds), len(source.layers)), np.nan)
    for row, kind in zip(rows, source.kinds, strict=True):
        row[[source.layer_of(position) for position in source.positions(kind)]] = kept_sublayers(plan, kind)
    return rows[:1] if all(np.array_equal(rows[0], row, equal_nan=True) for row in rows) else rows


def _draw_channels(panel: Axes, plan: Plan) -> None:
    channels = plan.source.hidden_size
    _binary(panel, np.isin(np.arange(channels), plan.hidden)[None])
    heading(panel, f"channels of the residual stream: {len(plan.hidden)} of {channels}")
    panel.set_axis_off()


def _draw_sublayers(panel: Axes, plan: Plan, rows: np.ndarray) -> None:
    """Draws a strip for each of `rows`, see `_sublayer_rows`."""
    _binary(panel, rows)
    _cell_edges(panel, rows.shape, 2)
    tidy(panel)
    panel.spines[:].set_visible(False)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.tick_params(length=0)
    counts = [f"{np.nansum(row):.0f} of {np.isfinite(row).sum()}" for row in rows]
    if len(rows) == 1:
        heading(panel, f"layers: {counts[0]}")
        return
    titles = [kind.title for kind in plan.source.kinds]
    panel.set_yticks(range(len(rows)), labels=titles)
    heading(panel, "sublayers: " + ", ".join(f"{title} {count}" for title, count in zip(titles, counts, strict=True)))


def _binary(axes: Axes, kept: np.ndarray) -> None:
    """Draws a map of what is kept `[row, column]`; NaN where there is nothing."""
    colours = ListedColormap([GRID, KEPT])
    axes.imshow(kept, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")


def _cell_edges(axes: Axes, shape: tuple[int, ...], between_rows: float) -> None:
    """Draws white lines between the cells of a map `[row, column]`, `between_rows` points wide between rows."""
    rows, columns = shape
    axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="white", linewidth=min(1.5, 90 / columns))
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=between_rows)
