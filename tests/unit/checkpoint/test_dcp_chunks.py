"""Chunks are read in place, checked once, and left to torch where they are unusual."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from minitron_megatron.checkpoint import dcp_chunks, row_io
from minitron_megatron.checkpoint.dcp_chunks import Chunk
from minitron_megatron.checkpoint.row_io import bits
from minitron_megatron.errors import CheckpointError

SIZE = (1, 40, 30)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
BEFORE = b"another chunk"


def tensor_of(dtype=torch.bfloat16):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).to(dtype)


def chunk_in(folder: Path, stored: torch.Tensor, dtype=torch.bfloat16) -> Chunk:
    """A chunk among others in a file, of which its index says that it is a tensor of `SIZE` and `dtype`."""
    content = io.BytesIO()
    torch.save(stored, content)
    path = folder / "file"
    path.write_bytes(BEFORE + content.getvalue() + b"and one more")
    return Chunk("some.weight", (0, 0, 0), SIZE, dtype, path, len(BEFORE), len(content.getvalue()))


def read(chunk: Chunk, *index) -> torch.Tensor:
    out = torch.empty([len(i) for i in index], dtype=chunk.dtype)
    chunk.read([np.array(i) for i in index], bits(out))
    return out


def change_byte(chunk: Chunk, position: int) -> None:
    content = bytearray(chunk.path.read_bytes())
    content[chunk.position + position] ^= 1
    chunk.path.write_bytes(content)


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(row_io, "BLOCK_BYTES", 200)


@pytest.fixture
def read_by(monkeypatch):
    """Who was asked to read a chunk: bytes read directly, and tensors left to torch."""
    found = {"bytes": 0, "torch": 0}
    fill, load = row_io._fill, torch.load

    def count_bytes(buffer, file):
        found["bytes"] += len(buffer)
        fill(buffer, file)

    def count_loads(*args, **kwargs):
        found["torch"] += 1
        assert kwargs["weights_only"]
        return load(*args, **kwargs)

    monkeypatch.setattr(row_io, "_fill", count_bytes)
    monkeypatch.setattr(torch, "load", count_loads)
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_positions_are_read_in_place(dtype, tmp_path, small_blocks, read_by):
    tensor = tensor_of(dtype)
    chunk, generator = chunk_in(tmp_path, tensor, dtype), np.random.default_rng(0)
    for count in (40, 13, 1):
        index = [np.sort(generator.choice(n, min(n, count), replace=False)) for n in SIZE]
        assert torch.equal(read(chunk, *index), tensor[np.ix_(*index)])
    assert not read_by["torch"]


def test_the_first_reading_is_of_all_and_later_ones_of_the_rows_that_are_wanted(tmp_path, small_blocks, read_by):
    chunk = chunk_in(tmp_path, tensor_of())
    for rows_wanted, rows_read in (([3], 40), ([3], 1), ([0, 2], 3), ([0, 39], 2), (range(10, 20), 10)):
        read_by["bytes"] = 0
        read(chunk, [0], rows_wanted, range(30))
        assert read_by["bytes"] == rows_read * 30 * 2, rows_wanted


@pytest.mark.parametrize(
    "stored",
    [
        tensor_of().transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([tensor_of(), tensor_of()])[1:],
        torch.cat([tensor_of(), tensor_of()])[:1],
        torch.nn.Parameter(tensor_of()),
    ],
    ids=["transposed", "the end of a larger one", "the beginning of a larger one", "a parameter"],
)
def test_an_unusual_tensor_is_left_to_torch(stored, tmp_path, read_by):
    chunk = chunk_in(tmp_path, stored)
    for _ in range(2):
        assert torch.equal(read(chunk, [0], [1, 5], [2, 3, 9]), tensor_of()[:, [1, 5]][..., [2, 3, 9]])
    assert read_by == {"bytes": 0, "torch": 2}
    change_byte(chunk, chunk.length // 2)
    with pytest.raises(CheckpointError, match="file is damaged at byte 13, where some.weight .*: Bad CRC-32"):
        read(chunk, [0], [1], [2])


@pytest.mark.parametrize("part", [0.2, 0.5, 0.75])
def test_a_changed_byte_is_found_and_names_file_and_tensor(part, tmp_path, small_blocks):
    chunk = chunk_in(tmp_path, tensor_of())
    change_byte(chunk, int(part * chunk.length))
    with pytest.raises(CheckpointError) as raised:
        read(chunk, [0], [1], [2])  # whatever is asked for
    message = f"{chunk.path} is damaged at byte 13, where some.weight [1, 40, 30] is kept: its checksum is "
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("kind", [torch.Tensor.contiguous, torch.nn.Parameter], ids=["plain", "left to torch"])
def test_chunks_without_checksums_are_read(kind, tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        chunk = chunk_in(tmp_path, kind(tensor_of()))
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(read(chunk, *map(range, SIZE)), tensor_of())


@pytest.mark.parametrize(
    "stored, named",
    [
        (tensor_of(torch.float32), "it holds torch.float32 [1, 40, 30], and the index says torch.bfloat16"),
        (tensor_of()[0], "it holds torch.bfloat16 [40, 30]"),
        (tensor_of()[:, :-1], "it holds torch.bfloat16 [1, 39, 30]"),
    ],
    ids=["dtype", "dimensions", "rows"],
)
def test_another_tensor_than_the_index_says_is_refused(stored, named, tmp_path):
    chunk = chunk_in(tmp_path, stored)
    with pytest.raises(CheckpointError) as raised:
        read(chunk, [0], [1], [2])
    assert named in str(raised.value)


def test_a_chunk_of_another_byte_order_is_left_to_torch(tmp_path, read_by, monkeypatch):
    monkeypatch.setattr(dcp_chunks.sys, "byteorder", "big")
    with monkeypatch.context() as patch:
        patch.setattr(dcp_chunks.sys, "byteorder", "little")
        chunk = chunk_in(tmp_path, tensor_of())
    with zipfile.ZipFile(io.BytesIO(chunk.path.read_bytes()[13:-12])) as archive:
        assert archive.read("archive/byteorder") == b"little"
    read(chunk, [0], [1], [2])
    assert read_by["torch"] == 1
