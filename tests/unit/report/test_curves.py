import math

import numpy as np
import pytest
from matplotlib.colors import same_color

from minitron_megatron.report.curves import before_after, loss_curves, smoothed
from minitron_megatron.report.results import Evaluation
from minitron_megatron.report.style import CUT, KEPT, SERIES, short, spread


def evaluation(name, made_by, parameters, loss):
    return Evaluation(name, made_by, parameters, parameters // 2, loss, math.exp(loss), 100)


def test_a_term_that_is_the_total_shares_its_panel(metric_lines):
    axes = loss_curves({"distilled": metric_lines()}).axes
    assert [a.get_title("left") for a in axes] == [
        "what is minimised: divergence from the teacher's predictions",
        "cross-entropy against the text",
        "learning rate",
    ]


def test_curves_stand_over_tokens(metric_lines):
    total, lm, rate = loss_curves({"distilled": metric_lines()}).axes
    training, _, heldout = total.lines
    assert training.get_xdata().tolist() == [1000, 2000, 3000, 4000, 5000, 6000]
    np.testing.assert_allclose(training.get_ydata(), [4, 2, 4 / 3, 1, 0.8, 4 / 6])
    assert heldout.get_xdata().tolist() == [3000, 6000]
    np.testing.assert_allclose(heldout.get_ydata(), [4 / 3 + 0.1, 4 / 6 + 0.1])
    np.testing.assert_allclose(lm.lines[0].get_ydata()[0], 6)
    np.testing.assert_allclose(rate.lines[0].get_ydata(), [1e-3 / n for n in range(1, 7)])
    assert [text.get_text() for text in rate.get_yticklabels()] == ["0", "0.001"]
    assert total.texts[0].get_text() == f"{4 / 6:.3f}"


def test_several_runs_keep_their_colour_and_name(metric_lines):
    """The second run has no teacher, so its term is missing in one panel, and colours must not shift there."""
    text_alone = [{k: v for k, v in line.items() if "kd" not in k} for line in metric_lines(4, start=8.0)]
    axes = loss_curves({"a": text_alone, "b": metric_lines(6)}).axes
    total, lm, kd, rate = axes
    assert total.get_title("left") == "what is minimised: the weighted sum"
    assert len(total.lines) == len(lm.lines) == 6 and len(kd.lines) == 3
    assert same_color(kd.lines[0].get_color(), SERIES[1]) and same_color(total.lines[0].get_color(), SERIES[0])
    assert [text.get_text() for text in total.texts] == ["2.000 a", "0.667 b"]
    assert [line.get_xdata()[-1] for line in rate.lines] == [4000, 6000]


def test_smoothing_follows_a_line_and_takes_out_noise():
    steps = np.arange(300.0)
    np.testing.assert_allclose(smoothed(steps)[:290], steps[:290])  # no lag, at the start neither
    noisy = 1 + np.random.default_rng(0).normal(size=300)
    assert abs(smoothed(noisy)[-1] - 1) < 0.5 and smoothed(noisy)[20:].std() < 0.4
    assert smoothed(np.array([3.0, 1.0])).tolist() == [3, 1]  # too few to smooth


def test_models_stand_at_their_size_and_loss():
    models = [
        evaluation("teacher", "import", 200, 2.0),
        evaluation("pruned", "prune", 120, 5.0),
        evaluation("distilled", "distill", 120, 3.0),
    ]
    axes = before_after(models).axes[0]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines] == [(200, 2), (120, 5), (120, 3)]
    assert same_color(axes.lines[1].get_color(), CUT) and same_color(axes.lines[2].get_color(), KEPT)
    assert axes.collections[0].get_segments()[0].tolist() == [[0, 2], [200, 2]]  # the teacher's loss
    arrows = [(text.xyann, text.xy) for text in axes.texts if text.arrow_patch]
    assert arrows == [((120, 5), (120, 3))]
    labels = [text.get_text() for text in axes.texts if not text.arrow_patch]
    assert labels[2] == f"distilled: 3.000 (perplexity {math.exp(3):.4g})"
    assert axes.get_xlim()[0] == 0 and axes.get_ylim()[1] > 5


def test_no_arrow_between_models_of_different_size():
    models = [evaluation("pruned", "prune", 120, 5.0), evaluation("other", "distill", 100, 3.0)]
    axes = before_after(models).axes[0]
    assert not [text for text in axes.texts if text.arrow_patch] and not axes.collections


def test_labels_are_spread_and_keep_their_order():
    assert spread([1.0, 5.0, 1.1], 0.5) == [1.0, 5.0, 1.5]
    assert spread([2.0, 2.0, 2.0], 1) == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("count, text", [(134515008, "134.5M"), (8030261248, "8.03B"), (999, "999"), (12288, "12.29K")])
def test_short_counts(count, text):
    assert short(count) == text
