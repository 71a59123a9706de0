"""Results appear whole or not at all, and are made once."""

import json
import os
import shutil
import subprocess
from collections import namedtuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from minitron_megatron import cli
from minitron_megatron.artifacts.fingerprint import fingerprint
from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.artifacts.output import writing
from minitron_megatron.checkpoint import huggingface
from minitron_megatron.checkpoint.convert import export, import_checkpoint
from minitron_megatron.config.schema import DType, ExportConfig, ImportConfig
from minitron_megatron.data.corpus import text_parents
from minitron_megatron.errors import ConfigError, DiskSpaceError
from tests.tiny import LLAMA, hf_model, save_hf


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A Hugging Face folder with weights of 3.7 MB."""
    model = hf_model(**{**LLAMA, "hidden_size": 192, "intermediate_size": 440, "num_hidden_layers": 3})
    return save_hf(tmp_path_factory.mktemp("source") / "hf", model)


def everything_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def times(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_an_interrupted_import_leaves_nothing_and_can_be_repeated(error, source, tmp_path, monkeypatch):
    config, calls = ImportConfig(str(source), str(tmp_path / "a/b")), []
    read = huggingface.HuggingFaceFolder.read

    def stop_later(*arguments):
        calls.append(arguments)
        if len(calls) == 12:
            assert everything_below(tmp_path / "a")  # something has been written by now
            raise error
        return read(*arguments)

    monkeypatch.setattr(huggingface.HuggingFaceFolder, "read", stop_later)
    with pytest.raises(error):
        import_checkpoint(config)
    assert everything_below(tmp_path) == []
    import_checkpoint(config)
    assert everything_below(tmp_path / "a/b")


def test_what_a_killed_process_left_is_replaced(source, tmp_path):
    left = tmp_path / ".c.partial"
    (left / "iter_0000000").mkdir(parents=True)
    (left / "iter_0000000/__0_0.distcp").write_text("half a file")
    import_checkpoint(ImportConfig(str(source), str(tmp_path / "c")))
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_finished_result_is_not_made_again(source, tmp_path):
    output = import_checkpoint(ImportConfig(str(source), str(tmp_path / "c")))
    before = times(output)
    import_checkpoint(ImportConfig(str(source), str(output)))
    assert times(output) == before
    # Nor when both were moved: inputs are known by their content.
    heartbeat = shutil.copytree(source, tmp_path / "moved")
    import_checkpoint(ImportConfig(str(heartbeat), str(output)))
    assert times(output) == before


def test_a_result_of_other_settings_or_inputs_is_refused_and_untouched(source, tmp_path):
    output = import_checkpoint(ImportConfig(str(source), str(tmp_path / "c")))
    before, other = times(output), shutil.copytree(source, tmp_path / "other")
    tensors = safe_open(other / "model.safetensors", framework="pt")
    changed = {name: tensors.get_tensor(name) + 1 for name in tensors.keys()}  # noqa: SIM118, it is no dict
    save_file(changed, other / "model.safetensors")
    for config, changed in (
        (ImportConfig(str(source), str(output), DType.BF16), r"\(dtype was null and is 'bf16'\)"),
        (ImportConfig(str(other), str(output)), r"\(source is another one\)"),
    ):
        with pytest.raises(ConfigError, match=f"output = .*/c holds a result of other settings or inputs {changed}: "):
            import_checkpoint(config)
    assert times(output) == before


def test_what_is_no_result_is_never_overwritten(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("text")
    for name in ("mine", "file"):
        with pytest.raises(ConfigError, match=f"output = .*/{name} exists and is not a finished result"):
            import_checkpoint(ImportConfig(str(source), str(tmp_path / name)))
    assert everything_below(tmp_path) == ["file", "mine", "mine/thesis.txt"]
    (tmp_path / "empty").mkdir()
    import_checkpoint(ImportConfig(str(source), str(tmp_path / "empty")))


def test_fingerprints_follow_content(tmp_path):
    large = torch.arange(200_000).numpy().tobytes()
    (tmp_path / "a").mkdir()
    (tmp_path / "a/weights").write_bytes(large)
    first = fingerprint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert fingerprint(tmp_path / "b") == first
    found = {first}
    for change in (lambda b: b + b"0", lambda b: b"0" + b[1:], lambda b: b[:-1] + b"0"):
        (tmp_path / "b/weights").write_bytes(change(large))
        found.add(fingerprint(tmp_path / "b"))
    (tmp_path / "a/weights").rename(tmp_path / "a/other")
    assert len(found | {fingerprint(tmp_path / "a")}) == 5


def test_a_manifest_survives_its_file(tmp_path):
    parents = [Parent("teacher", "t", "abc")]
    manifest = Manifest("checkpoint", {"hidden": 3}, parents, {"steps": 2}, {"parameters": 5}, verb="prune")
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert everything_below(tmp_path) == ["manifest.json"]
    assert json.loads((tmp_path / "manifest.json").read_text())["version"]


def rewritten(folder, change):
    """A folder whose manifest has been changed."""
    path = folder / "manifest.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def test_a_result_of_an_earlier_version_is_skipped_and_left_as_it_is(source, tmp_path):
    output = import_checkpoint(ImportConfig(str(source), str(tmp_path / "c")))
    assert Manifest.read(output).verb == "import"

    def as_before(values):
        del values["verb"]  # which were not written then
        del values["config"]["dtype"]
        values["config"]["output"] = "elsewhere"

    rewritten(output, as_before)
    before = times(output)
    import_checkpoint(ImportConfig(str(source), str(output), workers=3))
    assert times(output) == before and Manifest.read(output).verb is None
    with pytest.raises(ConfigError, match=r"\(dtype was null and is 'bf16'\)"):
        import_checkpoint(ImportConfig(str(source), str(output), DType.BF16))


@pytest.mark.parametrize("off", [None, False, 0, 0.0, "", [], {}, {"more": [], "less": {"still": 0}}])
def test_a_setting_that_only_one_version_has_makes_no_difference_while_it_is_off(off):
    with_it, without = Manifest("run", config={"new": off, "steps": 2}), Manifest("run", config={"steps": 2})
    assert without.changes(with_it) == with_it.changes(without) == []


@pytest.mark.parametrize("on", [True, 1, -0.5, "x", [0], {"part": 1}])
def test_a_setting_that_only_one_version_has_and_that_is_on_makes_another_result(on):
    with_it, without = Manifest("run", config={"new": on, "steps": 2}), Manifest("run", config={"steps": 2})
    assert len(without.changes(with_it)) == len(with_it.changes(without)) == 1


@pytest.mark.parametrize("before, after", [(0, 1), (None, 1), (False, True), ([], ["a"]), (1, 0)])
def test_a_setting_that_both_versions_have_makes_a_difference_where_it_differs(before, after):
    manifests = [Manifest("run", config={"steps": value}) for value in (before, after)]
    assert len(manifests[0].changes(manifests[1])) == 1


def test_settings_that_change_no_result_are_those_of_the_verb():
    """`workers` is of no account to import, and an unknown verb says nothing of any setting."""
    for verb, count in (("import", 0), ("distill", 1), (None, 1), ("quantize", 1)):
        manifests = [Manifest("checkpoint", config={"workers": workers}, verb=verb) for workers in (1, 2)]
        assert len(manifests[0].changes(manifests[1])) == count


def test_a_disk_that_is_too_small_is_refused_before_any_work(source, tmp_path, monkeypatch, capsys):
    asked = []

    def small(path):
        asked.append(path)
        return namedtuple("usage", "total used free")(10**9, 10**9, 2_000_000)

    monkeypatch.setattr(shutil, "disk_usage", small)
    monkeypatch.setattr(huggingface.HuggingFaceFolder, "read", lambda *arguments: pytest.fail("work was done"))
    assert cli.main(["import", f"source={source}", f"output={tmp_path / 'a/b'}"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"minitron import: {tmp_path / 'a'} has 2.00 MB free, and ") and "MB are needed" in line
    assert asked == [tmp_path / "a"] and everything_below(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(mount)]
    try:
        made = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command")
    if made.returncode:
        pytest.skip(f"mounting is not permitted: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "--lazy", str(mount)], check=True)


@pytest.mark.parametrize("dtype, message", [("null", "MB free, and "), ("bf16", "is full: free some space")])
def test_a_disk_that_gets_full_leaves_nothing(dtype, message, source, small_disk, capsys):
    """bf16 weights fit by themselves, and the tokenizer or other people's files do not."""
    if dtype == "bf16":
        free = shutil.disk_usage(small_disk).free
        num_bytes = os.path.getsize(source / "model.safetensors") // 2
        (small_disk / "others").write_bytes(bytes(free - num_bytes - 2**15))
    before = everything_below(small_disk)
    assert cli.main(["import", f"source={source}", f"output={small_disk / 'c'}", f"dtype={dtype}"]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert everything_below(small_disk) == before


def test_export_to_a_disk_that_gets_full_leaves_nothing(source, small_disk, tmp_path):
    import_checkpoint(ImportConfig(str(source), str(tmp_path / "c"), DType.BF16))
    num_bytes = os.path.getsize(source / "model.safetensors") // 2
    (small_disk / "others").write_bytes(bytes(shutil.disk_usage(small_disk).free - num_bytes - 2**13))
    with pytest.raises(DiskSpaceError, match=r"the disk of .*/disk/e is full"):
        export(ExportConfig(str(tmp_path / "c"), str(small_disk / "e")))
    assert everything_below(small_disk) == ["others"]


def test_another_failure_is_not_put_down_to_the_disk(tmp_path):
    with pytest.raises(Interrupted), writing(tmp_path / "result", Manifest("run")):
        raise Interrupted
    assert everything_below(tmp_path) == []


def test_the_same_text_at_another_path_is_the_same_input(tmp_path):
    """Whatever it is called; other text, or the same in another order, is not."""
    for name, content in (("a.jsonl", "a"), ("b/c.JSONL", "a"), ("d.jsonl", "d"), ("p.bin", "1"), ("p.idx", "2")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    for suffix in ("bin", "idx"):
        shutil.copy(tmp_path / f"p.{suffix}", tmp_path / f"b/q.{suffix}")

    def of(*names):
        text = [str(tmp_path / name) if name != "builtin" else name for name in names]
        return Manifest("scores", parents=text_parents(text), config={"data": {"text": text}}, verb="score")

    assert not of("a.jsonl", "p").changes(of("b/c.JSONL", "b/q"))
    assert not of("builtin", "a.jsonl").changes(of("builtin", "b/c.JSONL"))
    assert of("a.jsonl").changes(of("d.jsonl")) == ["text 1 is another one"]
    assert of("a.jsonl", "d.jsonl").changes(of("d.jsonl", "a.jsonl"))
    assert of("builtin", "a.jsonl").changes(of("a.jsonl", "builtin"))
    assert of("builtin", "a.jsonl").changes(of("a.jsonl"))
