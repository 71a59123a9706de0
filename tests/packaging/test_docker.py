"""What can be known of docker/ without Docker: no image was built in these tests."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BASH = shutil.which("bash")
OF_THE_IMAGE = {"torch", "triton"}
PYTHON = {"python_version": "3.12", "python_full_version": "3.12.3", "platform_system": "Linux"}


def instructions():
    """(keyword, argument) of every instruction of the Dockerfile, in its order."""
    lines = (DOCKER / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.lstrip().startswith("#"))
    logical = [line.strip() for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(keyword.upper(), argument.strip()) for keyword, argument in (line.split(None, 1) for line in logical)]


def arguments_of(keyword):
    return [argument for found, argument in instructions() if found == keyword]


def copied():
    """What the Dockerfile copies out of the repository."""
    return [source for argument in arguments_of("COPY") for source in argument.split()[:-1]]


def pip_commands():
    """The arguments of every `pip install` in the Dockerfile."""
    commands = [re.split(r"&&|;|\b(?:then|else)\b", run) for run in arguments_of("RUN")]
    words = [shlex.split(command) for run in commands for command in run if "pip install" in command]
    return [command[command.index("install") + 1 :] for command in words]


def pins(path):
    """Version of every package that a file of constraints pins for Python 3.12, by name."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    requirements = [Requirement(line) for line in lines]
    here = [found for found in requirements if found.marker is None or found.marker.evaluate(PYTHON)]
    versions = {}
    for requirement in here:
        [specifier] = requirement.specifier
        assert specifier.operator == "==", f"{path.name} does not pin {requirement}"
        assert canonicalize_name(requirement.name) not in versions, f"{path.name} pins {requirement.name} twice"
        versions[canonicalize_name(requirement.name)] = specifier.version
    return versions


@pytest.fixture
def settings(monkeypatch):
    """What setup.py gives to setuptools."""
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    path = ROOT / "setup.py"
    exec(compile(path.read_text(encoding="utf-8"), path, "exec"), {"__file__": str(path)})
    return given


def test_base_image_is_pinned():
    [base] = arguments_of("FROM")
    assert base == "${BASE_IMAGE}"
    [default] = [argument for argument in arguments_of("ARG") if argument.startswith("BASE_IMAGE=")]
    assert re.fullmatch(r"BASE_IMAGE=nvcr\.io/nvidia/pytorch:\d\d\.\d\d-py3(@sha256:[0-9a-f]{64})?", default)
    # Of two builds from one checkout neither gets another Apex.
    [apex] = [argument for argument in arguments_of("ARG") if argument.startswith("APEX_REF=")]
    assert re.fullmatch(r"APEX_REF=[0-9a-f]{40}", apex)


def test_copied_files_exist_and_reach_docker():
    assert copied()
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore
    for source in copied():
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignore, f".dockerignore keeps {source} from docker"
    assert sorted(line[1:] for line in ignore if line.startswith("!")) == sorted(copied())


def test_all_that_setup_py_reads_is_copied(settings):
    assert {"setup.py", "pyproject.toml", "README.md", "minitron_megatron", "conf", "launch"} <= set(copied())
    assert settings["name"] == "minitron-megatron"


def test_dependencies_are_a_layer_before_the_code():
    order = [f"{keyword} {argument}" for keyword, argument in instructions()]
    locked = next(i for i, line in enumerate(order) if "pip install" in line and "constraints-gpu.txt" in line)
    code = next(i for i, line in enumerate(order) if line.startswith("COPY") and "minitron_megatron" in line)
    revision = next(i for i, line in enumerate(order) if line.startswith("ARG REVISION"))
    assert locked < code < revision
    assert 'org.opencontainers.image.revision="${REVISION}"' in order[-1]


def test_requirements_are_locked_within_their_range(settings):
    locked = pins(DOCKER / "constraints-gpu.txt")
    required = [Requirement(text) for text in settings["install_requires"]]
    assert len(required) > len(OF_THE_IMAGE)
    for requirement in required:
        name = canonicalize_name(requirement.name)
        if name not in OF_THE_IMAGE:
            assert name in locked, f"{name} is not in constraints-gpu.txt"
            assert requirement.specifier.contains(locked[name]), f"{requirement} against {locked[name]}"


def test_locked_versions_are_those_of_the_tests():
    oldest, newest = pins(ROOT / "constraints-oldest.txt"), pins(ROOT / "constraints.txt")
    assert pins(DOCKER / "constraints-gpu.txt").items() <= newest.items()
    assert oldest["megatron-core"] == "0.16.1" and newest["megatron-core"] == "0.19.2"
    assert oldest.keys() <= newest.keys()
    # The rest of what is tested with both is the same, so that a difference is Megatron-Core's.
    assert {name for name, version in oldest.items() if newest[name] != version} == {"megatron-core"}


def test_pip_leaves_the_image_s_packages_alone():
    locked = pins(DOCKER / "constraints-gpu.txt")
    assert not [n for n in locked if n in OF_THE_IMAGE or re.match("nvidia|cuda|transformer-engine|torch", n)]
    commands = pip_commands()
    assert len(commands) == 3
    assert all("--no-deps" in command for command in commands), commands


