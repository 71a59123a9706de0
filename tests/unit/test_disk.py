"""What a disk does not give is told in one line that names the disk."""

import errno
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

from minitron_megatron import disk
from minitron_megatron.config import verbs
from minitron_megatron.config.schema import SCHEMAS
from minitron_megatron.disk import convert_enospc, convert_os_errors
from minitron_megatron.errors import ConfigError, DiskSpaceError, Preempted

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
QUOTA = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))


@pytest.fixture
def full_places(monkeypatch):
    """Places whose file systems have no space left."""
    places = set()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(2**40, 0, 0 if Path(path) in places else 2**40))
    return places


@pytest.mark.parametrize("chained", [False, True])
def test_the_full_one_of_several_disks_is_named(chained, full_places, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    full_places.add(tmp_path / "scratch")
    said = f"the disk of TMPDIR = {tmp_path}/scratch is full"
    with pytest.raises(DiskSpaceError, match=said), convert_enospc(tmp_path / "out"):
        if not chained:
            raise FULL
        raise RuntimeError("a library's own words") from FULL


def test_shared_memory_is_named_with_what_makes_it_larger(full_places, tmp_path):
    full_places.add(Path("/dev/shm"))
    with pytest.raises(DiskSpaceError, match="the disk of /dev/shm is full: .*--shm-size"), convert_os_errors():
        raise RuntimeError("unable to write to file </torch_1>: No space left on device (28)")


@pytest.mark.parametrize("name", ["new", "folder/new"])
def test_the_disk_of_the_file_that_an_error_names_is_the_full_one(name, tmp_path):
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "cache" / name))
    with pytest.raises(DiskSpaceError, match="is full"), convert_os_errors():
        raise error


def test_a_quota_is_told_from_a_full_disk(tmp_path):
    said = f"the quota of the disk of {tmp_path}/out is exhausted"
    with pytest.raises(DiskSpaceError, match=said), convert_enospc(tmp_path / "out"):
        raise QUOTA


def test_python_without_a_temporary_folder_means_that_its_disk_is_full(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with pytest.raises(DiskSpaceError, match=f"TMPDIR = {tmp_path} is full"), convert_os_errors():
        raise FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/x']")


@pytest.mark.parametrize("error", [Preempted("saved"), KeyboardInterrupt(), SystemExit(143)])
def test_what_no_disk_causes_stays_what_it_is_though_a_disk_is_full(error, full_places, tmp_path):
    full_places.add(tmp_path)
    with pytest.raises(type(error)), convert_enospc(tmp_path / "out"):
        raise error
    with pytest.raises(ZeroDivisionError), convert_os_errors():
        raise ZeroDivisionError


@pytest.mark.parametrize("verb", [verb for verb in verbs.VERBS if verb != "inspect"])
@pytest.mark.parametrize("error", [FULL, QUOTA, PermissionError(errno.EACCES, "Permission denied", "/data/x")])
def test_every_verb_tells_it_in_one_line(verb, error, monkeypatch):
    def fail(config):
        raise error

    name = verbs.VERBS[verb].split(":")[1]
    for load in ("import_heavy", "import_module"):
        monkeypatch.setattr(verbs, load, lambda module: type("module", (), {name: staticmethod(fail)}))
    settings = SCHEMAS[verb]()
    if hasattr(settings, "output"):
        settings.output = "out"
    monkeypatch.setattr(verbs, "_missing", lambda config: [])
    monkeypatch.setattr(type(settings), "problems", lambda self: [])
    with pytest.raises((DiskSpaceError, ConfigError)) as raised:
        verbs.verb_function(verb)(settings)
    assert len(str(raised.value).splitlines()) == 1 and raised.value.exit_status == 2


AS_A_USER = """
import os, sys
import minitron_megatron
from minitron_megatron.config.schema import ExportConfig, InspectConfig
from minitron_megatron.errors import UserError
verb, *arguments = sys.argv[1:]
function = getattr(minitron_megatron, verb)
settings = {"inspect": InspectConfig, "export": ExportConfig}[verb](*arguments)
os.seteuid(65534)
try:
    function(settings)
except UserError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")
@pytest.mark.parametrize("what", ["read", "write"])
def test_a_missing_permission_is_one_line_that_names_the_path(what, tmp_path):
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if folder.stat().st_mode & 0o5 != 0o5 and folder != Path("/"):
            folder.chmod(0o755)
    evaluation, closed = tmp_path / "evaluation", tmp_path / "closed"
    evaluation.mkdir()
    closed.mkdir()
    (evaluation / "manifest.json").write_text("{}")
    if what == "read":
        evaluation.chmod(0o700)
        command = ["inspect", f"{evaluation}/within"]
    else:
        command = ["export", f"{evaluation}", f"{closed}/out"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "HOME": "/nonexistent"}
    done = subprocess.run(
        [sys.executable, "-c", AS_A_USER, *command], env=environment, capture_output=True, text=True, timeout=120
    )
    [line] = done.stdout.splitlines()
    assert "Permission denied" in line and str(evaluation if what == "read" else closed) in line, done.stderr


def test_a_small_disk_that_is_full_is_named(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not permitted")
    try:
        with pytest.raises(DiskSpaceError, match=f"the disk of {small}.* is full"), convert_os_errors(small):
            (small / "file").write_bytes(bytes(2**20))
        with pytest.raises(DiskSpaceError, match=f"the disk of {small}/out is full"), convert_enospc(small / "out"):
            raise RuntimeError("a writer's file came out too short")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_permissions_are_read_from_the_error_alone():
    said = "/data/x cannot be used by user .*Permission denied"
    with pytest.raises(ConfigError, match=said), convert_os_errors():
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/data/x")
    assert disk.user_error(PermissionError(errno.EACCES, "no file is named")) is None
