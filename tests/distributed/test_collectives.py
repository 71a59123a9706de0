"""What one rank finds reaches the others, over real processes."""

import json

import pytest
import torch
import torch.distributed as dist

from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.parallel.collectives import raise_on_all_ranks, rank0_first
from minitron_megatron.parallel.context import parallel_context
from minitron_megatron.training.step_metrics import largest_over_ranks
from tests.ranks import run_on_ranks


def of_one_rank(folder):
    with parallel_context(ParallelConfig(data=2)):
        rank = dist.get_rank()
        backend = dist.group.WORLD._get_backend(torch.device("cpu"))
        found = {"timeout_s": backend.options._timeout.total_seconds(), "errors": []}
        worked = []
        found["result"] = rank0_first(lambda: worked.append(rank) or {"made by": rank})
        found["worked"] = worked

        def wrong():
            raise ConfigError(["a = 1: must be 2", "b is missing"])

        def defect():
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "cannot be made again from its message")

        for work in (wrong, defect):
            with pytest.raises((ConfigError, RuntimeError, UnicodeDecodeError)) as raised:
                rank0_first(work)
            found["errors"].append([type(raised.value).__name__, str(raised.value)])
        with pytest.raises(ConfigError, match="of rank 1"), raise_on_all_ranks():
            if rank == 1:
                raise ConfigError(["of rank 1"])
        # The ranks are still in step.
        assert rank0_first(lambda: "done") == "done"
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_on_ranks(2, of_one_rank, folder)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_the_first_rank_works_for_all(ranks):
    assert [rank["result"] for rank in ranks] == [{"made by": 0}] * 2
    assert [rank["worked"] for rank in ranks] == [[0], []]


def test_an_error_reaches_every_rank(ranks):
    first, second = (rank["errors"] for rank in ranks)
    assert first[0] == second[0] == ["ConfigError", "a = 1: must be 2\nb is missing"]
    assert first[1][0] == "UnicodeDecodeError"
    assert second[1][0] == "RuntimeError" and second[1][1].startswith("rank 0 failed: UnicodeDecodeError(")


def test_ranks_may_wait_longer_than_nccl_does_by_itself(ranks):
    assert all(rank["timeout_s"] >= 12 * 3600 for rank in ranks)


def say_largest():
    with parallel_context(ParallelConfig(tensor=2)) as ctx:
        values = {"one": dist.get_rank(), "other": 7 - dist.get_rank()}
        assert largest_over_ranks(values, ctx) == {"one": 1, "other": 7}


def test_times_and_memory_are_those_of_the_rank_that_needs_most():
    run_on_ranks(2, say_largest)
