import pytest

from minitron_megatron.checkpoint.dist_reader import TRACKER, iteration_folder
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.training.state import _announce, remove_old, step_back


@pytest.mark.parametrize("keep, left", [(1, [150]), (2, [100, 150]), (5, [50, 100, 150])])
def test_the_latest_stay_whatever_an_interruption_left_behind(keep, left, tmp_path):
    # Step 200 was whole, and the run ended before it was announced; it then went on from step 100.
    for step in (50, 100, 200):
        (tmp_path / iteration_folder(step)).mkdir()
    (tmp_path / TRACKER).write_text("100")
    partial = tmp_path / ".partial"
    partial.mkdir()
    _announce(partial, tmp_path / iteration_folder(150), best=False)
    with parallel_context(ParallelConfig()):
        remove_old(tmp_path, keep)
    assert (tmp_path / TRACKER).read_text() == "150"
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [iteration_folder(step) for step in left]


def test_what_the_tracker_names_stays_though_a_later_one_lies_behind_it(tmp_path):
    """One that was not announced, or from which a run has stepped back."""
    for step in (50, 100, 200):
        (tmp_path / iteration_folder(step)).mkdir()
    (tmp_path / TRACKER).write_text("200")
    with parallel_context(ParallelConfig()):
        step_back(tmp_path)
        assert (tmp_path / TRACKER).read_text() == "100"
        remove_old(tmp_path, 1)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == [iteration_folder(step) for step in (100, 200)]
