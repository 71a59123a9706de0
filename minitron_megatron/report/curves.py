"""Figures of what training did: losses over tokens, and models by size and loss."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from minitron_megatron.report.results import Evaluation, find_teacher
from minitron_megatron.report.style import (
    CUT,
    INK,
    KEPT,
    MUTED,
    SERIES,
    heading,
    label,
    new_figure,
    short,
    spread,
    tidy,
)

_TERMS = {
    "lm": "cross-entropy against the text",
    "kd_logits": "divergence from the teacher's predictions",
    "kd_hidden": "distance from the teacher's hidden states",
}
_COLOURS = {"prune": CUT, "distill": KEPT, "export": KEPT}


def loss_curves(runs: dict[str, list[dict[str, float]]]) -> Figure:
    """Losses of one or several runs, a panel for each term, above their learning rates.

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


def before_after(evaluations: list[Evaluation]) -> Figure:
    """Models by size and held-out loss, with the teacher's loss as the mark to reach."""
    figure = new_figure("Held-out loss against size", 3.6)
    axes = figure.subplots()
    teacher = find_teacher(evaluations)
    if teacher:
        axes.hlines(teacher.loss, 0, teacher.parameters, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)))
    for evaluation in evaluations:
        colour = _COLOURS.get(evaluation.made_by, INK)
        axes.plot(evaluation.parameters, evaluation.loss, "o", color=colour, markersize=10)
    for pruned, distilled in _before_and_after(evaluations):
        arrow = dict(arrowstyle="->", color=MUTED, shrinkA=9, shrinkB=9)
        axes.annotate("", (distilled.parameters, distilled.loss), (pruned.parameters, pruned.loss), arrowprops=arrow)
    axes.set_xlim(0, 1.3 * max(e.parameters for e in evaluations))
    axes.margins(y=0.15)
    low, high = axes.get_ylim()
    heights = spread([e.loss for e in evaluations], 0.09 * (high - low))
    for evaluation, height in zip(evaluations, heights, strict=True):
        text = f"{evaluation.name}: {evaluation.loss:.3f} (perplexity {evaluation.perplexity:.4g})"
        backdrop = dict(facecolor="white", edgecolor="none", pad=1)
        label(axes, text, (evaluation.parameters, height), (10, 0), va="center", bbox=backdrop)
    tidy(axes, "parameters", "nats per token", grid="y")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda count, _: short(count)))
    return figure


def smoothed(values: np.ndarray) -> np.ndarray:
    """Centred means over a fifteenth of the values.

    They shrink at the start, where losses fall fast, and only lose their later half at the end, where the
    last values alone would say little.
    """
    positions = np.arange(len(values))
    before = np.minimum(positions, len(values) // 30)
    first, stop = positions - before, np.minimum(positions + before + 1, len(values))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[stop] - sums[first]) / (stop - first)


def _before_and_after(evaluations: list[Evaluation]) -> list[tuple[Evaluation, Evaluation]]:
    """Each trained model with the last pruned one before it that has its size."""
    pairs = []
    for i, distilled in enumerate(evaluations):
        before = [e for e in evaluations[:i] if e.made_by == "prune" and e.parameters == distilled.parameters]
        if before and distilled.made_by == "distill":
            pairs.append((before[-1], distilled))
    return pairs


def _panels(runs: dict[str, list[dict[str, float]]]) -> dict[str, str]:
    """The loss terms to draw and their titles. A term that is the total everywhere has no panel of its own."""
    lines = [line for run in runs.values() for line in run]
    terms = dict.fromkeys(key.removeprefix("loss/") for line in lines for key in line if key.startswith("loss/"))
    titles = {term: _TERMS.get(term, term) for term in terms if term != "total"}
    for term, title in titles.items():
        if all(line.get(f"loss/{term}") == line["loss/total"] for line in lines):
            return {"total": f"what is minimised: {title}"} | {t: titles[t] for t in titles if t != term}
    return {"total": "what is minimised: the weighted sum"} | titles


def _series(lines: list[dict[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and values of one metric, over the lines that have it."""
    points = [(line["progress/tokens"], line[key]) for line in lines if key in line]
    tokens, values = zip(*points) if points else ((), ())
    return np.array(tokens), np.array(values)


def _end_labels(axes: Axes, last: dict[str, float], colours: dict[str, str]) -> None:
    """At the right edge, the last smoothed value of every run, and its name where there are several."""
    low, high = axes.get_ylim()
    heights = spread(list(last.values()), 0.13 * (high - low))
    for (name, value), height in zip(last.items(), heights, strict=True):
        text = f"{value:.3f}" if len(colours) == 1 else f"{value:.3f} {name}"
        label(axes, text, (1, height), (6, 0), va="center", color=colours[name], xycoords=("axes fraction", "data"))
