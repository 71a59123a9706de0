import numpy as np
import pytest

from minitron_megatron.pruning.plan import Plan
from minitron_megatron.report.plan_figure import kept_map
from tests.unit.report.conftest import NETWORK, UNLIKE, make_scores


def numbers(title):
    return title.split(",")[0].split(": ")[1]


def test_the_map_of_what_stays(scores, plan, kept_numbers):
    hidden, layers, neurons, heads = kept_map(plan, scores).axes
    assert np.flatnonzero(hidden.images[0].get_array()).tolist() == plan.hidden
    assert np.flatnonzero(layers.images[0].get_array()).tolist() == kept_numbers
    for layer, bar in enumerate(neurons.patches[5:]):
        if layer in kept_numbers:
            row = sorted(scores.elements["ffn"][layer].tolist())
            assert bar.get_height() == pytest.approx(sum(row[-6:]) / sum(row))
        else:
            assert bar.get_height() == 0
    kept = heads.images[0].get_array()
    assert kept.shape == (6, 5)
    assert kept.sum(0).tolist() == [4 if layer in kept_numbers else 0 for layer in range(5)]
    assert np.flatnonzero(kept[:3, kept_numbers[0]]).tolist() == plan.elements[2 * kept_numbers[0]]["heads"][0]
    titles = [axes.get_title("left") for axes in (hidden, layers, neurons, heads)]
    assert [numbers(title) for title in titles] == ["8 of 12", "3 of 5", "6 of 10", "4 of 6"]


def test_without_scores_the_map_shows_the_number_of_neurons(plan, kept_numbers):
    neurons = kept_map(plan).axes[2]
    assert [b.get_height() for b in neurons.patches[5:]] == [0.6 if i in kept_numbers else 0 for i in range(5)]


def whole(source, sublayers, group=(0, 1)):
    """A plan that keeps sublayers of two groups of three heads as they are, but for the query groups."""
    elements = {}
    for position in sublayers:
        sizes = source.sublayers[position].sizes
        own = {"ffn": list(range(sizes["ffn"]))} if "ffn" in sizes else None
        elements[position] = own or {"groups": list(group), "heads": [[0, 1, 2] for _ in group]}
    return Plan(source, sublayers, list(range(source.hidden_size)), elements)


def test_attention_and_mlp_have_rows_of_their_own_where_layers_are_not_whole():
    plan = whole(NETWORK, [0, 1, 3, 4, 5, 7, 8], group=[1])
    _, strip, neurons, heads = kept_map(plan).axes
    assert strip.images[0].get_array().tolist() == [[1, 0, 1, 0, 1], [1, 1, 1, 1, 0]]
    assert [text.get_text() for text in strip.get_yticklabels()] == ["attention", "MLP"]
    assert strip.get_title("left") == "sublayers: attention 3 of 5, MLP 4 of 5"
    assert [bar.get_height() for bar in neurons.patches[5:]] == [1, 1, 1, 1, 0]
    assert heads.images[0].get_array().tolist() == [[0] * 5] * 3 + [[1, 0, 1, 0, 1]] * 3
    assert heads.get_title("left") == "query heads: 3 of 6, in 1 of 2 query groups"


def test_sublayers_stand_at_their_layers():
    """What is left of a network that lost an attention: counting by kind would put MLPs under other attentions."""
    layer = NETWORK.sublayers[:2]
    network = NETWORK.replace(sublayers=(*layer, *layer, layer[1], *layer))  # `*-*--*-`
    plan = whole(network, [0, 1, 3, 4, 5, 6])
    _, strip, neurons, heads = kept_map(plan).axes
    rows = strip.images[0].get_array()
    assert rows.filled(-1).tolist() == [[1, 0, -1, 1], [1, 1, 1, 1]]
    assert [round(bar.get_x() + 0.4) for bar in neurons.patches[4:]] == [0, 1, 2, 3]
    assert heads.images[0].get_array().filled(-1)[0].tolist() == rows.filled(-1)[0].tolist()
    assert heads.get_xlabel() == "layer" and not neurons.get_xlabel()


def test_layers_of_unlike_sizes(unlike_scores, unlike_plan):
    channels, strip, neurons, heads = kept_map(unlike_plan, unlike_scores).axes
    assert strip.images[0].get_array().filled(-1).tolist() == [[1, -1, 1, 1, 0], [1, 1, 1, -1, 0]]
    rows = [sorted(row.tolist(), reverse=True) for row in unlike_scores.elements["ffn"]]
    shares = [sum(row[:count]) / sum(row) for row, count in zip(rows, [5, 7, 2, 0], strict=True)]
    bars = neurons.patches[4:]
    assert [bar.get_height() for bar in bars] == pytest.approx(shares)
    assert [round(bar.get_x() + 0.4) for bar in bars] == [0, 1, 2, 4]
    cells = heads.images[0].get_array()
    assert cells.shape == (6, 5)
    assert cells.sum(0).filled(-1).tolist() == [4, -1, 3, 2, 0]
    assert cells.mask.sum(0).tolist() == [0, 6, 2, 0, 0]  # blank
    assert np.flatnonzero(cells[:4, 2]).tolist() == unlike_plan.elements[3]["groups"]  # of one head each
    assert [axes.get_title("left") for axes in (channels, strip, neurons, heads)] == [
        "channels of the residual stream: 8 of 12",
        "sublayers: attention 3 of 4, MLP 3 of 4",
        "neurons of each MLP: 2 to 7 of 4 to 10, and the share of its scores that they hold",
        "query heads: 2 to 4 of 4 to 6, in 1 to 3 of 2 to 4 query groups",
    ]


def test_a_kind_that_goes_altogether():
    plan = whole(UNLIKE, [0, 6])
    _, _, neurons, heads = kept_map(plan, make_scores(UNLIKE)).axes
    assert numbers(neurons.get_title("left")) == "0 of 4 to 10" and numbers(heads.get_title("left")) == "6 of 4 to 6"
