from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.colors import same_color

from minitron_megatron.config.schema import DepthSearch, TargetConfig, Unit
from minitron_megatron.plotting import CUT, KEPT
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.scores import DepthSettings
from minitron_megatron.report.depth import depth_importance

NAN = float("nan")


def with_depth(scores, settings, rounds=None, **criteria):
    depth = {name: torch.tensor(values, dtype=torch.float64) for name, values in criteria.items()}
    return replace(
        scores, depth=depth, depth_settings=settings, rounds={"depth": torch.tensor(rounds)} if rounds else {}
    )


def dots(axes, colour):
    """The points of one colour, over all kinds of unit."""
    lines = [line for line in axes.lines if line.get_marker() != "" and same_color(line.get_color(), colour)]
    return sorted((x, y) for line in lines for x, y in zip(*line.get_data(), strict=True) if np.isfinite(y))


def test_every_criterion_has_a_panel_and_what_the_plan_drops_is_marked(scores, plan, kept_numbers):
    """The plan was made by the first criterion: the second shows the same layers in the colour of the cut."""
    panels = depth_importance(scores, plan).axes
    assert len(panels) == 2
    for axes, values in zip(panels, scores.depth.values(), strict=True):
        points = list(enumerate(values.tolist()))
        assert dots(axes, KEPT) == [point for point in points if point[0] in kept_numbers]
        assert dots(axes, CUT) == [point for point in points if point[0] not in kept_numbers]
    assert panels[0].texts[0].get_text() == "2 of 5 layers are dropped" and not panels[1].texts


def test_without_a_plan_nothing_is_dropped(scores):
    axes = depth_importance(scores).axes[0]
    assert len(dots(axes, KEPT)) == 5 and not dots(axes, CUT) and not axes.texts


def test_protected_layers_stand_on_other_ground(scores):
    settings = DepthSettings(protect_first=1, protect_last=2)
    axes = depth_importance(replace(scores, depth_settings=settings)).axes[0]
    assert [bar.get_x() + 0.5 for bar in axes.patches] == [0, 3, 4]


def test_sublayers_have_a_curve_for_each_kind(scores):
    searched = with_depth(scores, DepthSettings(Unit.SUBLAYER), kl=[9, 8, 7, 1, 6, 5, 2, 4, 3.5, 3])
    plan = make_plan(searched, TargetConfig(attention=4, mlp=4))
    assert sorted(set(range(10)) - set(plan.sublayers)) == [3, 6]
    axes = depth_importance(searched, plan).axes[0]
    curves = [line.get_data() for line in axes.lines if line.get_marker() == "" and len(line.get_xdata())]
    assert [(x.tolist(), y.tolist()) for x, y in curves] == [
        ([0, 1, 2, 3, 4], [9, 7, 6, 2, 3.5]),
        ([0, 1, 2, 3, 4], [8, 1, 5, 4, 3]),
    ]
    assert dots(axes, CUT) == [(1, 1), (3, 2)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["attention", "MLP"]


def test_a_block_is_marked_at_its_first_layer(scores):
    """The dropped layers are 2 and 3; that 3 begins a block of its own that stays must show."""
    settings = DepthSettings(search=DepthSearch.BLOCK, drop=2, protect_first=1)
    searched = with_depth(scores, settings, loss=[NAN, 3, 1, 2, NAN])
    axes = depth_importance(searched, make_plan(searched, TargetConfig(layers=3))).axes[0]
    assert dots(axes, CUT) == [(2, 1)] and dots(axes, KEPT) == [(1, 3), (3, 2)]
    grounds = [(bar.get_x() + 0.5, same_color(bar.get_facecolor()[:3], CUT)) for bar in axes.patches]
    assert grounds == [(2, True), (3, True), (0, False)]


def test_a_greedy_search_is_drawn_in_the_order_in_which_layers_went(scores):
    settings = DepthSettings(search=DepthSearch.GREEDY, drop=3)
    searched = with_depth(scores, settings, rounds=[4, 2, 4, 1, 3], kl=[7, 0.3, 8, 0.2, 0.5])
    plan = make_plan(searched, TargetConfig(layers=2))
    axes = depth_importance(searched, plan).axes[0]
    assert dots(axes, CUT) == [(1, 0.2), (2, 0.3), (3, 0.5)] and not dots(axes, KEPT)
    assert [text.get_text() for text in axes.get_xticklabels()] == ["3", "1", "4"]
    assert axes.lines[0].get_ydata().tolist() == [0.2, 0.3, 0.5]


@pytest.mark.parametrize(
    "values, scale",
    [
        ([9, 0.1, 0.02, 0.05, 0.3], "log"),
        ([9, 0.1, -0.02, 0.05, 0.3], "symlog"),
        ([3, 1, 2, 1.5, 2.5], "linear"),
        ([0, 0, 0, 0, 0], "linear"),
        ([0, 0, 0, 0, 4], "symlog"),
    ],
)
def test_a_scale_on_which_everything_can_be_seen(scores, values, scale):
    axes = depth_importance(with_depth(scores, DepthSettings(), loss=values)).axes[0]
    assert axes.get_yscale() == scale
    low, high = axes.get_ylim()
    assert low <= min(values) <= max(values) < high and np.isfinite([low, high]).all()


def test_sublayers_of_unlike_layers_stand_at_their_layers(unlike_scores, unlike_plan):
    """Layer 1 has no attention and layer 3 no MLP; the plan drops layer 4."""
    settings = DepthSettings(Unit.SUBLAYER, protect_first=1)
    searched = with_depth(unlike_scores, settings, kl=[9, 8, 7, 1, 6, 5, 2, 4])
    axes = depth_importance(searched, unlike_plan).axes[0]
    curves = [line for line in axes.lines if line.get_marker() == "" and len(line.get_xdata())]
    assert [list(zip(*line.get_data(), strict=True)) for line in curves] == [
        [(0, 9), (2, 1), (3, 5), (4, 2)],
        [(0, 8), (1, 7), (2, 6), (4, 4)],
    ]
    assert dots(axes, CUT) == [(4, 2), (4, 4)]
    assert [bar.get_x() + 0.5 for bar in axes.patches] == [0]
    markers = {line.get_marker() for line in axes.lines if len(line.get_xdata()) and line.get_marker() != ""}
    assert markers == {"o", "D"}


def test_layers_that_lack_a_sublayer_are_units_as_well(unlike_scores, unlike_plan):
    axes = depth_importance(unlike_scores, unlike_plan).axes[0]
    assert [x for x, _ in dots(axes, CUT)] == [4] and [x for x, _ in dots(axes, KEPT)] == [0, 1, 2, 3]
    assert axes.texts[0].get_text() == "1 of 5 layers are dropped"
