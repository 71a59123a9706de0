import numpy as np
import pytest

from minitron_megatron.pruning.plan import Plan
from minitron_megatron.report.kept import kept_map


def numbers(title):
    return title.split(",")[0].split(": ")[1]


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
    assert [numbers(title) for title in titles] == ["8 of 12", "3 of 5", "6 of 10", "4 of 6"]


def test_without_scores_the_map_shows_the_number_of_neurons(plan, kept_numbers):
    neurons = kept_map(plan).axes[2]
    assert [b.get_height() for b in neurons.patches[5:]] == [0.6 if i in kept_numbers else 0 for i in range(5)]


def whole(source, sublayers, group=(0, 1)):
    """A plan that keeps sublayers as they are, but for the query groups."""
    return Plan(
        source,
        sublayers,
        list(range(source.hidden)),
        {p: list(range(source.ffn)) for p in sublayers if source.pattern[p] == "-"},
        {p: list(group) for p in sublayers if source.pattern[p] == "*"},
        {p: [[0, 1, 2] for _ in group] for p in sublayers if source.pattern[p] == "*"},
    )


def test_attention_and_mlp_have_rows_of_their_own_where_layers_are_not_whole(scores):
    plan = whole(scores.shape, [0, 1, 3, 4, 5, 7, 8], group=[1])
    _, strip, neurons, heads = kept_map(plan).axes
    assert strip.images[0].get_array().tolist() == [[1, 0, 1, 0, 1], [1, 1, 1, 1, 0]]
    assert [text.get_text() for text in strip.get_yticklabels()] == ["attention", "MLP"]
    assert strip.get_title("left") == "sublayers: attention 3 of 5, MLP 4 of 5"
    assert [bar.get_height() for bar in neurons.patches[5:]] == [1, 1, 1, 1, 0]
    assert heads.images[0].get_array().tolist() == [[0] * 5] * 3 + [[1, 0, 1, 0, 1]] * 3
    assert heads.get_title("left") == "query heads: 3 of 6, in 1 of 2 query groups"


def test_sublayers_of_an_uneven_pattern_stand_at_their_positions(scores):
    """What is left of a network that lost an attention: counting by kind would put MLPs under other attentions."""
    plan = whole(scores.shape.replace(pattern="*-*--*-"), [0, 1, 3, 4, 5, 6])
    _, strip, neurons, heads = kept_map(plan).axes
    rows = strip.images[0].get_array()
    assert rows.filled(-1).tolist() == [[1, -1, 0, -1, -1, 1, -1], [-1, 1, -1, 1, 1, -1, 1]]
    assert [round(bar.get_x() + 0.4) for bar in neurons.patches[4:]] == [1, 3, 4, 6]
    assert heads.images[0].get_array().filled(-1)[0].tolist() == rows.filled(-1)[0].tolist()
    assert heads.get_xlabel() == "position in the pattern"
