"""A fingerprint is of all the content; what it costs is one reading, or none."""

import os
import shutil
import time
import zipfile

import pytest
import torch

from minitron_megatron.artifacts import fingerprint as module
from minitron_megatron.artifacts.fingerprint import fingerprint, is_of, sampled_fingerprint


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture
def read(monkeypatch):
    """The names of the files that are read."""
    names = []
    original = module._read
    monkeypatch.setattr(module, "_read", lambda file, advance: names.append(file.name) or original(file, advance))
    return names


def settle(*files):
    """Change the times of files to a minute ago."""
    for file in files:
        os.utime(file, (time.time() - 60, time.time() - 60))


@pytest.fixture
def folder(tmp_path):
    """Weights as three writers leave them, and a small file."""
    root = tmp_path / "model"
    root.mkdir()
    (root / "config.json").write_text("{}")
    (root / "model.safetensors").write_bytes(os.urandom(10**6))
    with open(root / "__0_0.distcp", "wb") as file:
        for size in (0, 1, 50_000):
            torch.save(torch.randn(size), file)
    settle(*root.iterdir())
    return root


@pytest.mark.parametrize("place", [0, 1, 333_333, 499_999, 10**6 - 1])
def test_any_byte_of_any_file_counts(place, folder):
    """The middle of a file is where a fingerprint by samples does not look."""
    before, sampled = fingerprint(folder), sampled_fingerprint(folder)
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    settle(folder / "model.safetensors")
    assert fingerprint(folder) != before
    assert (sampled_fingerprint(folder) == sampled) == (place in (333_333, 499_999))


def test_a_name_counts_and_a_place_does_not(folder, tmp_path):
    before = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy")
    assert fingerprint(tmp_path / "copy") == before
    (tmp_path / "copy/config.json").rename(tmp_path / "copy/other.json")
    assert fingerprint(tmp_path / "copy") != before


def test_nothing_is_read_a_second_time(folder, read):
    before = fingerprint(folder)
    assert sorted(read) == ["config.json", "model.safetensors"]
    assert fingerprint(folder) == before
    assert len(read) == 2


def test_what_has_just_changed_is_read_again(folder, read):
    """Two changes within what a file system's clock can tell look the same."""
    (folder / "config.json").write_text("[]")
    first = fingerprint(folder)
    (folder / "config.json").write_text("()")
    assert fingerprint(folder) != first
    assert read.count("config.json") == 2 and read.count("model.safetensors") == 1


def test_a_replaced_file_of_the_same_size_and_time_is_read_again(folder, read):
    before, state = fingerprint(folder), (folder / "model.safetensors").stat()
    (folder / "new").write_bytes(os.urandom(10**6))
    os.utime(folder / "new", ns=(state.st_atime_ns, state.st_mtime_ns))
    (folder / "new").replace(folder / "model.safetensors")
    assert fingerprint(folder) != before


def test_what_torch_saved_is_known_by_its_checksums(folder, read):
    """A changed number changes the checksum that stands behind it."""
    before = fingerprint(folder)
    with open(folder / "__0_0.distcp", "wb") as file:
        for size in (0, 1, 50_000):
            torch.save(torch.randn(size), file)
    assert fingerprint(folder) != before
    assert "__0_0.distcp" not in read


def without_checksums(path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.randn(9), path)
    finally:
        torch.serialization.set_crc32_options(True)


def with_a_tail(path):
    torch.save(torch.randn(9), path)
    with open(path, "ab") as file:
        file.write(b"more")


def with_a_head(path):
    torch.save(torch.randn(9), path)
    path.write_bytes(b"more" + path.read_bytes())


def of_another_writer(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a", b"text")


@pytest.mark.parametrize("write", [without_checksums, with_a_tail, with_a_head, of_another_writer])
def test_what_checksums_do_not_cover_is_read(write, tmp_path, read):
    path = tmp_path / "file"
    write(path)
    fingerprint(path)
    assert read == ["file"]


def test_the_cache_of_the_hub_names_files_by_their_content(tmp_path, read):
    """So that a folder of links is known without reading, and is the same as a folder of copies."""
    content = os.urandom(1000)
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/model.safetensors").write_bytes(content)
    expected = fingerprint(tmp_path / "copy")
    snapshot, blobs = tmp_path / "models--a--b/snapshots/main", tmp_path / "models--a--b/blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    blob = blobs / module.hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    (snapshot / "model.safetensors").symlink_to(blob)
    assert fingerprint(snapshot) == expected
    assert read == ["model.safetensors"]


def test_without_a_cache_everything_is_read_again(folder, read, cache, monkeypatch):
    (cache / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache / "file"))
    assert fingerprint(folder) == fingerprint(folder)
    assert len(read) == 4


def test_a_damaged_cache_is_made_anew(folder, read, cache):
    before = fingerprint(folder)
    for file in cache.rglob("*.json"):
        file.write_text('{"config.json": 3')
    assert fingerprint(folder) == before and len(read) == 4
    for file in cache.rglob("*.json"):
        file.write_text('{"config.json": 3, "model.safetensors": []}')
    assert fingerprint(folder) == before and len(read) == 6


def test_fingerprints_of_earlier_versions_are_compared_as_they_were_made(folder):
    recorded = fingerprint(folder), sampled_fingerprint(folder)
    assert [is_of(one, folder) for one in recorded] == [True, True]
    (folder / "config.json").write_text("[]")
    assert [is_of(one, folder) for one in recorded] == [False, False]
