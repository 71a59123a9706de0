from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch

from minitron_megatron.config.schema import TargetConfig
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP
from minitron_megatron.model.network import transformer
from minitron_megatron.plotting import png
from minitron_megatron.pruning.make_plan import make_plan, plan_for
from minitron_megatron.pruning.target import Target
from minitron_megatron.report.figures import axis_importance, hidden_importance
from minitron_megatron.report.plan_figure import kept_map
from tests.unit.report.conftest import LAYER, NETWORK, make_scores

ATTENTION, _ = LAYER


@pytest.fixture(scope="module")
def many():
    """Scores of more neurons than are drawn one by one."""
    return make_scores(NETWORK.replace(sublayers=transformer(5, [ATTENTION, MLP(140)])))


@pytest.fixture(scope="module")
def many_plan(many):
    return make_plan(many, TargetConfig(layers=3, ffn=60))


def layers_of(plan):
    return sorted({plan.source.layer_of(position) for position in plan.sublayers})


def falling(rows):
    return [sorted(row / row.max(), reverse=True) for row in rows]


def test_neurons_are_sorted_and_relative_to_their_layer(many):
    """A map of unsorted scores, or one scaled by the largest of all layers, would show no decline."""
    axes = axis_importance(many, "ffn").axes[0]
    shown = axes.images[0].get_array()
    np.testing.assert_allclose(shown, falling([row.numpy() for row in many.elements["ffn"]]))
    assert axes.images[0].get_extent() == [0, 140, 4.5, -0.5]
    assert not axes.collections  # no plan, no cut
    assert axes.figure.get_suptitle() == "Neurons of each MLP, most important first"
    assert axes.get_xlabel() == "rank of the neuron within its layer"


def test_the_cut_lies_behind_the_last_kept_neuron_of_kept_layers(many, many_plan):
    axes, kept = axis_importance(many, "ffn", many_plan).axes[0], layers_of(many_plan)
    segments = axes.collections[0].get_segments()
    assert [segment[:, 0].tolist() for segment in segments] == [[60, 60]] * 3
    assert [segment[:, 1].mean() for segment in segments] == kept
    # What goes is veiled from the cut on: of a dropped layer, everything.
    veils = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert veils == [(60, 80) if layer in kept else (0, 140) for layer in range(5)]
    assert axes.texts[0].get_text() == "60 of 140 stay"


@pytest.mark.parametrize("neurons", [140, 10])
def test_a_layer_without_any_score_is_drawn_as_zero(neurons):
    """A division by its largest score would make it NaN."""
    scores = make_scores(NETWORK.replace(sublayers=transformer(5, [ATTENTION, MLP(neurons)])))
    scores.elements["ffn"][1].zero_()
    for axes in axis_importance(scores, "ffn").axes[:-1]:
        assert axes.images[0].get_array()[1].tolist() == [0] * neurons


def dots_of(axes):
    return {tuple(xy) for xy in axes.collections[0].get_offsets().astype(int).tolist()}


def test_dots_mark_the_heads_that_go(scores, plan, kept_numbers):
    figure = axis_importance(scores, "heads", plan)
    places, ranks, _ = figure.axes
    heads = np.stack([own.flatten().numpy() for own in scores.elements["heads"]])
    np.testing.assert_allclose(places.images[0].get_array(), [row / row.max() for row in heads])
    np.testing.assert_allclose(ranks.images[0].get_array(), falling(heads))
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
    assert figure.get_suptitle() == "Query heads of each attention"
    [edges] = places.collections[1].get_segments()  # one line, from the first layer to the last
    assert edges.tolist() == [[2.5, -0.5], [2.5, 4.5]]
    assert places.get_xlabel() == "query group" and [t.get_text() for t in places.get_xticklabels()] == ["0", "1"]


def test_no_dots_where_every_head_stays(scores):
    places, ranks, _ = axis_importance(scores, "heads", make_plan(scores, TargetConfig(hidden=8))).axes
    assert not ranks.texts and not dots_of(places) and not dots_of(ranks)


def test_whole_query_groups_have_the_sum_of_their_heads(scores):
    plan = make_plan(scores, TargetConfig(groups=1))
    places, ranks, _ = axis_importance(scores, "groups", plan).axes
    sums = np.stack([own.numpy().sum(-1) for own in scores.elements["heads"]])
    np.testing.assert_allclose(places.images[0].get_array(), sums / sums.max(1, keepdims=True))
    assert places.get_xlabel() == "query group"
    assert dots_of(places) == {(int(row.argmin()), layer) for layer, row in enumerate(sums)}
    assert dots_of(ranks) == {(2, layer) for layer in range(5)}
    # All that goes with a group goes in the map of heads, however strong.
    heads = dots_of(axis_importance(scores, "heads", plan).axes[0])
    assert heads == {(3 * int(row.argmin()) + head, layer) for layer, row in enumerate(sums) for head in range(3)}


def test_what_an_earlier_round_cut_ranks_behind_the_rest(many):
    """The strongest of all were cut in the first round: sorted by their scores alone they would lead."""

    def rounds(values):
        first = torch.full(values.shape, 2)
        first.view(-1)[values.argmax()] = 1
        return first

    elements = {setting: list(map(rounds, rows)) for setting, rows in many.elements.items()}
    later = replace(many, rounds={"hidden": rounds(many.hidden)}, element_rounds=elements)
    curve = hidden_importance(later).axes[0].lines[0].get_ydata().tolist()
    assert curve == [*range(11, 0, -1), 12]
    assert axis_importance(later, "ffn").axes[0].images[0].get_array()[:, -1].tolist() == [1] * 5
    assert axis_importance(later, "heads").axes[1].images[0].get_array()[:, -1].tolist() == [1] * 5


