"""Figures of scores and plans: how important everything is, where the plan cuts, and what stays.

Every function returns a figure and leaves no state behind. Where the plan is optional and not given, nothing is cut.
"""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullFormatter, PercentFormatter, StrMethodFormatter

from minitron_megatron.pruning.kept import kept_ffn_share, kept_heads, kept_hidden_share, kept_layers, num_kept_ffn
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores
from minitron_megatron.report.style import CUT, GRID, INK, KEPT, heading, label, new_figure, sequential, tidy

_FAINT = 0.01  # of the layer's largest score: smaller ones have one colour


def ffn_importance(scores: Scores, plan: Plan | None = None) -> Figure:
    """Neurons of every MLP by rank, each layer relative to its largest score, and how many of them stay."""
    ranked = _relative(-np.sort(-scores.ffn.numpy(), axis=1))
    layers, ffn = ranked.shape
    figure = new_figure("Neurons of each MLP, most important first", _height(layers))
    axes = figure.subplots()
    image = axes.imshow(
        ranked,
        aspect="auto",
        interpolation="nearest",
        cmap=sequential(),
        norm=LogNorm(_FAINT, 1, clip=True),
        extent=(0, ffn, layers - 0.5, -0.5),  # neuron k spans k - 1 to k, so that a cut after k is at k
    )
    tidy(axes, "rank of the neuron within its layer", "layer")
    _whole_numbers(axes.yaxis)
    _scale(image, [_FAINT, 0.1, 1], ["≤ 1%", "10%", "100%"])
    if plan is not None:
        cuts, rows = num_kept_ffn(plan), np.flatnonzero(kept_layers(plan))
        axes.barh(np.arange(layers), ffn - cuts, left=cuts, height=1, color="white", alpha=0.6)
        axes.vlines(cuts[rows], rows - 0.5, rows + 0.5, color=CUT, linewidth=2, clip_on=False)
        label(axes, f"{plan.target.ffn} of {ffn} stay", (plan.target.ffn, -0.5), (0, 5), ha="right", color=CUT)
    return figure


def head_importance(scores: Scores, plan: Plan | None = None) -> Figure:
    """Query heads of every attention, relative to the layer's largest score; a dot marks those that stay.

    Where all stay there is nothing to mark.
    """
    layers, groups, per_group = scores.head.shape
    relative = _relative(scores.head.numpy().reshape(layers, groups * per_group))
    figure = new_figure("Query heads of each attention, by query group", _height(layers))
    axes = figure.subplots()
    image = axes.imshow(relative, aspect="auto", cmap=sequential(), vmin=0, vmax=1)
    cell = 72 * min(6 / relative.shape[1], (_height(layers) - 1.2) / layers)  # the smaller side, in points
    axes.vlines(_group_edges(groups, per_group), -0.5, layers - 0.5, color="white", linewidth=min(3, cell / 3))
    tidy(axes, "query group", "layer")
    _whole_numbers(axes.yaxis)
    _group_ticks(axes.xaxis, groups, per_group)
    _scale(image, [0, 0.5, 1], ["0%", "50%", "100%"])
    if plan is not None and plan.target.num_heads < plan.source.num_heads:
        layer, head = np.nonzero(kept_heads(plan))
        axes.scatter(head, layer, s=min(20, (0.45 * cell) ** 2), color=CUT, edgecolors="white", linewidths=0.6)
        text = f"dots: the {plan.target.num_heads} of {plan.source.num_heads} that stay"
        label(axes, text, (1, 1), (0, 5), ha="right", color=CUT, xycoords="axes fraction")
    return figure


def hidden_importance(scores: Scores, plan: Plan | None = None) -> Figure:
    """Channels of the residual stream by rank, and how many of them stay."""
    ranked = -np.sort(-scores.hidden.numpy())
    ranks = np.arange(1, len(ranked) + 1)
    figure = new_figure("Channels of the residual stream, most important first", 3.2)
    axes = figure.subplots()
    axes.plot(ranks, ranked, color=INK, linewidth=1.6)
    axes.set_xlim(0, len(ranked))
    tidy(axes, "rank of the channel", "score (log scale)", grid="y")
    _log_scale(axes)
    if plan is not None:
        cut = len(plan.hidden)
        axes.axvspan(cut, len(ranked), color=CUT, alpha=0.12, linewidth=0)
        axes.axvline(cut, color=CUT, linewidth=2)
        text = f"{cut} of {len(ranked)} stay, with {kept_hidden_share(plan, scores):.1%} of all scores"
        label(axes, text, (cut, 1), (0, 5), ha="right", color=CUT, xycoords=("data", "axes fraction"))
    return figure


