import matplotlib
import numpy as np
import pytest
from matplotlib.colors import same_color, to_rgba

from minitron_megatron.model.shape import layers_pattern
from minitron_megatron.pruning.plan import make_plan
from minitron_megatron.report.figures import (
    ffn_importance,
    head_importance,
    hidden_importance,
    kept_map,
    layer_importance,
)
from minitron_megatron.report.style import CUT, KEPT, png


@pytest.fixture
def kept_numbers(plan):
    return [position // 2 for position in plan.sublayers[::2]]


def test_neurons_are_sorted_and_relative_to_their_layer(scores):
    """A map of unsorted scores, or one scaled by the largest of all layers, would show no decline."""
    axes = ffn_importance(scores).axes[0]
    shown = axes.images[0].get_array()
    expected = [sorted(row / row.max(), reverse=True) for row in scores.ffn.numpy()]
    np.testing.assert_allclose(shown, expected)
    assert axes.images[0].get_extent() == [0, 10, 4.5, -0.5]
    assert not axes.collections  # no plan, no cut


def test_the_cut_lies_behind_the_last_kept_neuron_of_kept_layers(scores, plan, kept_numbers):
    axes = ffn_importance(scores, plan).axes[0]
    segments = axes.collections[0].get_segments()
    assert [segment[:, 0].tolist() for segment in segments] == [[6, 6]] * 3
    assert [segment[:, 1].mean() for segment in segments] == kept_numbers
    # What goes is veiled from the cut on: of a dropped layer, everything.
    veils = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert veils == [(6, 4) if layer in kept_numbers else (0, 10) for layer in range(5)]
    assert axes.texts[0].get_text() == "6 of 10 stay"


def test_a_layer_without_any_score_is_drawn_as_zero(scores):
    """A division by its largest score would make it NaN."""
    dead = scores.ffn.clone()
    dead[1] = 0
    shown = ffn_importance(type(scores)(scores.shape, scores.hidden, dead, scores.head, scores.layer)).axes[0].images[0]
    assert shown.get_array()[1].tolist() == [0] * 10


def test_dots_mark_the_kept_heads(scores, plan):
    axes = head_importance(scores, plan).axes[0]
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown, [row.flatten() / row.max() for row in scores.head.numpy()])
    dots = {tuple(xy) for xy in axes.collections[-1].get_offsets().astype(int).tolist()}
    expected = {
        (group * 3 + head, position // 2)
        for position, groups in plan.head.items()
        for group, heads in enumerate(groups)
        for head in heads
    }
    assert dots == expected and len(dots) == 3 * 4


def test_no_dots_where_every_head_stays(scores):
    narrow = make_plan(scores, scores.shape.replace(hidden=8))
    assert not head_importance(scores, narrow).axes[0].texts
    assert len(head_importance(scores, narrow).axes[0].collections) == 1  # the lines between groups


def test_hidden_scores_fall_and_the_cut_stands_at_the_number_kept(scores, plan):
    axes = hidden_importance(scores, plan).axes[0]
    curve, cut = axes.lines
    assert curve.get_xdata().tolist() == list(range(1, 13))
    assert curve.get_ydata().tolist() == sorted(scores.hidden.tolist(), reverse=True)
    assert set(cut.get_xdata()) == {8}
    # The scores are 1 to 12: the eight largest sum to 68 of 78.
    assert axes.texts[0].get_text() == f"8 of 12 stay, with {68 / 78:.1%} of all scores"


def test_dropped_layers_have_the_colour_of_the_cut(scores, plan, kept_numbers):
    axes = layer_importance(scores, plan).axes[0]
    assert [bar.get_height() for bar in axes.patches] == scores.layer.tolist()
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert all(same_color(c, KEPT if i in kept_numbers else CUT) for i, c in enumerate(colours))
    assert axes.texts[0].get_text() == "2 of 5 layers are dropped"


def test_without_a_plan_every_layer_is_kept(scores):
    axes = layer_importance(scores).axes[0]
    assert {bar.get_facecolor() for bar in axes.patches} == {to_rgba(KEPT)} and not axes.texts


def test_the_map_of_what_stays(scores, plan, kept_numbers):
    hidden, layers, neurons, heads = kept_map(plan, scores).axes
    assert np.flatnonzero(hidden.images[0].get_array()).tolist() == plan.hidden
    assert np.flatnonzero(layers.images[0].get_array()).tolist() == kept_numbers
    for layer, bar in enumerate(neurons.patches[5:]):
        if layer in kept_numbers:
            row = sorted(scores.ffn[layer].tolist())
            assert bar.get_height() == pytest.approx(sum(row[-6:]) / sum(row))
        else:
            assert bar.get_height() == 0
    kept = heads.images[0].get_array()
    assert kept.shape == (6, 5)
    assert kept.sum(0).tolist() == [4 if layer in kept_numbers else 0 for layer in range(5)]
    assert np.flatnonzero(kept[:3, kept_numbers[0]]).tolist() == plan.head[2 * kept_numbers[0]][0]
    titles = [axes.get_title("left") for axes in (hidden, layers, neurons, heads)]
    assert [title.split(",")[0].split(": ")[1] for title in titles] == ["8 of 12", "3 of 5", "6 of 10", "4 of 6"]


def test_without_scores_the_map_shows_the_number_of_neurons(plan, kept_numbers):
    neurons = kept_map(plan).axes[2]
    assert [b.get_height() for b in neurons.patches[5:]] == [0.6 if i in kept_numbers else 0 for i in range(5)]


def test_one_head_in_each_group(scores):
    """Multi-head attention: lines between groups would cover the cells."""
    shape = scores.shape.replace(num_query_groups=6, pattern=layers_pattern(5))
    many = type(scores)(shape, scores.hidden, scores.ffn, scores.head.reshape(5, 6, 1), scores.layer)
    axes = head_importance(many).axes[0]
    assert not axes.collections[0].get_segments()
    assert [text.get_text() for text in axes.get_xticklabels()] == list("012345")


def test_figures_are_png_files_and_leave_no_state(scores, plan):
    before = dict(matplotlib.rcParams)
    images = [png(figure) for figure in (ffn_importance(scores, plan), kept_map(plan, scores))]
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in images)
    assert dict(matplotlib.rcParams) == before
