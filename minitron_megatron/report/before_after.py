"""Draws models by size and loss, before and after training."""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from minitron_megatron.plotting import CUT, INK, KEPT, MUTED, label, new_figure, short, spread, tidy
from minitron_megatron.report.results import CUTTING, Evaluation, find_teacher

_COLOURS: dict[str | None, str] = {"distill": KEPT, "export": KEPT, **dict.fromkeys(CUTTING, CUT)}


def before_after(evaluations: list[Evaluation]) -> Figure:
    """Draws models by size and held-out loss, with the teacher's loss as the mark to reach."""
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


def _before_and_after(evaluations: list[Evaluation]) -> list[tuple[Evaluation, Evaluation]]:
    """Returns each trained model with the last one of its size before it that was cut."""
    pairs = []
    for i, distilled in enumerate(evaluations):
        before = [e for e in evaluations[:i] if e.made_by in CUTTING and e.parameters == distilled.parameters]
        if before and distilled.made_by == "distill":
            pairs.append((before[-1], distilled))
    return pairs
