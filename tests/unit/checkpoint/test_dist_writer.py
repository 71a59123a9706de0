"""What is written: where its chunks end, who writes what, and what stands beside the weights."""

import io
import math
import threading
import time
import zipfile

import numpy as np
import pytest
import torch

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint import dist_writer
from minitron_megatron.checkpoint.dist_reader import Checkpoint
from minitron_megatron.checkpoint.dist_writer import write_checkpoint
from minitron_megatron.model.families import network_from_config
from minitron_megatron.model.parameters import parameters, stacked_key
from tests.in_memory import StateDict
from tests.tiny import LLAMA, hf_model

FC1, FC2 = "decoder.layers.mlp.linear_fc1.weight", "decoder.layers.mlp.linear_fc2.weight"
QKV, PROJ = "decoder.layers.self_attention.linear_qkv.weight", "decoder.layers.self_attention.linear_proj.weight"
NORM, EMBEDDING = "decoder.layers.mlp.linear_fc1.layer_norm_weight", "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def source():
    model = hf_model(**LLAMA)
    return StateDict(network_from_config(model.config.to_dict()), model.state_dict())


def write(folder, source, **options):
    write_checkpoint(folder, source, torch.float32, Manifest("checkpoint"), None, **options)
    return Checkpoint(folder)


def assert_equal(found, expected):
    assert found.network == expected.network
    for param in parameters(found.network):
        index = [np.arange(n) for n in param.shape]
        assert torch.equal(found.read(param, index), expected.read(param, index)), (param.name, param.layer)


def chunks_of(checkpoint, key):
    """Offset and size, without the layer, of the chunks of layer 1 or of what has no layers, in order."""
    chunks = [chunk for chunk in checkpoint.tensors[key].chunks if len(chunk.sizes) < 3 or chunk.offsets[0] == 1]
    return sorted((c.offsets[-2:], c.sizes[-2:]) for c in chunks)


def test_chunks_end_where_the_shares_of_tensor_parallel_ranks_do(source, tmp_path):
    checkpoint = write(tmp_path / "c", source, tensor_ranks=2)
    gate_and_up = [((rows, 0), (22, 48)) for rows in (0, 22, 44, 66)]
    assert chunks_of(checkpoint, FC1) == gate_and_up
    assert chunks_of(checkpoint, FC2) == [((0, 0), (48, 22)), ((0, 22), (48, 22))]
    assert chunks_of(checkpoint, QKV) == [((0, 0), (60, 48)), ((60, 0), (60, 48))]
    assert chunks_of(checkpoint, PROJ) == [((0, 0), (48, 36)), ((0, 36), (48, 36))]
    assert chunks_of(checkpoint, EMBEDDING) == [((0, 0), (64, 48)), ((64, 0), (64, 48))]
    assert [c.sizes for c in checkpoint.tensors[NORM].chunks] == [(1, 48)] * 4
    assert_equal(checkpoint, source)


@pytest.mark.parametrize("tensor_ranks", [1, 2])
def test_no_chunk_is_larger_than_the_maximum(tensor_ranks, source, tmp_path, monkeypatch):
    monkeypatch.setattr(dist_writer, "CHUNK_BYTES", 2000)
    checkpoint = write(tmp_path / "c", source, tensor_ranks=tensor_ranks)
    for chunk in (chunk for tensor in checkpoint.tensors.values() for chunk in tensor.chunks):
        num_bytes = 4 * math.prod(chunk.sizes)
        assert num_bytes <= 2000 and num_bytes < chunk.length < num_bytes + 2000  # what torch puts around it
    if tensor_ranks == 2:  # 22 rows of 192 bytes in three chunks, as even as can be
        assert [size for _, size in chunks_of(checkpoint, FC1)] == [(7, 48), (7, 48), (8, 48)] * 4
    assert_equal(checkpoint, source)


def test_a_rank_reads_only_the_chunks_written_for_it(source, tmp_path):
    checkpoint = write(tmp_path / "c", source, tensor_ranks=2)
    for param in parameters(source.network):
        for rank in range(2):
            index = param.shard(rank, 2)
            for chunk in checkpoint.tensors[stacked_key(param)].chunks:
                own = zip(chunk.offsets[-len(index) :], chunk.sizes[-len(index) :], index, strict=True)
                parts = [np.isin(np.arange(start, start + size), i) for start, size, i in own]
                assert all(part.all() for part in parts) or any(not part.any() for part in parts), param.name


class Failing:
    """A source in which a layer cannot be read."""

    def __init__(self, source, error):
        self.source, self.error, self.network, self.dtype = source, error, source.network, source.dtype
        self.reads = 0

    def read(self, param, index):
        self.reads += 1
        if param.layer == 0 and stacked_key(param) == QKV:
            raise self.error
        time.sleep(0.01)
        return self.source.read(param, index)


@pytest.mark.parametrize("error", [ZeroDivisionError("defect"), KeyboardInterrupt()], ids=repr)
def test_what_fails_in_one_thread_stops_all_and_is_raised_as_it_is(error, source, tmp_path, monkeypatch):
    monkeypatch.setattr(dist_writer, "num_threads", lambda: 3)
    before, failing = threading.active_count(), Failing(source, error)
    with pytest.raises(type(error)):
        write(tmp_path / "c", failing)
    assert list(tmp_path.iterdir()) == [] and threading.active_count() == before
    assert failing.reads < 20  # of 27 parameters


def test_one_chunk_is_read_while_another_is_written(source, tmp_path, monkeypatch):
    """The first write ends when something has been read behind its back."""
    monkeypatch.setattr(dist_writer, "num_threads", lambda: 2)
    writing, read_meanwhile, save = threading.Event(), threading.Event(), torch.save

    class Watched(Failing):
        def read(self, param, index):
            if writing.is_set():
                read_meanwhile.set()
            return self.source.read(param, index)

    def wait_and_save(tensor, file):
        if isinstance(tensor, torch.Tensor) and not writing.is_set():
            writing.set()
            assert read_meanwhile.wait(timeout=60)
        save(tensor, file)

    monkeypatch.setattr(torch, "save", wait_and_save)
    assert_equal(write(tmp_path / "c", Watched(source, None)), source)


def test_progress_is_shown(source, tmp_path, caplog):
    caplog.set_level("INFO")
    checkpoint = write(tmp_path / "c", source)
    count = sum(len(tensor.chunks) for tensor in checkpoint.tensors.values())
    shown = [record.getMessage().split() for record in caplog.records if record.name == "minitron_megatron.progress"]
    assert len(shown) == 10 and shown[-1] == ["write", "chunks", str(count), "of", str(count)]


def test_written_checksums_are_right(source, tmp_path):
    checkpoint = write(tmp_path / "c", source)
    for tensor in checkpoint.tensors.values():
        for chunk in tensor.chunks:
            with open(chunk.path, "rb") as file:
                file.seek(chunk.position)
                content = file.read(chunk.length)
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                assert archive.testzip() is None and all(info.CRC for info in archive.infolist())
