from dataclasses import replace

import torch

import minitron_megatron
from minitron_megatron.config.schema import DepthSearch, TargetConfig
from minitron_megatron.model.layers.attention import Attention
from minitron_megatron.model.layers.mlp import MLP
from minitron_megatron.model.network import transformer
from minitron_megatron.plotting import png
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.scores import DepthSettings
from minitron_megatron.report.gallery import pruning_pictures
from tests.unit.report.conftest import NETWORK, make_scores


def names(*args):
    return [picture.name for picture in pruning_pictures(*args)]


def test_what_is_drawn_follows_what_is_known(scores, plan):
    assert names(scores) == ["ffn", "heads", "groups", "hidden", "layers"]
    assert names(scores, plan) == ["kept", "ffn", "heads", "groups", "hidden", "layers"]
    assert names(None, plan) == ["kept"]
    assert names(replace(scores, depth={})) == ["ffn", "heads", "groups", "hidden"]
    # A group of one head is that head, and a single group all of them.
    for groups in (1, 6):
        own = make_scores(NETWORK.replace(sublayers=transformer(5, [Attention(6, groups, 2), MLP(10)])))
        assert names(own, None, "own_")[:3] == ["own_ffn", "own_heads", "own_hidden"]


def test_every_figure_of_unlike_layers(unlike_scores, unlike_plan):
    assert names(unlike_scores) == ["ffn", "heads", "groups", "hidden", "layers"]
    assert names(unlike_scores, unlike_plan) == ["kept", "ffn", "heads", "groups", "hidden", "layers"]
    assert names(None, unlike_plan) == ["kept"]
    files = [png(picture.figure) for picture in pruning_pictures(unlike_scores, unlike_plan)]
    assert all(file.startswith(b"\x89PNG") for file in files)
    # Of one kind alone.
    alone = make_scores(NETWORK.replace(sublayers=transformer(2, [MLP(10)])))
    assert names(alone, make_plan(alone, TargetConfig(ffn=6))) == ["kept", "ffn", "hidden", "layers"]


def test_captions_name_the_elements(scores, plan):
    captions = {picture.name: picture.caption for picture in pruning_pictures(scores, plan)}
    # The scores of a layer are 1 to 10, and six of ten stay.
    assert captions["kept"] == (
        f"Blue is kept, grey is dropped. The kept neurons of each MLP hold between {45 / 55:.0%} and {45 / 55:.0%} of "
        f"its scores."
    )
    assert captions["ffn"] == "A cell is one neuron."
    assert captions["heads"].startswith("A cell is one query head. Every kept query group keeps the same number")
    assert captions["groups"].startswith("The score of a query group is the sum over its query heads")
    many = make_scores(NETWORK.replace(sublayers=transformer(2, [MLP(140)])))
    captions = {picture.name: picture.caption for picture in pruning_pictures(many)}
    assert "its neurons are about equally important" in captions["ffn"]


def test_captions_say_how_the_layers_were_left_out(scores):
    greedy = replace(
        scores,
        depth_settings=DepthSettings(search=DepthSearch.GREEDY, drop=2),
        rounds={"depth": torch.tensor([3, 1, 2, 3, 3])},
    )
    captions = {picture.name: picture.caption for picture in pruning_pictures(greedy)}
    assert "From left to right" in captions["layers"]
    assert "rounds" not in captions["ffn"]  # the order of a search is none of the neurons'


def test_figures_for_those_who_have_scores_and_plan_at_hand(scores, plan, tmp_path):
    files = minitron_megatron.draw(tmp_path / "figures", scores, plan)
    assert files == [tmp_path / "figures" / f"{name}.png" for name in names(scores, plan)]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
