"""Job scripts. `scripts/` holds what was read and found right: after a change on purpose, delete a file there, run this
twice, and read the difference."""

import subprocess
from pathlib import Path

import pytest

from minitron_megatron.config.cluster import ClusterConfig, ClusterKind, ContainerConfig, Rendezvous
from minitron_megatron.launch.jobs import REPORT, Job
from minitron_megatron.launch.script import render

SCRIPTS = Path(__file__).parent / "scripts"
TRAIN = Job("distilled", "04_distilled", "distill", nodes=2, ranks_per_node=8, gpus_per_node=8)
IMPORT = Job("teacher", "01_teacher", "import")


def cluster(**settings) -> ClusterConfig:
    return ClusterConfig(kind=ClusterKind.SLURM, **settings)


VARIANTS = {
    "srun": (TRAIN, cluster(), None),
    "torchrun": (TRAIN, cluster(rendezvous=Rendezvous.TORCHRUN, port=29500, cpus_per_rank=6), None),
    "one_process": (IMPORT, cluster(partition="gpu", cpu_partition="cpu", exclusive=True), None),
    "report": (Job(REPORT, "09_report", REPORT), cluster(), None),
    "array": (TRAIN, cluster(max_parallel=2), 4),
    "array_unlimited": (IMPORT, cluster(), 3),
    "every_option": (
        TRAIN,
        cluster(
            partition="gpu,long",
            account="a b",
            qos="high",
            constraint="h100&ib",
            reservation="mine",
            exclusive=True,
            cpus_per_rank=12,
            memory="0",
            time="1-00:00:00",
            extra=["--mail-type=FAIL", '--comment=it\'s "ours"'],
            signal_s=120,
            max_restarts=7,
            exclude_bad_nodes=True,
            modules=["cuda/12.8", "nccl"],
            venv="/opt/my env",
        ),
        None,
    ),
    "container": (
        TRAIN,
        cluster(
            container=ContainerConfig("/images/minitron.sqsh", ["/data:/data:ro"], True, ["NCCL_DEBUG", "HF_HOME"]),
            preflight=False,
        ),
        None,
    ),
    "container_from_registry": (IMPORT, cluster(container=ContainerConfig("nvcr.io#nvidia/pytorch:26.06")), None),
}


def script(name: str) -> str:
    job, settings, num_runs = VARIANTS[name]
    python = "python" if settings.venv else "python3"
    return render(job, settings, Path("/runs/it's $HOME"), Path("/work dir"), python, "0123456789abcdef", num_runs)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_script_is_the_one_that_was_read(name):
    path = SCRIPTS / f"{name}.sh"
    if not path.exists():
        path.write_text(script(name))
        pytest.fail(f"{path} was not there and is written now: read it")
    assert script(name) == path.read_text()


@pytest.mark.parametrize("name", VARIANTS)
def test_bash_can_read_it(name):
    checked = subprocess.run(["bash", "-n"], input=script(name), capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr


def test_no_script_is_left_over():
    assert {path.stem for path in SCRIPTS.iterdir()} == set(VARIANTS)
