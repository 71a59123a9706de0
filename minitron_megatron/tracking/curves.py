"""Draws the losses of training runs over tokens."""

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from minitron_megatron.plotting import FIGURES, SERIES, heading, label, new_figure, png, short, spread, tidy
from minitron_megatron.tracking.metrics import FILE, read_metrics

_TERMS = {
    "lm": "cross-entropy against the text",
    "kd_logits": "divergence from the teacher's predictions",
    "kd_hidden": "distance from the teacher's hidden states",
}


def write_loss_curves(run: Path) -> list[Path]:
    """Writes `loss.png` into the folder of figures of a training run.

    Args:
        run: folder of the run.

    Returns:
        the files that were written: none before the first step.
    """
    lines = read_metrics(run) if (run / FILE).is_file() else []
    if not lines:
        return []
    path = run / FIGURES / "loss.png"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(png(loss_curves({run.name: lines})))
    return [path]


def loss_curves(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Draws the losses of one or several runs, a panel for each term, above their learning rates.

    Args:
        runs: the lines of `metrics.jsonl` by the run's name.
    """
    terms = _panels(runs)
    colours = dict(zip(runs, SERIES * len(runs)))
    figure = new_figure("Loss in nats per token: training (line, smoothed) and held-out (dots)", 1.6 + 2 * len(terms))
    *panels, rates = figure.subplots(len(terms) + 1, sharex=True, height_ratios=[2] * len(terms) + [0.7])
    for axes, (term, title) in zip(panels, terms.items(), strict=True):
        last = {}
        for name, lines in runs.items():
            tokens, losses = _series(lines, f"loss/{term}")
            if not len(losses):
                continue
            smooth = smoothed(losses)
            axes.plot(tokens, losses, color=colours[name], linewidth=0.7, alpha=0.35)
            axes.plot(tokens, smooth, color=colours[name], linewidth=1.8)
            heldout = dict(marker="o", linestyle="none", markersize=6, markeredgecolor="white")
            axes.plot(*_series(lines, f"val/{term}"), color=colours[name], **heldout)
            last[name] = smooth[-1]
        tidy(axes, grid="y")
        heading(axes, title)
        _end_labels(axes, last, colours)
    for name, lines in runs.items():
        rates.plot(*_series(lines, "optim/lr"), color=colours[name], linewidth=1.4)
    tidy(rates, "tokens", grid="y")
    heading(rates, "learning rate")
    peak = max((line.get("optim/lr", 0) for lines in runs.values() for line in lines), default=0)
    rates.set_yticks([0, peak], labels=["0", f"{peak:.3g}"])
    rates.set_xlim(left=0)
    rates.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: short(tokens)))
    return figure


def smoothed(values: np.ndarray) -> np.ndarray:
    """Returns centred means over a fifteenth of the values.

    They shrink at the start, where losses fall fast, and only lose their later half at the end, where the
    last values alone would say little.
    """
    positions = np.arange(len(values))
    before = np.minimum(positions, len(values) // 30)
    first, stop = positions - before, np.minimum(positions + before + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[stop] - sums[first]) / (stop - first)


def _panels(runs: dict[str, list[dict[str, float]]]) -> dict[str, str]:
    """Returns the loss terms to draw and their titles. A term that is the total everywhere has no panel of its own."""
    lines = [line for run in runs.values() for line in run]
    terms = dict.fromkeys(key.removeprefix("loss/") for line in lines for key in line if key.startswith("loss/"))
    titles = {term: _TERMS.get(term, term) for term in terms if term != "total"}
    for term, title in titles.items():
        if all(line.get(f"loss/{term}") == line["loss/total"] for line in lines if math.isfinite(line["loss/total"])):
            return {"total": f"what is minimised: {title}"} | {t: titles[t] for t in titles if t != term}
    return {"total": "what is minimised: the weighted sum"} | titles


def _series(lines: list[dict[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns tokens and finite values of one metric, over the lines that have it."""
    points = [(line["progress/tokens"], line[key]) for line in lines if math.isfinite(line.get(key, math.nan))]
    tokens, values = zip(*points) if points else ((), ())
    return np.array(tokens), np.array(values)


def _end_labels(axes: Axes, last: dict[str, float], colours: dict[str, str]) -> None:
    """Writes at the right edge the last smoothed value of every run, and its name where there are several."""
    low, high = axes.get_ylim()
    heights = spread(list(last.values()), 0.13 * (high - low))
    for (name, value), height in zip(last.items(), heights, strict=True):
        text = f"{value:.3f}" if len(colours) == 1 else f"{value:.3f} {name}"
        label(axes, text, (1, height), (6, 0), va="center", color=colours[name], xycoords=("axes fraction", "data"))