def test_hidden_scores_fall_and_the_cut_stands_at_the_number_kept(scores, plan):
    axes = hidden_importance(scores, plan).axes[0]
    curve, cut = axes.lines
    assert curve.get_xdata().tolist() == list(range(1, 13))
    assert curve.get_ydata().tolist() == sorted(scores.hidden.tolist(), reverse=True)
    assert set(cut.get_xdata()) == {8}
    # The scores are 1 to 12: the eight largest sum to 68 of 78.
    assert axes.texts[0].get_text() == f"8 of 12 stay, with {68 / 78:.1%} of all scores"


def test_one_head_in_each_group():
    """Multi-head attention: lines between groups would cover the cells."""
    scores = make_scores(NETWORK.replace(sublayers=transformer(5, [Attention(6, 6, 2), MLP(10)])))
    axes = axis_importance(scores, "heads").axes[0]
    assert not axes.collections
    assert [text.get_text() for text in axes.get_xticklabels()] == list("012345")


def test_many_elements_of_an_axis_within_another_one_are_ranked_within_it():
    """A line that counts over the sublayer would cut through heads that stay."""
    scores = make_scores(NETWORK.replace(sublayers=transformer(2, [Attention(140, 2, 2), MLP(10)])))
    axes = axis_importance(scores, "heads", make_plan(scores, TargetConfig(heads=60))).axes[0]
    heads = np.sort(np.stack([own.numpy() for own in scores.elements["heads"]]), axis=-1)[..., ::-1]
    np.testing.assert_allclose(axes.images[0].get_array(), heads.mean(1) / 140)  # the scores are 1 to 140
    assert [segment[:, 0].tolist() for segment in axes.collections[0].get_segments()] == [[30, 30]] * 2
    assert axes.texts[0].get_text() == "30 of 70 stay in each query group"


def row_of(values, length):
    """A row as it is drawn, which is blank behind its end."""
    return [*values, *[None] * (length - len(values))]


def test_rows_of_unlike_lengths(unlike_scores, unlike_plan):
    """Layers 0, 1, 2 and 4 have neurons: 10, 7, 9 and 4, of which 5, 7, 2 and none stay."""
    places, ranks, _ = axis_importance(unlike_scores, "ffn", unlike_plan).axes
    rows = [row.numpy() for row in unlike_scores.elements["ffn"]]
    assert ranks.images[0].get_array().tolist() == [row_of(row, 10) for row in falling(rows)]
    assert places.images[0].get_array().tolist() == [row_of(row / row.max(), 10) for row in rows]
    # Ranks count from 1.
    assert dots_of(ranks) == {(rank, 0) for rank in range(6, 11)} | {(rank, 2) for rank in range(3, 10)}
    assert [(bar.get_y() + 0.5, bar.get_width()) for bar in ranks.patches] == [(3, 4)]
    assert ranks.texts[0].get_text() == "dots: the 5 to 7 of 4 to 10 that go"
    assert [places.yaxis.get_major_formatter()(row, 0) for row in range(-1, 5)] == ["", "0", "1", "2", "4", ""]


def test_query_groups_of_unlike_sizes_have_lines_of_their_own(unlike_scores, unlike_plan):
    """Layers 0, 2, 3 and 4 have attention: 2 groups of 3 heads, 4 of 1, 3 of 2 and 2 of 3."""
    places = axis_importance(unlike_scores, "heads", unlike_plan).axes[0]
    lines = [segment.tolist() for lines in places.collections[1:] for segment in lines.get_segments()]
    assert lines == [
        [[2.5, -0.5], [2.5, 0.5]],
        [[1.5, 1.5], [1.5, 2.5]],
        [[3.5, 1.5], [3.5, 2.5]],
        [[2.5, 2.5], [2.5, 3.5]],
    ]
    assert places.get_xlabel() == "query head"
    per_row = [sum(row == number for _, row in dots_of(places)) for number in range(4)]
    assert per_row == [2, 1, 4, 0]


def test_the_cut_of_every_row_is_the_plans_count():
    """Of layers whose MLPs are of other sizes, and are cut otherwise."""
    sizes, counts = [200, 150, 140], [90, 150, 20]
    network = NETWORK.replace(sublayers=tuple(own for size in sizes for own in (ATTENTION, MLP(size))))
    scores = make_scores(network)
    wanted = tuple(own for count in counts for own in (ATTENTION, MLP(count)))
    plan = plan_for(scores, Target(12, wanted, {}, 3))
    axes = axis_importance(scores, "ffn", plan).axes[0]
    ends, cuts = (lines.get_segments() for lines in axes.collections)
    assert [(segment[0, 0], segment[:, 1].mean()) for segment in ends] == list(zip(sizes, range(3), strict=True))
    assert [(segment[0, 0], segment[:, 1].mean()) for segment in cuts] == [(90, 0), (20, 2)]
    veils = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert veils == [(count, size - count) for size, count in zip(sizes, counts, strict=True)]
    assert [len(plan.elements[position]["ffn"]) for position in (1, 3, 5)] == counts
    assert axes.texts[0].get_text() == "20 to 150 of 140 to 200 stay"
    assert axes.images[0].get_array().mask.sum(1).tolist() == [0, 50, 60]  # blank


def test_figures_are_png_files_and_leave_no_state(scores, plan):
    before = dict(matplotlib.rcParams)
    images = [png(figure) for figure in (axis_importance(scores, "ffn", plan), kept_map(plan, scores))]
    assert all(image.startswith(b"\x89PNG") and len(image) > 5000 for image in images)
    assert dict(matplotlib.rcParams) == before
