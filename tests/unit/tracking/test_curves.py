import json

import numpy as np
from matplotlib.colors import same_color
from matplotlib.image import imread

from minitron_megatron.plotting import SERIES
from minitron_megatron.tracking.curves import loss_curves, smoothed, write_loss_curves


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


def test_the_figure_of_a_run_lies_in_its_folder(tmp_path, metric_lines):
    assert write_loss_curves(tmp_path) == []  # nothing was logged
    (tmp_path / "metrics.jsonl").write_text("")
    assert write_loss_curves(tmp_path) == [] and not (tmp_path / "figures").exists()
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines()))
    [path] = write_loss_curves(tmp_path)
    assert path == tmp_path / "figures/loss.png"
    height, width, _ = imread(path).shape
    assert width > height > 500
