import pytest

from minitron_megatron.config.schema import DistillConfig, ParallelConfig


@pytest.mark.parametrize(
    "global_batch, layout, expected",
    [
        (16, ParallelConfig(data=2), []),
        (
            20,
            ParallelConfig(data=2),
            ["global_batch = 20 is not a multiple of micro_batch x parallel.data = 4 x 2: set it to 16 or 24"],
        ),
        (
            12,
            ParallelConfig(pipeline=2, virtual_pipeline=2),
            [
                "global_batch = 12 makes 3 micro-batches per rank; with parallel.virtual_pipeline they must be a "
                "multiple of parallel.pipeline = 2: set it to 8 or 16"
            ],
        ),
    ],
)
def test_a_batch_that_a_layout_cannot_share_comes_with_one_that_it_can(global_batch, layout, expected):
    config = DistillConfig(global_batch=global_batch, micro_batch=4, parallel=layout)
    assert config.batch_problems(layout.data or 1) == expected
