"""Compressions as jobs of a real Slurm: two nodes on this machine, two ranks on each."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from minitron_megatron.tracking.metrics import read_metrics
from tests.launch.conftest import ROOT, wait_for
from tests.offline_wandb import history

SECRETS = {"WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567", "SITE_PASSWORD": "correct-horse-battery"}
# No folder of a user's is likely to be worse.
UGLY = 'it\'s a "run" of $HOME\n& `more`'
CLUSTER = [
    "cluster=slurm",
    *("cluster.nodes=null", "cluster.ranks_per_node=2", "cluster.gpus_per_node=0", "cluster.gpu=null"),
    *("cluster.cpus_per_rank=null", "cluster.memory=null"),
]
NOT_EXACT = ("time/", "throughput/", "memory/")
STEPS, SAVE_EVERY = 20, 10


def recipe(inputs: Path, run_dir: Path) -> list[str]:
    return [
        f"run_dir={quoted(run_dir)}",
        f"source={inputs / 'source'}",
        "target={hidden:40,layers:3,heads:4}",
        f"data={{text:[{inputs / 'text.jsonl'}],sequence_length:16,heldout_pct:20}}",
        "stages.scores={num_samples:10,dtype:fp32}",
        "stages.distilled.parallel={tensor:2,pipeline:2}",
        *(f"stages.distilled.{setting}" for setting in DISTILL),
        "stages.evaluate_teacher=null",
        "stages.evaluate_pruned=null",
        "stages.evaluate_distilled.generate_tokens=0",
        *CLUSTER,
    ]


DISTILL = [
    f"steps={STEPS}",
    f"save_every={SAVE_EVERY}",
    "dtype=fp32",
    "optimizer.warmup_steps=1",
    "tracking={trackers:[wandb],mode:offline}",
]


def quoted(path: Path) -> str:
    return '"' + str(path).replace('"', '\\"') + '"'


@pytest.fixture
def ask(cluster):
    """What one of Slurm's commands answers."""

    def run(*command: str) -> str:
        return subprocess.run(command, env=cluster, capture_output=True, text=True).stdout

    return run


@pytest.fixture
def job(ask):
    """What scontrol says of a job: `job(ID)["JobState"]`."""

    def show(job_id: str) -> dict[str, str]:
        return dict(re.findall(r"(\w+)=(\S*)", ask("scontrol", "--oneliner", "show", "job", job_id)))

    return show


@pytest.fixture
def ended(job):
    """Waits for a job to be over, and gives its state."""
    running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")
    return lambda job_id: wait_for(lambda: (s := job(job_id)["JobState"]) not in running and s, what=f"end of {job_id}")


def launched(run_dir: Path) -> dict[str, str]:
    """Slurm's ids by stage."""
    values = json.loads((run_dir / "launch" / "launch.json").read_text())
    return {job["name"]: values["ids"][job["file"]] for job in values["jobs"] if job["file"] in values["ids"]}


