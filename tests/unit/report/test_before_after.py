import math

from matplotlib.colors import same_color

from minitron_megatron.plotting import CUT, KEPT
from minitron_megatron.report.before_after import before_after
from minitron_megatron.report.results import Evaluation


def evaluation(name, made_by, parameters, loss):
    return Evaluation(name, made_by, parameters, parameters // 2, loss, math.exp(loss), 100)


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