def test_apex_never_comes_from_the_index(settings):
    extras = [text for group in settings["extras_require"].values() for text in group]
    names = {canonicalize_name(Requirement(text).name) for text in [*settings["install_requires"], *extras]}
    assert "apex" not in names | set(pins(DOCKER / "constraints-gpu.txt")) | set(pins(ROOT / "constraints.txt"))
    # What is installed by name would stand here; the Dockerfile gives folders and a file alone.
    for command in pip_commands():
        plain = [word for word in command if not word.startswith("-") and not word.startswith(("/", "."))]
        assert not plain, command
    for path in [ROOT / "README.md", ROOT / "Makefile", *DOCKER.glob("*"), *(ROOT / "docs").glob("*.md")]:
        assert not re.search(r"pip3? install[^\n#]*\bapex\b", path.read_text(encoding="utf-8")), path


def test_runs_as_somebody_without_rights():
    user = arguments_of("USER")[-1]
    assert user.split(":")[0] not in ("root", "0")
    assert any(f"useradd --create-home {user}" in run for run in arguments_of("RUN"))


def test_no_secret_is_asked_for():
    names = [re.split("[= ]", argument)[0] for keyword in ("ARG", "ENV") for argument in arguments_of(keyword)]
    assert not [name for name in names if re.search("TOKEN|PASSWORD|SECRET|KEY", name, re.IGNORECASE)]


def test_shell_of_the_dockerfile_is_valid():
    """The commands of RUN parse as Docker joins them; so does the Python in them."""
    for run in arguments_of("RUN"):
        subprocess.run([BASH, "-n", "-c", run], check=True)
        for program in re.findall(r"-c '([^']+)'", run):
            compile(program, "Dockerfile", "exec")


@pytest.fixture
def without_tools(tmp_path):
    """An environment whose PATH has no enroot and no docker."""
    (tmp_path / "bin").mkdir()
    for name in ("cat", "mv", "rm"):
        (tmp_path / "bin" / name).symlink_to(shutil.which(name))
    return {**os.environ, "PATH": str(tmp_path / "bin")}


def enroot_sh(*arguments, env, cwd):
    command = [BASH, str(DOCKER / "enroot.sh"), *map(str, arguments)]
    return subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True)


def add_tool(env, name, text):
    tool = Path(env["PATH"]) / name
    tool.write_text(f"#!{BASH}\n{text}\n", encoding="utf-8")
    tool.chmod(0o755)


def test_enroot_sh_says_that_enroot_is_missing(without_tools, tmp_path):
    subprocess.run([BASH, "-n", str(DOCKER / "enroot.sh")], check=True)
    assert os.access(DOCKER / "enroot.sh", os.X_OK)
    done = enroot_sh("dockerd://minitron:0.1", env=without_tools, cwd=tmp_path)
    assert done.returncode == 2
    assert "enroot is not installed" in done.stderr
    helped = enroot_sh("--help", env=without_tools, cwd=tmp_path)
    assert helped.returncode == 0 and helped.stdout.startswith("Usage:")


@pytest.mark.parametrize("arguments", [(), ("a", "b", "c"), ("--quick", "a"), ("podman://a",)])
def test_enroot_sh_refuses_what_it_does_not_know(without_tools, tmp_path, arguments):
    done = enroot_sh(*arguments, env=without_tools, cwd=tmp_path)
    assert done.returncode == 2
    assert "enroot.sh: " in done.stderr and "enroot is not installed" not in done.stderr


def test_enroot_sh_calls_enroot(without_tools, tmp_path):
    """With stand-ins for the two tools: what enroot is asked for, and that a failure leaves the old file."""
    record = '[[ $1 == import && $2 == --output && $4 == -- ]] && printf "%s\\n" "$5" > "$3"'
    add_tool(without_tools, "enroot", record)
    file = tmp_path / "an image.sqsh"
    done = enroot_sh("minitron:0.1", file, env=without_tools, cwd=tmp_path)
    assert done.returncode == 2 and "docker is not installed" in done.stderr
    add_tool(without_tools, "docker", "")
    assert enroot_sh("minitron:0.1", file, env=without_tools, cwd=tmp_path).returncode == 0
    assert file.read_text() == "dockerd://minitron:0.1\n"

    again = ("docker://registry.example.com#team/minitron:0.1", file)
    assert "--force" in enroot_sh(*again, env=without_tools, cwd=tmp_path).stderr
    assert enroot_sh("--force", *again, env=without_tools, cwd=tmp_path).returncode == 0
    assert file.read_text() == f"{again[0]}\n"

    add_tool(without_tools, "enroot", f"{record}; exit 1")
    assert enroot_sh("--force", "minitron:0.2", file, env=without_tools, cwd=tmp_path).returncode == 1
    assert file.read_text() == f"{again[0]}\n"
    assert not list(tmp_path.glob("*.partial"))
