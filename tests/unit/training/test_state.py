import pytest

from minitron_megatron.checkpoint.dist_reader import TRACKER, iteration_folder, latest_folder
from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.training.state import _announce, _make_empty, _restore_tracker, remove_old, step_back


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


@pytest.mark.parametrize("text", [None, "", " \n", "\0\0\0"])
def test_whole_checkpoints_without_a_tracker_are_gone_on_with_and_stay(text, tmp_path, caplog):
    for step in (50, 100, 200):
        (tmp_path / iteration_folder(step)).mkdir()
        if step < 200:  # which is not whole
            (tmp_path / iteration_folder(step) / ".metadata").touch()
    if text is not None:
        (tmp_path / TRACKER).write_text(text)
    assert latest_folder(tmp_path).name == iteration_folder(100)  # as whoever only reads it
    _restore_tracker(tmp_path)
    assert (tmp_path / TRACKER).read_text() == "100" and "missing or empty" in caplog.text
    with parallel_context(ParallelConfig()):
        remove_old(tmp_path, 2)
    assert len(list(tmp_path.glob("iter_*"))) == 3
    (tmp_path / TRACKER).write_text("50")
    _restore_tracker(tmp_path)
    assert (tmp_path / TRACKER).read_text() == "50"


def test_the_best_is_whole_before_the_latest_is_announced(tmp_path):
    root, partial = tmp_path / "checkpoints", tmp_path / "checkpoints" / ".partial"
    partial.mkdir(parents=True)
    (partial / ".metadata").write_text("index")
    _announce(partial, root / iteration_folder(3), best=True)
    for folder in (root, tmp_path / "best"):
        assert (folder / TRACKER).read_text() == "3"
        assert (folder / iteration_folder(3) / ".metadata").read_text() == "index"
    assert {path.name for path in (tmp_path / "best").iterdir()} == {TRACKER, iteration_folder(3)}


def test_what_a_killed_process_has_left_is_removed_be_it_a_folder_or_a_file(tmp_path):
    (tmp_path / ".iter_0000004.partial").mkdir()
    (tmp_path / ".iter_0000004.partial" / "__0_0.distcp").write_text("half")
    (tmp_path / f".{TRACKER}.759086bd.partial").write_text("4")  # killed while it was written
    _make_empty(tmp_path / ".iter_0000008.partial")
    assert [path.name for path in tmp_path.iterdir()] == [".iter_0000008.partial"]
