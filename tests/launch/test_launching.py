"""`minitron launch` where there is no Slurm, and on this machine."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from minitron_megatron.config.cluster import ClusterConfig, ContainerConfig
from minitron_megatron.config.compose import shipped
from tests.launch.conftest import ROOT

# A login node: nothing but what reads settings and writes scripts.
LOGIN_NODE = """
import sys
for name in ("torch", "megatron", "transformers", "safetensors", "wandb", "matplotlib"):
    sys.modules[name] = None
from minitron_megatron.cli import main
sys.exit(main(sys.argv[1:]))
"""


def on_login_node(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    environment = {"PATH": "/nowhere", "PYTHONPATH": f"{ROOT}:{cwd}"}
    command = [sys.executable, "-c", LOGIN_NODE, "launch", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


# On a laptop, or with a student of another recipe, which cannot be read before that has run.
NOT_PLANNED = [
    "smollm2_135m",
    "smollm2_135m_lottery",
    "smollm2_135m_progressive",
    "smollm2_135m_sparse",
    "sparse_llama31_8b_task",
]


@pytest.mark.parametrize("experiment", [name for name in shipped("experiment") if name not in NOT_PLANNED])
def test_a_recipe_for_gpus_is_planned_without_torch_and_slurm_and_touches_nothing(experiment, tmp_path):
    found = on_login_node("dry_run=true", f"+experiment={experiment}", "cluster=slurm", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.count("#!/bin/bash") >= 9 and "--gpus-per-node=8" in found.stdout
    assert "distilled: about" in found.stderr and "79.1 GiB on each of 8 h100" in found.stderr
    assert not any(tmp_path.iterdir())


def test_cfg_shows_what_would_be_used_and_launches_nothing(tmp_path):
    verb = ["distill", "teacher=t", "student=s", "output=o", "data.text=[x]"]
    shown = on_login_node(*verb, "cluster=slurm", "steps=70", "--cfg", cwd=tmp_path)
    own, settings = yaml.safe_load_all(shown.stdout)
    assert (own["cluster"]["kind"], own["cluster"]["gpu"], settings["steps"]) == ("slurm", "h100", 70)
    swept = on_login_node(*verb, "steps=70,80", "--multirun", "--cfg", cwd=tmp_path)
    assert [settings["steps"] for settings in list(yaml.safe_load_all(swept.stdout))[1:]] == [70, 80]
    assert not any(tmp_path.iterdir())


def test_what_is_launched_knows_the_settings_of_its_plugins(tmp_path):
    register = "register(Axis('states', 'channels of the state.', __name__, 'state'))"
    plugin = f"from minitron_megatron.config.axes import Axis, register\n{register}\n"
    (tmp_path / "their_plugin.py").write_text(plugin)
    recipe = ["+experiment=llama31_8b_width_4b", "stages.pruned.target.states=3"]
    assert "target.states is not a setting" in on_login_node(*recipe, "--cfg", cwd=tmp_path).stderr
    shown = on_login_node(*recipe, "plugins=[their_plugin]", "--cfg", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    own, settings = yaml.safe_load_all(shown.stdout)
    assert own["plugins"] == settings["plugins"] == ["their_plugin"]
    stages = settings["stages"].values()
    assert {tuple(stage["plugins"]) for stage in stages} == {("their_plugin",)}
    assert settings["stages"]["pruned"]["target"]["states"] == 3


def test_without_sbatch_nothing_is_written(tmp_path):
    found = on_login_node("+experiment=llama31_8b_width_4b", "cluster=slurm", cwd=tmp_path)
    assert found.returncode == 2 and "there is no sbatch on the PATH" in found.stderr
    assert not any(tmp_path.iterdir())


def test_a_layout_that_does_not_fit_the_gpu_is_refused_with_one_that_does():
    recipe = ["+experiment=llama31_8b_width_4b", "cluster=slurm", "dry_run=true"]
    greedy = ["stages.distilled.micro_batch=4", "stages.distilled.optimizer.distributed=false"]
    refused = on_login_node(*recipe, *greedy)
    assert refused.returncode == 2
    assert "needs about 118 GiB" in refused.stderr and "it fits with recompute=true" in refused.stderr
    assert on_login_node(*recipe, *greedy, "stages.distilled.recompute=true").returncode == 0
    assert on_login_node(*recipe, *greedy, "cluster.gpu=null").returncode == 0
    assert "is not known" in on_login_node(*recipe, "cluster.gpu=h1000").stderr


def test_a_warning_that_comes_too_late_for_a_step_is_told_of():
    recipe = ["+experiment=llama31_8b_width_4b", "cluster=slurm", "dry_run=true"]
    assert "signal_s" not in on_login_node(*recipe).stderr
    assert "distilled: told cluster.signal_s = 5 s before" in on_login_node(*recipe, "cluster.signal_s=5").stderr


@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["sing"], "give one verb"),
        (["status"], "takes the folder of a run"),
        (["status", "nowhere", "--cfg"], "takes the folder of a run"),
        (["distill", "--config", "distill.yaml"], "--config distill.yaml is of no use to launch"),
        (["status", "nowhere"], "nowhere is not the folder of a launched run"),
        (["cluster=mine"], "cluster = mine: not in"),
        (["cluster.node=2"], "cluster.node is not a setting"),
        (["--multirun", "+experiment=smollm2_135m"], "several values"),
    ],
)
def test_what_is_wrong_is_told(arguments, problem):
    found = on_login_node(*arguments)
    assert found.returncode == 2 and problem in found.stderr


@pytest.mark.parametrize(
    "settings, problem",
    [
        ({"time": "soon"}, "time = 'soon'"),
        ({"partition": "a\nb"}, "without line breaks"),
        ({"extra": ["mail"]}, "--NAME"),
        ({"extra": ["--array=1"]}, "which the job script sets"),
        ({"extra": ["--comment=a\n#SBATCH --account=theirs"]}, "--NAME"),
        ({"modules": ["cuda; rm"]}, "module load"),
        ({"venv": "a", "python": "b"}, "all set"),
        ({"gpus_per_node": 2, "ranks_per_node": 4}, "every rank takes one"),
        ({"port": 80}, "from 1024"),
        ({"container": ContainerConfig(mounts=["/a:/b"])}, "set cluster.container.image"),
        ({"container": ContainerConfig("i", ["/a"])}, "HOST:CONTAINER"),
        ({"container": ContainerConfig("i", environment=["A=b"])}, "not values"),
    ],
)
def test_settings_of_a_cluster_that_are_wrong(settings, problem):
    [found] = ClusterConfig(**settings).problems()
    assert problem in found


def test_a_verb_runs_here_and_is_not_run_again(inputs, tmp_path):
    launch = [sys.executable, "-m", "minitron_megatron.cli", "launch"]
    arguments = [*launch, "import", f"source={inputs / 'source'}", f"output={tmp_path / 'out'}", "workers=2"]
    first = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert first.returncode == 0, first.stderr
    assert (tmp_path / "out" / "manifest.json").is_file() and (tmp_path / "out.launch" / "launch").is_dir()
    again = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 0 and "nothing to do" in again.stdout
