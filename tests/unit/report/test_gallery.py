from dataclasses import replace

import torch

import minitron_megatron
from minitron_megatron.config.schema import DepthSearch
from minitron_megatron.pruning.scores import DepthSettings
from minitron_megatron.report.gallery import pruning_pictures


def names(*args):
    return [picture.name for picture in pruning_pictures(*args)]


def test_what_is_drawn_follows_what_is_known(scores, plan):
    assert names(scores) == ["ffn", "heads", "groups", "hidden", "layers"]
    assert names(scores, plan) == ["kept", "ffn", "heads", "groups", "hidden", "layers"]
    assert names(None, plan) == ["kept"]
    assert names(replace(scores, depth={})) == ["ffn", "heads", "groups", "hidden"]
    # A group of one head is that head.
    of_one = replace(scores, shape=scores.shape.replace(num_heads=2), head=scores.head[..., :1])
    assert names(of_one, None, "own_")[:3] == ["own_ffn", "own_heads", "own_hidden"]


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
