"""The layers of a stage, against what an even split is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minitron_megatron.config.schema import InferenceParallelConfig, ParallelConfig
from minitron_megatron.parallel.layout import layers_per_stage


@pytest.mark.parametrize(
    "num_layers, num_stages, expected",
    [
        (8, 4, [2, 2, 2, 2]),
        (3, 2, [2, 1]),
        (5, 4, [1, 1, 2, 1]),
        (6, 4, [1, 2, 2, 1]),
        (7, 4, [2, 2, 2, 1]),
        (30, 1, [30]),
    ],
)
def test_the_ends_hold_no_more_than_they_must(num_layers, num_stages, expected):
    assert layers_per_stage(num_layers, num_stages) == expected


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 60))
def test_stages_and_ranks_are_as_even_as_can_be(pipeline, virtual_pipeline, spare):
    num_stages = pipeline * virtual_pipeline
    counts = layers_per_stage(num_stages + spare, num_stages)
    ranks = [sum(counts[rank::pipeline]) for rank in range(pipeline)]
    for held in (counts, ranks):
        assert sum(held) == num_stages + spare
        assert max(held) - min(held) <= 1
        assert held[-1] == min(held)
    assert counts[0] == min(counts) or counts[1:-1] == [max(counts)] * (num_stages - 2)


def test_a_layout_is_of_what_its_settings_have():
    assert InferenceParallelConfig(2, 2, timeout_min=5.0).in_world(12) == ParallelConfig(2, 2, 3, timeout_min=5.0)
    layout = ParallelConfig(2, 2, virtual_pipeline=3, sequence=True).in_world(4)
    assert layout == ParallelConfig(2, 2, 1, 3, True)
    assert (layout.replicas, layout.world_size, layout.stages) == (1, 4, 6)
