import pytest

from minitron_megatron.config.cluster import ClusterConfig
from minitron_megatron.config.schema import DistillConfig, ImportConfig, ParallelConfig, PruneConfig, ScoreConfig
from minitron_megatron.errors import ConfigError
from minitron_megatron.launch.jobs import REPORT, jobs_of

CLUSTER = ClusterConfig(ranks_per_node=4)


def stages(**parallel) -> dict:
    return {
        "teacher": ("import", ImportConfig("s", "t")),
        "scores": ("score", ScoreConfig("t", "s", parallel=ParallelConfig(tensor=2, data=1))),
        "a b/c": ("prune", PruneConfig("t", "p", workers=3)),
        "distilled": (
            "distill",
            DistillConfig("t", "p", "d", global_batch=60, micro_batch=1, parallel=ParallelConfig(**parallel)),
        ),
    }


def sizes(jobs) -> list[tuple[int, int, int]]:
    return [(job.nodes, job.ranks_per_node, job.gpus_per_node) for job in jobs]


def test_every_stage_asks_for_the_ranks_that_it_needs():
    jobs = jobs_of(stages(tensor=2, pipeline=2, data=3), CLUSTER, with_report=True)
    assert sizes(jobs) == [(1, 1, 0), (1, 2, 2), (1, 3, 0), (3, 4, 4), (1, 1, 0)]
    assert [job.file for job in jobs] == ["01_teacher", "02_scores", "03_a_b_c", "04_distilled", "05_report"]
    assert jobs[-1].verb == REPORT


@pytest.mark.parametrize("nodes, expected", [(None, (1, 4, 4)), (1, (1, 4, 4)), (5, (5, 4, 4))])
def test_replicas_that_are_left_open_fill_the_nodes_asked_for(nodes, expected):
    jobs = jobs_of(stages(tensor=2, pipeline=2), ClusterConfig(ranks_per_node=4, nodes=nodes), with_report=False)
    assert sizes(jobs)[3] == expected


def test_a_cluster_without_gpus_is_asked_for_none():
    assert {gpus for *_, gpus in sizes(jobs_of(stages(), ClusterConfig(gpus_per_node=0), False))} == {0}


@pytest.mark.parametrize(
    "cluster, parallel, problem",
    [
        (CLUSTER, {"tensor": 2, "data": 3}, "stages.distilled needs 6 ranks, which do not fill nodes"),
        (ClusterConfig(ranks_per_node=4, nodes=2), {"tensor": 2, "data": 1}, r"8 ranks, and the layouts need others"),
        (ClusterConfig(ranks_per_node=4, nodes=7), {}, "stages.distilled.global_batch = 60 is not a multiple of"),
    ],
)
def test_ranks_that_do_not_fit(cluster, parallel, problem):
    with pytest.raises(ConfigError, match=problem):
        jobs_of(stages(**parallel), cluster, with_report=False)
