from dataclasses import replace

import matplotlib
import numpy as np
import torch

from minitron_megatron.config.schema import TargetConfig
from minitron_megatron.plotting import png
from minitron_megatron.pruning.plan import make_plan
from minitron_megatron.report.figures import ffn_importance, group_importance, head_importance, hidden_importance
from minitron_megatron.report.kept import kept_map


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
    shown = ffn_importance(replace(scores, ffn=dead)).axes[0].images[0]
    assert shown.get_array()[1].tolist() == [0] * 10


def dots_of(axes):
    return {tuple(xy) for xy in axes.collections[0].get_offsets().astype(int).tolist()}


def test_dots_mark_the_heads_that_go(scores, plan, kept_numbers):
    places, ranks, _ = head_importance(scores, plan).axes
    heads = scores.head.flatten(1).numpy()
    np.testing.assert_allclose(places.images[0].get_array(), [row / row.max() for row in heads])
    np.testing.assert_allclose(ranks.images[0].get_array(), [sorted(row / row.max(), reverse=True) for row in heads])
    # Of every group of three the lowest goes; of dropped layers nothing is marked, they are veiled.
    gone = {
        (int(row[part].argmin()) + part.start, n) for n, row in enumerate(heads) for part in (slice(0, 3), slice(3, 6))
    }
    assert dots_of(places) == {(head, layer) for head, layer in gone if layer in kept_numbers}
    assert dots_of(ranks) == {
        (1 + int((heads[layer] > heads[layer, head]).sum()), layer) for head, layer in gone if layer in kept_numbers
    }
    for axes in (places, ranks):
        assert {round(bar.get_y() + 0.5) for bar in axes.patches} == {0, 1, 2, 3, 4} - set(kept_numbers)
    assert ranks.texts[0].get_text() == "dots: the 2 of 6 that go"


def test_no_dots_where_every_head_stays(scores):
    places, ranks, _ = head_importance(scores, make_plan(scores, TargetConfig(hidden=8))).axes
    assert not ranks.texts and not dots_of(places) and not dots_of(ranks)


def test_whole_query_groups_have_the_sum_of_their_heads(scores):
    plan = make_plan(scores, TargetConfig(groups=1))
    places, ranks, _ = group_importance(scores, plan).axes
    sums = scores.head.numpy().sum(-1)
    np.testing.assert_allclose(places.images[0].get_array(), sums / sums.max(1, keepdims=True))
    assert dots_of(places) == {(int(row.argmin()), layer) for layer, row in enumerate(sums)}
    assert dots_of(ranks) == {(2, layer) for layer in range(5)}
    # All that goes with a group goes in the map of heads, however strong.
    heads = dots_of(head_importance(scores, plan).axes[0])
    assert heads == {(3 * int(row.argmin()) + head, layer) for layer, row in enumerate(sums) for head in range(3)}


def test_what_an_earlier_round_cut_ranks_behind_the_rest(scores):
    """The strongest of all were cut in the first round: sorted by their scores alone they would lead."""
    hidden, ffn = torch.full((12,), 2), torch.full((5, 10), 2)
    hidden[scores.hidden.argmax()] = 1
    ffn[torch.arange(5), scores.ffn.argmax(1)] = 1
    later = replace(scores, rounds={"hidden": hidden, "ffn": ffn})
    curve = hidden_importance(later).axes[0].lines[0].get_ydata().tolist()
    assert curve == [*range(11, 0, -1), 12]
    assert ffn_importance(later).axes[0].images[0].get_array()[:, -1].tolist() == [1] * 5


def test_hidden_scores_fall_and_the_cut_stands_at_the_number_kept(scores, plan):
    axes = hidden_importance(scores, plan).axes[0]
    curve, cut = axes.lines
    assert curve.get_xdata().tolist() == list(range(1, 13))
    assert curve.get_ydata().tolist() == sorted(scores.hidden.tolist(), reverse=True)
    assert set(cut.get_xdata()) == {8}
    # The scores are 1 to 12: the eight largest sum to 68 of 78.
    assert axes.texts[0].get_text() == f"8 of 12 stay, with {68 / 78:.1%} of all scores"


def test_one_head_in_each_group(scores):
    """Multi-head attention: lines between groups would cover the cells."""
    many = replace(scores, shape=scores.shape.replace(num_query_groups=6), head=scores.head.reshape(5, 6, 1))
    axes = head_importance(many).axes[0]
    assert not axes.collections[0].get_segments()
    assert [text.get_text() for text in axes.get_xticklabels()] == list("012345")


def test_figures_are_png_files_and_leave_no_state(scores, plan):
    before = dict(matplotlib.rcParams)
    images = [png(figure) for figure in (ffn_importance(scores, plan), kept_map(plan, scores))]
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in images)
    assert dict(matplotlib.rcParams) == before