def metrics(output: Path) -> list[dict]:
    """The lines of a run, without what depends on the day."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith(NOT_EXACT)} for line in lines]


@pytest.fixture(scope="session")
def chain(tmp_path_factory, inputs) -> Path:
    return tmp_path_factory.mktemp("chain") / UGLY


@pytest.fixture
def done(chain, inputs, minitron, ended) -> Path:
    """A chain that has run to its end; the first test that asks for it waits."""
    if not chain.exists():
        started = minitron("launch", *recipe(inputs, chain), **SECRETS)
        assert started.returncode == 0, started.stderr
        ids = launched(chain)
        assert ended(ids["report"]) == "COMPLETED", logs(chain)
    return chain


def logs(run_dir: Path) -> str:
    return "\n".join(f"== {path.name}\n{path.read_text()}" for path in sorted((run_dir / "logs").glob("*.log")))


def test_a_recipe_is_a_chain_of_jobs_on_as_many_ranks_as_each_needs(done, minitron, job):
    ids = launched(done)
    assert list(ids) == ["teacher", "scores", "pruned", "distilled", "evaluate_distilled", "exported", "report"]
    nodes = {name: (job(job_id)["NumNodes"], job(job_id)["NumTasks"]) for name, job_id in ids.items()}
    assert nodes.pop("distilled") == ("2", "4") and set(nodes.values()) == {("1", "1")}
    assert len(metrics(done / "distilled")) == STEPS
    assert (done / "report.html").is_file() and (done / "DONE").is_file()
    seconds = json.loads((done / "seconds.json").read_text())
    assert list(seconds) == list(ids)[:-1] and min(seconds.values()) >= 1
    assert (done / "exported" / "model.safetensors").is_file()
    shown = minitron("launch", "status", str(done), COLUMNS="200").stdout
    assert shown.count(" done ") == 7 and f"{STEPS} of {STEPS}" in shown


def test_every_rank_has_a_log(done):
    job_id = launched(done)["distilled"]
    found = {path.name for path in (done / "logs").glob(f"04_distilled-{job_id}*.log")}
    assert found == {f"04_distilled-{job_id}.log", *(f"04_distilled-{job_id}-r0-{rank}.log" for rank in range(4))}


def test_a_chain_that_is_done_is_not_run_again(done, inputs, minitron):
    before = launched(done)
    again = minitron("launch", *recipe(inputs, done))
    assert again.returncode == 0 and "nothing to do" in again.stdout
    assert launched(done) == before


def test_a_folder_of_another_run_is_left_alone(done, inputs, minitron):
    other = minitron("launch", *recipe(inputs, done), f"stages.distilled.steps={STEPS + 1}")
    assert other.returncode == 2
    assert f"distill.steps was {STEPS} and is {STEPS + 1}" in other.stderr


def test_no_secret_is_written_anywhere(done):
    files = [path for path in done.rglob("*") if path.is_file()]
    assert len(files) > 50 and any("offline-run" in str(path) for path in files)
    for path in files:
        content = path.read_bytes()
        for name, secret in SECRETS.items():
            assert secret.encode() not in content, f"{name} is in {path}"


def distill(done: Path, output: Path) -> list[str]:
    """The training of the chain by itself."""
    settings = yaml.safe_load((done / "launch" / "04_distilled.yaml").read_text())
    data = settings["data"]
    return [
        "distill",
        *(f"{role}={quoted(settings[role])}" for role in ("teacher", "student")),
        f"output={output}",
        f"data={{text:{data['text']},cache_dir:{output.parent / 'corpora'},sequence_length:16,heldout_pct:20}}",
        "parallel={tensor:2,pipeline:2}",
        *DISTILL,
        *CLUSTER,
    ]


def training(output: Path, step: int) -> bool:
    path = output / "metrics.jsonl"
    return path.is_file() and len(path.read_text().splitlines()) >= step


def kill_a_rank(output: Path) -> None:
    ranks = [p for p in psutil.process_iter(["cmdline"]) if str(output) in " ".join(p.info["cmdline"] or [])]
    ranks = [p for p in ranks if p.info["cmdline"][0] == sys.executable and "agent" not in str(p.info["cmdline"])]
    os.kill(ranks[-1].pid, signal.SIGKILL)


@pytest.mark.parametrize("rendezvous, events", [("srun", ["preempted"]), ("torchrun", ["warned", "killed"])])
def test_a_job_that_is_interrupted_comes_back_and_ends_as_if_it_had_not_been(
    done, tmp_path, minitron, job, ended, ask, rendezvous, events
):
    output = tmp_path / "out"
    arguments = [*distill(done, output), f"cluster.rendezvous={rendezvous}"]
    assert minitron("launch", *arguments).returncode == 0
    [job_id] = launched(tmp_path / "out.launch").values()
    for count, event in enumerate(events, 1):
        wait_for(lambda: training(output, SAVE_EVERY + 2 if event == "killed" else 3), what="some steps")  # noqa: B023
        if event == "preempted":  # by Slurm, for another job that takes its nodes
            ask("sbatch", "--partition=urgent", "--exclusive", "--nodes=2", "--output=/dev/null", "--wrap=sleep 1")
        elif event == "warned":  # as before the end of its time
            ask("scancel", "--signal=USR1", job_id)
        else:
            kill_a_rank(output)
        wait_for(lambda: job(job_id)["Restarts"] == str(count), what="a restart")  # noqa: B023
    assert ended(job_id) == "COMPLETED", logs(tmp_path / "out.launch")
    assert job(job_id)["Restarts"] == str(len(events))
    assert metrics(output) == metrics(done / "distilled")
    wandb_ids, rows = history(output)
    assert len(wandb_ids) == 1 and rows == read_metrics(output)
    said = logs(tmp_path / "out.launch")
    assert "saved and stopped" in said
    assert (f"resuming after step {SAVE_EVERY}" in said) == ("killed" in events)


def test_a_sweep_is_an_array_of_which_few_run_at_once(done, tmp_path, minitron, job, ended, ask):
    sweep = [
        *("launch", "--multirun", "prune", "target.ffn=40,36,32,28", f"output={tmp_path / 'sweep'}"),
        *(f"{role}={quoted(done / name)}" for role, name in (("checkpoint", "teacher"), ("scores", "scores"))),
        *CLUSTER,
        "cluster.max_parallel=2",
    ]
    assert minitron(*sweep).returncode == 0
    [job_id] = launched(tmp_path / "sweep").values()
    tasks = ask("scontrol", "--oneliner", "show", "job", job_id)
    assert "ArrayTaskThrottle=2" in tasks
    states = lambda: ask("squeue", "--noheader", "--states=all", "--array", "--format=%T", f"--jobs={job_id}").split()  # noqa: E731
    wait_for(lambda: states() == ["COMPLETED"] * 4, what="four tasks")
    manifests = [json.loads((tmp_path / "sweep" / str(i) / "prune" / "manifest.json").read_text()) for i in range(4)]
    assert [found["network"]["mlp"]["ffn_hidden_size"] for found in manifests] == [40, 36, 32, 28]
    shown = minitron("launch", "status", str(tmp_path / "sweep")).stdout
    assert shown.count(" done ") == 4


def test_what_follows_a_stage_that_fails_is_cancelled(inputs, tmp_path, minitron, job, ended):
    empty = tmp_path / "empty.txt"
    empty.write_text("")
    arguments = recipe(inputs, tmp_path / "run") + [f"stages.scores.data.text=[{empty}]", "cluster.max_restarts=0"]
    assert minitron("launch", *arguments).returncode == 0
    ids = launched(tmp_path / "run")
    assert ended(ids["scores"]) == "FAILED"
    assert {ended(ids[name]) for name in ("pruned", "distilled", "report")} == {"CANCELLED"}
    assert job(ids["scores"])["Restarts"] == "0" and job(ids["scores"])["ExitCode"] == "2:0"
    assert str(empty) in logs(tmp_path / "run")


def test_a_chain_can_be_cancelled(inputs, tmp_path, minitron, job):
    assert minitron("launch", *recipe(inputs, tmp_path / "run")).returncode == 0
    again = minitron("launch", *recipe(inputs, tmp_path / "run"))
    assert again.returncode == 2 and "is in the queue already" in again.stderr
    assert minitron("launch", "cancel", str(tmp_path / "run")).returncode == 0
    ids = launched(tmp_path / "run")
    wait_for(lambda: {job(job_id)["JobState"] for job_id in ids.values()} == {"CANCELLED"}, what="cancelled jobs")
    assert all(job(job_id)["Restarts"] == "0" for job_id in ids.values())
    assert "cancelled" in minitron("launch", "status", str(tmp_path / "run")).stdout


def test_a_bad_node_is_named_and_left_out_on_request(done, tmp_path, minitron, job, ended):
    # An interpreter that finds other code on the first node.
    other = tmp_path / "other" / "minitron_megatron"
    shutil.copytree(ROOT / "minitron_megatron", other, ignore=shutil.ignore_patterns("__pycache__"))
    (other / "errors.py").open("a").write("\n# changed\n")
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/bash\n[[ $SLURMD_NODENAME != n1 ]] || export PYTHONPATH={other.parent}\nexec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    # From another folder than the repository, whose own code Python would find first.
    arguments = [a for a in distill(done, tmp_path / "out") if not a.startswith("parallel")]
    arguments += ["parallel={tensor:2}", f"cluster.python={python}", "steps=2", "save_every=null"]

    assert minitron("launch", *arguments, cwd=tmp_path).returncode == 0
    [job_id] = launched(tmp_path / "out.launch").values()
    assert ended(job_id) == "FAILED"
    said = logs(tmp_path / "out.launch")
    assert "preflight: n1: has other code" in said and "preflight failed: n1" in said

    assert minitron("launch", *arguments, "cluster.exclude_bad_nodes=true", cwd=tmp_path).returncode == 0
    [job_id] = launched(tmp_path / "out.launch").values()
    assert ended(job_id) == "COMPLETED", logs(tmp_path / "out.launch")
    assert job(job_id)["NodeList"] == "n2" and job(job_id)["ExcNodeList"] == "n1"


def test_a_port_in_use_is_found_before_the_ranks_start(done, tmp_path, minitron, ended):
    import socket

    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = [*distill(done, tmp_path / "out"), f"cluster.port={port}"]
        assert minitron("launch", *arguments).returncode == 0
        [job_id] = launched(tmp_path / "out.launch").values()
        assert ended(job_id) == "FAILED"
    assert f"port {port} cannot be opened" in logs(tmp_path / "out.launch")


@pytest.mark.parametrize(
    "setting, problem",
    [
        ("cluster.partition=gpu", "cluster.partition = gpu: there is no such partition"),
        ("cluster.reservation=tomorrow", "sbatch refused 01_teacher.sh: .*reservation"),
        ('cluster.extra=["--licenses=matlab"]', "sbatch refused 01_teacher.sh: .*license"),
    ],
)
def test_what_slurm_refuses_is_told_in_its_words(inputs, tmp_path, minitron, setting, problem):
    refused = minitron("launch", *recipe(inputs, tmp_path / "run"), setting)
    assert refused.returncode == 2
    assert re.search(problem, refused.stderr), refused.stderr
