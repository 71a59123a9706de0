from types import SimpleNamespace

import pytest

from minitron_megatron.config.schema import DistillConfig
from minitron_megatron.parallel.layout import Layout
from minitron_megatron.training.distill import _batch_problems


@pytest.mark.parametrize(
    "global_batch, layout, expected",
    [
        (16, Layout(data=2), []),
        (
            20,
            Layout(data=2),
            ["global_batch = 20 is not a multiple of micro_batch x parallel.data = 4 x 2: set it to 16 or 24"],
        ),
        (
            12,
            Layout(pipeline=2, virtual_pipeline=2),
            [
                "global_batch = 12 makes 3 micro-batches per rank; with parallel.virtual_pipeline they must be a "
                "multiple of parallel.pipeline = 2: set it to 8 or 16"
            ],
        ),
    ],
)
def test_a_batch_that_a_layout_cannot_share_comes_with_one_that_it_can(global_batch, layout, expected):
    config = DistillConfig(global_batch=global_batch, micro_batch=4)
    assert _batch_problems(config, SimpleNamespace(layout=layout)) == expected
