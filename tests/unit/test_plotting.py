import pytest

from minitron_megatron.plotting import short, spread


def test_labels_are_spread_and_keep_their_order():
    assert spread([1.0, 5.0, 1.1], 0.5) == [1.0, 5.0, 1.5]
    assert spread([2.0, 2.0, 2.0], 1) == [2.0, 3.0, 4.0]


@pytest.mark.parametrize("count, text", [(134515008, "134.5M"), (8030261248, "8.03B"), (999, "999"), (12288, "12.29K")])
def test_short_counts(count, text):
    assert short(count) == text
