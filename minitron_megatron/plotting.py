"""The style of all figures: one palette, axes without frames, labels beside what they name.

Colours are Okabe and Ito's, which colour-blind readers can tell apart. Each has one meaning throughout: blue is kept,
vermilion is a cut and what it removes, grey is reference.
"""

import io
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

KEPT = "#0072B2"
CUT = "#D55E00"
INK = "#1f2933"
MUTED = "#66717d"
GRID = "#e3e7eb"
SERIES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]

FIGURES = "figures"  # subfolder of an output folder

WIDTH = 8.0  # inches; with 160 dots per inch, twice the pixels of a column of text
_DPI = 160
FEW = 128
"""Largest number of elements of a sublayer that are drawn one by one: the query heads of today's largest networks."""
_TITLE, _LABEL, _TICK = 11, 9.5, 8.5  # points


def new_figure(title: str, height: float, width: float = WIDTH) -> Figure:
    """Makes an empty figure with its title at the left.

    Args:
        title: what the figure shows.
        height, width: in inches.
    """
    padding = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06)
    figure = Figure(figsize=(width, height), layout=padding, facecolor="white")
    figure.suptitle(title, x=0.01, ha="left", fontsize=_TITLE, fontweight="bold", color=INK)
    return figure


def tidy(axes: Axes, xlabel: str = "", ylabel: str = "", grid: Literal["x", "y", "both"] | None = None) -> None:
    """Removes the frame, makes ticks short and grey, and draws a light grid along `grid`, if given."""
    axes.set_xlabel(xlabel, fontsize=_LABEL, color=MUTED)
    axes.set_ylabel(ylabel, fontsize=_LABEL, color=MUTED)
    axes.tick_params(labelsize=_TICK, color=GRID, labelcolor=MUTED, which="both", length=3)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    axes.set_axisbelow(True)
    if grid:
        axes.grid(axis=grid, color=GRID, linewidth=0.8)


def heading(axes: Axes, text: str) -> None:
    """Sets the title of one panel, at its left."""
    axes.set_title(text, loc="left", fontsize=_LABEL, color=INK, pad=4)


def label(axes: Axes, text: str, xy: tuple, offset: tuple[float, float] = (0, 0), **changes: Any) -> None:
    """Writes `text` at `xy` in data coordinates, moved by `offset` in points. It may reach beyond the axes."""
    settings = {"fontsize": _LABEL, "color": INK, "xycoords": "data", "annotation_clip": False, **changes}
    axes.annotate(text, xy, xytext=offset, textcoords="offset points", **settings)


def whole_numbers(axis: Axis) -> None:
    """Sets ticks at integers only."""
    axis.set_major_locator(MaxNLocator(integer=True, nbins=12))


def log_scale(axes: Axes) -> None:
    """Makes the y axis logarithmic, with plain numbers as labels."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def outer_edges(shapes: Sequence[tuple[int, ...] | None]) -> Iterator[tuple[np.ndarray, float, float]]:
    """Yields the lines between elements of an outer axis, for sublayers drawn side by side with their inner elements.

    Args:
        shapes: `(outer elements, inner elements of each)` of every sublayer; None for a gap.

    Yields:
        for each run of equal sublayers, positions of the lines, and where over the sublayers they begin and end. No
        lines where each outer element has only one inner element.
    """
    start = 0
    for shape, run in groupby(shapes):
        stop = start + len(list(run))
        if shape is not None and shape[1] > 1:
            yield np.arange(1, shape[0]) * shape[1] - 0.5, start - 0.5, stop - 0.5
        start = stop


def outer_ticks(axis: Axis, outer: int, inner: int) -> None:
    """Sets a tick in the middle of each outer element, of at most 16 of them."""
    shown = np.arange(0, outer, -(-outer // 16))
    axis.set_ticks((shown + 0.5) * inner - 0.5, labels=[str(element) for element in shown])
    axis.set_tick_params(length=0)


def sequential() -> Colormap:
    """Makes a colormap from light grey for low values to dark blue for high ones."""
    return LinearSegmentedColormap.from_list("much", ["#f3f6f9", "#a9cbe2", "#3d86bb", "#0b3c66", "#071f38"])


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Moves values up as little as needed so that their labels stand at least `gap` apart."""
    moved = list(values)
    order = sorted(range(len(moved)), key=moved.__getitem__)
    for lower, upper in pairwise(order):
        moved[upper] = max(moved[upper], moved[lower] + gap)
    return moved


def short(count: float) -> str:
    """Formats a count with a unit: `134.5M`."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.4g}{letter}"
    return f"{count:.4g}"


def span(values: Iterable[int]) -> str:
    """Formats the range of values: `4 to 6`, or one number where all are equal."""
    numbers = sorted(set(values)) or [0]
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def png(figure: Figure) -> bytes:
    """Renders a figure as a PNG file."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=_DPI)
    return file.getvalue()
