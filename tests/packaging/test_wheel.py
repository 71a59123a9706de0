"""The wheel, installed far from the checkout: conf/ and launch/ are inside, and the command runs from any folder."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import minitron_megatron
from minitron_megatron.config.schema import SCHEMAS

ROOT = Path(__file__).parents[2]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder that the wheel is installed in. Its requirements are those of the interpreter that runs the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy, since building leaves files beside the sources.
    source = folder / "source"
    source.mkdir()
    for name in ("minitron_megatron", "conf", "launch"):
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, source)
    build = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([*PIP, *build, str(source)], check=True)
    [wheel] = folder.glob("*.whl")
    assert wheel.name.startswith(f"minitron_megatron-{minitron_megatron.__version__}-")
    install = ["install", "--no-deps", "--no-index", "--target", str(folder / "site")]
    subprocess.run([*PIP, *install, str(wheel)], check=True)
    shutil.rmtree(source)
    return folder / "site"


@pytest.fixture
def run(installed, tmp_path):
    """Run Python in another folder, with the installed copy before everything else."""

    def call(*arguments):
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        process = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert process.returncode == 0, process.stderr
        return process.stdout

    return call


def test_the_installed_copy_is_the_one_that_runs(run, installed):
    out = run("-c", "import minitron_megatron.launch.local as m; print(m.__file__)")
    assert Path(out.strip()) == installed / "minitron_megatron" / "launch" / "local.py"


def test_all_files_of_conf_and_launch_are_inside(installed):
    for name in ("conf", "launch"):
        shipped = {
            path.relative_to(ROOT / name)
            for path in (ROOT / name).rglob("*")
            if path.is_file() and path.suffix != ".pyc"
        }
        inside = installed / "minitron_megatron" / name
        assert not inside.is_symlink()
        assert shipped <= {path.relative_to(inside) for path in inside.rglob("*")}


def test_the_command_lists_its_verbs(run, installed):
    for command in (["-m", "minitron_megatron.cli"], [str(installed / "bin" / "minitron")]):
        assert all(verb in run(*command, "--help") for verb in SCHEMAS)


def test_a_recipe_composes_from_the_installed_files(run):
    out = run("-m", "minitron_megatron.cli", "compress", "+experiment=smollm2_135m", "--cfg")
    recipe = yaml.safe_load(out)
    assert recipe["run_dir"] == "runs/smollm2_135m"
    assert recipe["stages"]["pruned"]["scores"] == "runs/smollm2_135m/scores"
