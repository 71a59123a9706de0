import pytest

from minitron_megatron.config.schema import ParallelConfig
from minitron_megatron.launch.world import first_host, required_ranks, slurm_environment

TASK = {
    "SLURM_JOB_ID": "40001",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_a_task_of_srun_becomes_a_rank():
    assert slurm_environment(TASK) == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "12001",
    }


def test_all_tasks_of_a_job_meet_at_one_place_and_other_jobs_elsewhere():
    def meeting(**changes):
        found = slurm_environment(TASK | changes)
        return found["MASTER_ADDR"], found["MASTER_PORT"]

    assert meeting() == meeting(SLURM_PROCID="0", SLURM_LOCALID="0")
    assert meeting() != meeting(SLURM_JOB_ID="40002")


@pytest.mark.parametrize(
    "change",
    [
        {"RANK": "0"},  # torchrun inside the task
        {"SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_STEP_NUM_TASKS": None},  # a batch script: PROCID and NTASKS are there, the tasks are not
        {"SLURM_PROCID": None},  # the shell of salloc
    ],
)
def test_a_process_that_is_no_task_stays_alone(change):
    assert slurm_environment({name: value for name, value in (TASK | change).items() if value is not None}) == {}


def test_what_the_user_has_set_stays():
    found = slurm_environment(TASK | {"MASTER_PORT": "9", "MASTER_ADDR": "10.0.0.1"})
    assert set(found) == {"RANK", "WORLD_SIZE", "LOCAL_RANK"}


@pytest.mark.parametrize(
    "nodelist, host",
    [
        ("login", "login"),
        ("a1,a2", "a1"),
        ("gpu[07-09,12],login", "gpu07"),
        ("gpu[3,5-6]", "gpu3"),
        ("rack[1-2]-node[03-04],x", "rack1-node03"),
        ("n[01-02]-ib.cluster,x[1-2]", "n01-ib.cluster"),
    ],
)
def test_first_host(nodelist, host):
    assert first_host(nodelist) == host


def test_a_layout_alone_needs_one_replica():
    assert required_ranks(ParallelConfig()) == 1
    assert required_ranks(ParallelConfig(tensor=2, pipeline=3)) == 6
    assert required_ranks(ParallelConfig(tensor=2, pipeline=3, data=2)) == 12
