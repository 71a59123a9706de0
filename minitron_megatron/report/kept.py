"""Figure of what a plan keeps: a map of the channels, and layer by layer of the sublayers, neurons and heads."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, PercentFormatter

from minitron_megatron.model.shape import ATTENTION, MLP, ModelShape
from minitron_megatron.plotting import (
    GRID,
    KEPT,
    group_edges,
    group_ticks,
    heading,
    new_figure,
    tidy,
    whole_numbers,
)
from minitron_megatron.pruning.kept import kept_ffn_share, kept_heads, kept_sublayers, num_kept_ffn
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores


def columns(shape: ModelShape) -> tuple[np.ndarray, str]:
    """In which column each sublayer stands, and what the columns count."""
    positions = np.arange(len(shape.pattern))
    return (positions // 2, "layer") if shape.is_uniform else (positions, "position in the pattern")


def kept_map(plan: Plan, scores: Scores | None = None) -> Figure:
    """What stays of the network: channels, and layer by layer the sublayers, the neurons and the heads.

    With scores, a bar is the share of its MLP's scores that the kept neurons hold, else their share of the number.
    """
    source, target = plan.source, plan.target
    column, xlabel = columns(source)
    attention, mlp = (column[source.sublayers(kind)] for kind in (ATTENTION, MLP))
    num_columns = column[-1] + 1
    sublayers = np.full((2, num_columns), np.nan)
    sublayers[0, attention], sublayers[1, mlp] = kept_sublayers(plan, ATTENTION), kept_sublayers(plan, MLP)
    apart = (sublayers[0] != sublayers[1]).any()
    rows = sublayers if apart else sublayers[:1]
    heads = np.full((source.num_heads, num_columns), np.nan)
    heads[:, attention] = kept_heads(plan).T

    heads_height = min(max(0.2 * len(heads), 0.6), 3.0)
    ratios = [0.4, 0.25 * len(rows), 1.1, heads_height]
    figure = new_figure("What stays", 1.9 + sum(ratios))
    hidden, strip, neurons, grid = figure.subplots(4, gridspec_kw={"height_ratios": ratios})

    _binary(hidden, np.isin(np.arange(source.hidden), plan.hidden)[None])
    heading(hidden, f"channels of the residual stream: {target.hidden} of {source.hidden}")
    hidden.set_axis_off()

    _binary(strip, rows)
    _cell_edges(strip, *rows.shape, 2)
    tidy(strip)
    strip.spines[:].set_visible(False)
    strip.set_xticks([])
    strip.set_yticks(*(([0, 1], ["attention", "MLP"]) if apart else ([],)))
    strip.tick_params(length=0)
    counts = [f"{len(target.sublayers(kind))} of {len(source.sublayers(kind))}" for kind in (ATTENTION, MLP)]
    heading(strip, f"sublayers: attention {counts[0]}, MLP {counts[1]}" if apart else f"layers: {counts[0]}")

    neurons.bar(mlp, np.ones(len(mlp)), color=GRID)
    neurons.bar(mlp, kept_ffn_share(plan, scores) if scores else num_kept_ffn(plan) / source.ffn, color=KEPT)
    neurons.set(xlim=(-0.5, num_columns - 0.5), ylim=(0, 1))
    tidy(neurons)
    neurons.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    neurons.yaxis.set_major_formatter(PercentFormatter(1))
    what = ", and the share of its scores that they hold" if scores else ""
    heading(neurons, f"neurons of each MLP: {target.ffn} of {source.ffn}{what}")

    _binary(grid, heads)
    row = 72 * heads_height / len(heads)  # in points
    _cell_edges(grid, *heads.shape, min(1, row / 5))
    groups, per_group = source.num_query_groups, source.heads_per_group
    grid.hlines(group_edges(groups, per_group), -0.5, num_columns - 0.5, color="white", linewidth=min(3, row / 2))
    tidy(grid, xlabel, "query group")
    group_ticks(grid.yaxis, groups, per_group)
    of_groups = f", in {target.num_query_groups} of {groups} query groups" if target.num_query_groups < groups else ""
    heading(grid, f"query heads: {target.num_heads} of {source.num_heads}{of_groups}")

    for axes in (neurons, grid):
        whole_numbers(axes.xaxis)
    neurons.tick_params(labelbottom=False)
    return figure


def _binary(axes: Axes, kept: np.ndarray) -> None:
    """A map of what is kept `[row, column]`; NaN where there is nothing."""
    colours = ListedColormap([GRID, KEPT])
    axes.imshow(kept, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")


def _cell_edges(axes: Axes, rows: int, columns: int, between_rows: float) -> None:
    """White lines between the cells of a map, those between its rows `between_rows` points wide."""
    axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="white", linewidth=min(1.5, 90 / columns))
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=between_rows)