def layer_importance(scores: Scores, plan: Plan | None = None) -> Figure:
    """Block Influence of every layer; those that the plan drops are in another colour."""
    influence = scores.layer.numpy()
    kept = np.ones(len(influence), dtype=bool) if plan is None else kept_layers(plan)
    figure = new_figure("Block Influence: how much each layer changes the residual stream", 3.0)
    axes = figure.subplots()
    axes.bar(np.arange(len(influence)), influence, width=0.8, color=np.where(kept, KEPT, CUT))
    axes.set_xlim(-0.6, len(influence) - 0.4)
    tidy(axes, "layer", "Block Influence (log scale)", grid="y")
    _whole_numbers(axes.xaxis)
    _log_scale(axes)
    if not kept.all():
        text = f"{(~kept).sum()} of {len(kept)} layers are dropped"
        label(axes, text, (1, 1), (0, 5), ha="right", color=CUT, xycoords="axes fraction")
    return figure


def kept_map(plan: Plan, scores: Scores | None = None) -> Figure:
    """What stays of the network: channels, and layer by layer the neurons and the heads.

    With scores, a bar is the share of its MLP's scores that the kept neurons hold, else their share of the number.
    """
    source, target = plan.source, plan.target
    layers, heads = kept_layers(plan), kept_heads(plan).T
    heads_height = min(0.2 * len(heads), 3.0)
    figure = new_figure("What stays", 3.6 + heads_height)
    ratios = [0.4, 0.25, 1.1, heads_height]
    hidden, strip, neurons, grid = figure.subplots(4, gridspec_kw={"height_ratios": ratios})

    stays = np.isin(np.arange(source.hidden), plan.hidden)
    _binary(hidden, stays[None])
    heading(hidden, f"channels of the residual stream: {stays.sum()} of {source.hidden}")

    _binary(strip, layers[None])
    _cell_edges(strip, 1, len(layers), 0)
    heading(strip, f"layers: {layers.sum()} of {len(layers)}")

    numbers = np.arange(len(layers))
    neurons.bar(numbers, np.ones(len(layers)), color=GRID)
    neurons.bar(numbers, kept_ffn_share(plan, scores) if scores else num_kept_ffn(plan) / source.ffn, color=KEPT)
    neurons.set(xlim=(-0.5, len(layers) - 0.5), ylim=(0, 1))
    tidy(neurons)
    neurons.yaxis.set_major_locator(FixedLocator([0, 0.5, 1]))
    neurons.yaxis.set_major_formatter(PercentFormatter(1))
    what = ", and the share of its scores that they hold" if scores else ""
    heading(neurons, f"neurons of each MLP: {target.ffn} of {source.ffn}{what}")

    _binary(grid, heads)
    row = 72 * heads_height / len(heads)  # in points
    _cell_edges(grid, *heads.shape, min(1, row / 5))
    edges = _group_edges(source.num_query_groups, source.heads_per_group)
    grid.hlines(edges, -0.5, len(layers) - 0.5, color="white", linewidth=min(3, row / 2))
    tidy(grid, "layer", "query group")
    _group_ticks(grid.yaxis, source.num_query_groups, source.heads_per_group)
    heading(grid, f"query heads: {target.num_heads} of {source.num_heads}")

    for axes in (hidden, strip):
        axes.set_axis_off()
    for axes in (neurons, grid):
        _whole_numbers(axes.xaxis)
    neurons.tick_params(labelbottom=False)
    return figure


def _relative(scores: np.ndarray) -> np.ndarray:
    """Each row divided by its largest value; a row of zeros stays."""
    largest = scores.max(axis=1, keepdims=True)
    return scores / np.where(largest > 0, largest, 1)


def _height(layers: int) -> float:
    """Inches of a heat map with a row per layer."""
    return 1.2 + min(max(0.11 * layers, 1.5), 7)


def _scale(image: AxesImage, ticks: list[float], labels: list[str]) -> None:
    bar = image.figure.colorbar(image, ax=image.axes, fraction=0.04, pad=0.02, aspect=30)
    tidy(bar.ax, ylabel="score, relative to the layer's largest")
    bar.set_ticks(ticks, labels=labels)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _whole_numbers(axis: Axis) -> None:
    axis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def _log_scale(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers on it."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _group_edges(groups: int, per_group: int) -> np.ndarray:
    """Where one query group ends and the next begins; nowhere if each has one head."""
    return np.arange(1, groups if per_group > 1 else 1) * per_group - 0.5


def _group_ticks(axis: Axis, groups: int, per_group: int) -> None:
    """One tick in the middle of each query group, or of every so many where there are a lot."""
    shown = np.arange(0, groups, -(-groups // 16))
    axis.set_ticks((shown + 0.5) * per_group - 0.5, labels=[str(group) for group in shown])
    axis.set_tick_params(length=0)


def _binary(axes: Axes, kept: np.ndarray) -> None:
    """A map of what is kept `[row, column]`."""
    colours = ListedColormap([GRID, KEPT])
    axes.imshow(kept, aspect="auto", cmap=colours, vmin=0, vmax=1, interpolation="nearest")


def _cell_edges(axes: Axes, rows: int, columns: int, between_rows: float) -> None:
    """White lines between the cells of a map, those between its rows `between_rows` points wide."""
    axes.vlines(np.arange(1, columns) - 0.5, -0.5, rows - 0.5, color="white", linewidth=min(1.5, 90 / columns))
    axes.hlines(np.arange(1, rows) - 0.5, -0.5, columns - 0.5, color="white", linewidth=between_rows)
