"""Reading and writing Megatron's sharded checkpoints without a model."""

import copy
import io
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint import dist_reader, dist_writer
from minitron_megatron.checkpoint.dcp_chunks import Chunk
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.errors import CheckpointError
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.parameters import parameters
from tests.in_memory import StateDict
from tests.tiny import LLAMA, hf_model


@pytest.fixture(scope="module")
def source():
    model = hf_model(**{**LLAMA, "num_hidden_layers": 3})
    return StateDict(network_from_config(model.config.to_dict()), model.state_dict())


@pytest.fixture(scope="module")
def original(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "c"
    write_checkpoint(folder, source, torch.float32, Manifest("checkpoint"), None)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    """A checkpoint to damage."""
    return shutil.copytree(original, tmp_path / "c")


def some(generator, size):
    """Positions as readers ask for them: ascending, none or all or any of them."""
    count = random.Random(int(generator.integers(1000))).choice([0, 1, size // 2, size])
    return np.sort(generator.choice(size, count, replace=False))


@pytest.mark.parametrize("chunk_bytes", [400, 1000, 2**28], ids=["two rows", "five rows", "all rows"])
def test_any_positions_are_read_from_any_chunks(chunk_bytes, source, tmp_path, monkeypatch):
    monkeypatch.setattr(dist_writer, "CHUNK_BYTES", chunk_bytes)
    write_checkpoint(tmp_path / "c", source, torch.float32, Manifest("checkpoint"), None)
    checkpoint, generator = Checkpoint(tmp_path / "c"), np.random.default_rng(0)
    embedding = checkpoint.tensors["embedding.word_embeddings.weight"]
    assert len(embedding.chunks) == {400: 64, 1000: 26, 2**28: 1}[chunk_bytes]
    for param in parameters(source.network):
        whole = source.read(param, [np.arange(n) for n in param.shape])
        index = [some(generator, n) for n in param.shape]
        expected = whole[tuple(torch.from_numpy(i) for i in np.ix_(*index))]
        assert torch.equal(checkpoint.read(param, index), expected), (param.name, param.layer)


def test_memory_and_disk_traffic_are_bounded_by_the_chunks_that_are_asked_for(original, monkeypatch):
    checkpoint, loaded = Checkpoint(original), []
    read = Chunk.read
    monkeypatch.setattr(Chunk, "read", lambda chunk, *args: loaded.append(chunk.offsets[0]) or read(chunk, *args))
    [param] = [p for p in parameters(checkpoint.network) if (p.layer, p.name) == (2, "mlp.linear_fc2.weight")]
    checkpoint.read(param, [np.arange(3), np.arange(3)])
    assert loaded == [2]  # of one layer, the third


class Evil:
    """Unpickling it runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_nothing_in_an_index_is_run(protocol, folder, tmp_path):
    marker = tmp_path / "was-run"
    evil = Evil(f"touch {marker}")
    pickle.loads(pickle.dumps(evil))  # it does bite
    assert marker.exists()
    marker.unlink()
    (folder / "release/.metadata").write_bytes(pickle.dumps(evil, protocol=protocol))
    with pytest.raises(CheckpointError, match=r"\.metadata cannot be read as a checkpoint's index: .*system"):
        Checkpoint(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"\x80\x04\x8c\x27torch.distributed.checkpoint.filesystem\x8c\x09os.system\x93.",  # a dotted name
        b"ctorch.distributed.checkpoint.filesystem\nFileSystemWriter\n.",  # a class, but no record
        b"ctorch.serialization\nload\n.",
        b"ctorch\nload\n.",
    ],
)
def test_an_index_is_made_of_plain_records(text, folder):
    (folder / "release/.metadata").write_bytes(text)
    with pytest.raises(CheckpointError, match="does not belong into a checkpoint's index"):
        Checkpoint(folder)


def test_nothing_in_a_chunk_is_run(folder, tmp_path):
    """An index may name any bytes as a tensor's, so that a chunk can be a pickle of somebody's own."""
    marker, path = tmp_path / "was-run", folder / "release/.metadata"
    evil = io.BytesIO()
    torch.save([Evil(f"touch {marker}"), bytes(100_000)], evil)  # as long as any chunk
    (folder / "release/evil").write_bytes(evil.getvalue())
    metadata = pickle.loads(path.read_bytes())
    for place in metadata.storage_data.values():
        place.relative_path, place.offset, place.length = "evil", 0, len(evil.getvalue())
    path.write_bytes(pickle.dumps(metadata))
    checkpoint = Checkpoint(folder)
    with pytest.raises(CheckpointError, match="evil is damaged at byte 0"):
        checkpoint.read(parameters(checkpoint.network)[0], [np.arange(2), np.arange(2)])
    assert not marker.exists()


def test_a_damaged_index_is_named_whatever_the_damage(folder):
    path = folder / "release/.metadata"
    whole, generator, refused = path.read_bytes(), random.Random(0), 0
    for attempt in range(100):
        damaged = bytearray(whole[: generator.randrange(len(whole))] if attempt % 2 else whole)
        for _ in range(3):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        try:
            Checkpoint(folder)
        except CheckpointError:
            refused += 1
    assert refused > 80  # in the rest the damage hit what does not matter


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1])


def change_network(folder, **changes):
    """Other fields in the manifest, of the network or, as a dict, of a kind of layers."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for name, value in changes.items():
        before = manifest["network"][name]
        manifest["network"][name] = before | value if isinstance(value, dict) else value
    (folder / "manifest.json").write_text(json.dumps(manifest))


def change_index(folder, change):
    path = folder / "release/.metadata"
    metadata = pickle.loads(path.read_bytes())
    change(metadata.state_dict_metadata)
    path.write_bytes(pickle.dumps(metadata))


def twice(chunks):
    """The first chunk in place of the last one, which is as large."""
    assert chunks[0].sizes == chunks[-1].sizes
    chunks[-1] = chunks[0]


def another(tensors, key):
    """A tensor more, which lies nowhere: of a kind of layer that is not in the axis table."""
    tensors[key] = copy.deepcopy(tensors[FC2])
    tensors[key].chunks.clear()


FC1, FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
ROUTER = "decoder.layers.mlp.router.weight"


@pytest.mark.parametrize(
    "damage, named",
    [
        (lambda f: (f / "release/__0_0.distcp").unlink(), "__0_0.distcp is missing"),
        (lambda f: cut_short(f / "release/__0_0.distcp"), "it was cut short"),
        (lambda f: (f / "release/metadata.json").unlink(), "release is not whole: it has no metadata.json"),
        (lambda f: (f / "release/.metadata").unlink(), ".metadata cannot be read"),
        (lambda f: shutil.rmtree(f / "release"), "release is not whole"),
        (
            lambda f: [(f / name).unlink() for name in (dist_reader.TRACKER, "release/.metadata")],
            f"is not a checkpoint: it has no {dist_reader.TRACKER}",
        ),
        (
            lambda f: (f / dist_reader.TRACKER).write_text("newest"),
            "says 'newest': expected the number",
        ),
        (lambda f: (f / dist_reader.TRACKER).write_text("0"), "iter_0000000 is not whole"),
        (lambda f: (f / "release/mp_rank_00").mkdir(), "release is in Megatron-LM's old format"),
        (lambda f: (f / dist_reader.TRACKER).write_text("3"), "iter_0000003 is not whole"),
        (lambda f: shutil.rmtree(f), "does not exist: name the folder of a checkpoint"),
        (
            lambda f: [(f / name).unlink() for name in ("manifest.json", "release/common.pt")],
            "neither manifest.json",
        ),
        (lambda f: (f / "manifest.json").write_text('{"kind"'), "manifest.json is not the description of a network"),
        (lambda f: (f / "manifest.json").write_text('{"kind": "scores"}'), "manifest.json does not describe a network"),
        (lambda f: change_network(f, hidden_size=None), "manifest.json does not describe a network"),
        (lambda f: change_network(f, norm="batchnorm"), "does not describe a network: network.norm = 'batchnorm'"),
        (
            lambda f: change_network(f, mlp={"ffn_hidden_size": 45}),
            f"wrong size: {FC1} is [3, 88, 48], the network has [3, 90, 48]",
        ),
        (lambda f: change_network(f, pattern="*-" * 2), f"{FC2} is [3, 48, 44], the network has [2, 48, 44]"),
        (lambda f: change_network(f, tie_embeddings=True), "unknown: output_layer.weight [128, 48]"),
        (lambda f: change_network(f, mlp={"bias": True}), "missing: decoder.layers.mlp.linear_fc1.bias [3, 88]"),
        (lambda f: change_index(f, lambda tensors: tensors.pop(FC2)), f"missing: {FC2} [3, 48, 44]"),
        (lambda f: change_index(f, lambda tensors: tensors[FC2].chunks.pop()), f"not whole: {FC2} [3, 48, 44]"),
        (lambda f: change_index(f, lambda tensors: twice(tensors[FC2].chunks)), f"not whole: {FC2} [3, 48, 44]"),
        (lambda f: change_index(f, lambda tensors: another(tensors, ROUTER)), f"unknown: {ROUTER} [3, 48, 44]"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_not_a_whole_checkpoint_is_named(damage, named, folder):
    damage(folder)
    with pytest.raises(CheckpointError) as raised:
        Checkpoint(folder)
    assert named in str(raised.value) and str(folder) in str(raised.value)


@pytest.mark.parametrize("text", [None, "", "\0\0"])
def test_weights_that_no_run_has_trained_are_found_without_their_tracker(text, folder, caplog):
    expected = Checkpoint(folder).read(parameters(Checkpoint(folder).network)[0], [np.arange(2)] * 2)
    (folder / dist_reader.TRACKER).unlink()
    if text is not None:
        (folder / dist_reader.TRACKER).write_text(text)
    found = Checkpoint(folder)
    assert torch.equal(found.read(parameters(found.network)[0], [np.arange(2)] * 2), expected)
    assert "is missing or empty: reading release" in caplog.text


def test_all_wrong_tensors_are_listed(folder):
    change_network(folder, mlp={"ffn_hidden_size": 45}, tie_embeddings=True)
    with pytest.raises(CheckpointError) as raised:
        Checkpoint(folder)
    assert [line.split()[0] for line in str(raised.value).splitlines()[1:]] == ["wrong", "wrong", "unknown:"]


def test_a_damaged_chunk_is_named_when_it_is_read(folder, tmp_path):
    path = folder / "release/__0_0.distcp"
    path.write_bytes(bytes(path.stat().st_size))
    # Also by way of torch, which wraps what fails while it writes.
    with pytest.raises(CheckpointError, match=r"__0_0.distcp is damaged at byte \d+"):
        write_checkpoint(tmp_path / "copy", Checkpoint(folder), torch.float32, Manifest("checkpoint"), None)
    assert not (tmp_path / "copy").exists()
