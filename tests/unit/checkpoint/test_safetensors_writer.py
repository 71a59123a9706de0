"""Safetensors files that are written in blocks: the bytes that safetensors itself would write."""

import pytest
import torch
from safetensors.torch import save_file

from minitron_megatron.checkpoint import safetensors_writer
from minitron_megatron.checkpoint.safetensors_writer import Tensor, cut_into_shards, write_shards

SIZES = {"b": (30, 7), "a.weight": (5,), "layers.10.a": (1, 3), "layers.9.a": (11, 2), "B": (4, 3, 2)}


def tensor_of(values, name, blocks):
    def read(low, high):
        blocks.append((name, low, high))
        return values[low:high]

    return Tensor(name, tuple(values.shape), values.dtype, read)


DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
MIXED = [torch.int8, torch.bfloat16, torch.int64, torch.float8_e4m3fn, torch.int32]


@pytest.mark.parametrize("dtypes", [*([dtype] * len(SIZES) for dtype in DTYPES), MIXED])
@pytest.mark.parametrize("block_bytes", [1, 70, 2**26])
def test_files_are_those_of_safetensors(block_bytes, dtypes, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "BLOCK_BYTES", block_bytes)
    generator, blocks = torch.Generator().manual_seed(0), []
    values = {
        name: torch.randn(size, generator=generator).to(dtype)
        for (name, size), dtype in zip(SIZES.items(), dtypes, strict=True)
    }
    split = {"one": ["b", "layers.10.a"], "two": ["layers.9.a", "a.weight", "B"]}
    files = {tmp_path / file: [tensor_of(values[name], name, blocks) for name in own] for file, own in split.items()}
    write_shards(files)
    for file, own in split.items():
        save_file({name: values[name] for name in own}, tmp_path / "theirs", metadata={"format": "pt"})
        assert (tmp_path / file).read_bytes() == (tmp_path / "theirs").read_bytes(), file
    assert sorted(name for name, low, _ in blocks if low == 0) == sorted(SIZES)  # each block is read once
    assert sum(high - low for _, low, high in blocks) == sum(size[0] for size in SIZES.values())
    if block_bytes == 1:
        assert all(high == low + 1 for _, low, high in blocks)


def test_shards_are_filled_up_to_their_size():
    tensors = [Tensor(str(number), (rows, 10), torch.bfloat16, None) for number, rows in enumerate([3, 3, 4, 20, 1, 1])]
    found = cut_into_shards(tensors, 120)
    assert [[tensor.name for tensor in shard] for shard in found] == [["0", "1"], ["2"], ["3"], ["4", "5"]]


def test_what_fails_in_one_thread_is_raised_and_stops_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_writer, "BLOCK_BYTES", 1)
    monkeypatch.setattr(safetensors_writer, "num_threads", lambda: 2)
    blocks = []

    def fail(low, high):
        raise ZeroDivisionError("defect")

    slow = tensor_of(torch.zeros(100_000, 1), "b", blocks)
    with pytest.raises(ZeroDivisionError, match="defect"):
        write_shards({tmp_path / "file": [Tensor("a", (1, 1), torch.float32, fail), slow]})
    assert len(blocks) < 100_000
