"""Reads thousands of damaged and hostile files in one process, and says how each reading ends: a line each.

    python -m tests.damaged FOLDER KIND...

A line is the kind, the name of the case, written before it is read so that a crash can be told, and its outcome:
`refused` by one of our errors, `read`, or what went wrong.
"""

import argparse
import io
import json
import logging
import os
import pickle
import re
import resource
import signal
import struct
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.checkpoint.convert import import_checkpoint
from minitron_megatron.checkpoint.huggingface import HuggingFaceFolder
from minitron_megatron.checkpoint.manifest import Manifest
from minitron_megatron.checkpoint.saved_args import read_args
from minitron_megatron.checkpoint.sharded import Checkpoint, require_plain
from minitron_megatron.checkpoint.source import TensorSource, instances
from minitron_megatron.config.schema import ImportConfig, TargetConfig
from minitron_megatron.errors import UserError
from minitron_megatron.model.axes import axis_sizes, parameters
from minitron_megatron.pruning.plan import Plan, make_plan
from minitron_megatron.pruning.scores import Scores
from tests.tiny import LLAMA, hf_model, import_hf, save_hf

SECONDS, MEMORY, ADDRESSES = 5, 200 * 2**20, 2**30
MARKER = "was-run"
SMALL = {**LLAMA, "num_hidden_layers": 2, "hidden_size": 12, "intermediate_size": 10, "vocab_size": 30, "head_dim": 4}
EXTREMES = [2**60, 2**63 - 1, -1, 2**32 + 1, 0]
Damage = Iterator[tuple[str, bytes]]


@dataclass
class Target:
    """A file, the ways to damage it, and how it is read.

    Attributes:
        path: of the file.
        cases: their names, and the bytes to put in its place.
        read: reads it as the product does, and everything that it leads to. What it returns must not be changed by any
            damage that is not refused; None where nothing tells.
    """

    path: Path
    cases: Damage
    read: Callable[[], object]


class TooSlow(BaseException):
    """What a reader that catches every `Exception` lets through."""


class Evil:
    """A pickle of it makes the folder `MARKER` when it is loaded."""

    def __reduce__(self):
        return os.mkdir, (os.environ["MARKER"],)


def truncated(whole: bytes, count: int) -> Damage:
    for number in range(count):
        length = len(whole) * number // count
        yield f"{length} of {len(whole)} bytes", whole[:length]
    yield "a byte less", whole[:-1]
    yield "more bytes", whole + b"\0" * 100


def flipped(whole: bytes, count: int, until: int | None = None) -> Damage:
    """One bit each, at places evenly spread over the first `until` bytes."""
    places = np.linspace(0, 8 * (until or len(whole)) - 1, count).astype(int)
    for place in (places // 8 * 8 + np.arange(count) * 5 % 8).tolist():
        data = bytearray(whole)
        data[place // 8] ^= 1 << place % 8
        yield f"bit {place % 8} of byte {place // 8}", bytes(data)


def overwritten(whole: bytes, count: int, until: int | None = None) -> Damage:
    """Eight bytes each, by a number that is too large, negative or zero."""
    for number, place in enumerate(np.linspace(0, (until or len(whole)) - 8, count).astype(int).tolist()):
        value = EXTREMES[number % len(EXTREMES)]
        yield f"{value} at byte {place}", whole[:place] + struct.pack("<q", value) + whole[place + 8 :]


def rewritten(text: str, count: int) -> Iterator[tuple[str, str]]:
    """JSON, one value of which is another one each: too large, of another type, nested too deeply."""
    others = [
        str(2**60),
        "-1",
        "0",
        "1e400",
        "1.5",
        "NaN",
        "true",
        "null",
        '"x"',
        "[]",
        "{}",
        "9" * 5000,
        "[" * 100_000,
    ]
    places = list(re.finditer(r'(?<=[:\[, ])("[^"]*"|-?[0-9.e-]+|true|false|null)(?=\s*[,\]}\n])', text))
    count = min(count, len(places) * len(others))
    for number in np.linspace(0, len(places) * len(others) - 1, count).astype(int).tolist():
        place, other = places[number // len(others)], others[number % len(others)]
        yield f"{other[:30]} for {place[0]} at {place.start()}", text[: place.start()] + other + text[place.end() :]
    for other in ("", "[]", "null", "1", '"x"', "{}", "[" * 100_000, '{"a":' * 100_000, "\ufeff" + text, "\0" * 100):
        yield f"nothing but {other[:30]!r}", other


def damaged_json(path: Path, count: int) -> Damage:
    whole = path.read_bytes()
    yield from truncated(whole, count // 8)
    yield from flipped(whole, count // 2)
    yield from ((name, text.encode()) for name, text in rewritten(whole.decode(), count // 2))
    yield "not UTF-8", b"\xff\xfe" + whole


def damaged_safetensors(path: Path, count: int) -> Damage:
    whole = path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, content = whole[8 : 8 + length], whole[8 + length :]
    yield from truncated(whole, count // 8)
    yield from flipped(whole, count // 4)
    yield from flipped(whole, count // 4, until=8 + length)
    yield from overwritten(whole, count // 8, until=8 + length)
    for claimed in (2**63, 2**60, 100_000_001, 99_000_000, len(whole), length - 1, length + 1, 0):
        yield f"a header of {claimed} bytes", struct.pack("<Q", claimed) + whole[8:]
    texts = list(rewritten(header.decode(), count // 2))
    for kind in ("F64", "F16", "F8_E4M3", "I64", "I32", "U8", "BOOL", "C64", "F4"):
        texts.append((f"all tensors are {kind}", re.sub(r'"dtype":"\w+"', f'"dtype":"{kind}"', header.decode())))
        texts.append((f"one tensor is {kind}", re.sub(r'"dtype":"\w+"', f'"dtype":"{kind}"', header.decode(), count=1)))
    for shape in ("[1152921504606846976]", "[4294967296,4294967296]", "[-1]", "[0]", "[]", "[1.5]", "[" * 1000):
        texts.append(
            (f"a tensor of {shape[:20]}", re.sub(r'"shape":\[[^]]*\]', f'"shape":{shape}', header.decode(), count=1))
        )
    for place in ("[0,4]", f"[{2**60},{2**60 + 4}]", "[8,4]", "[0]", "[0,0]", f"[0,{2**64}]"):
        texts.append(
            (
                f"a tensor at {place}",
                re.sub(r'"data_offsets":\[[^]]*\]', f'"data_offsets":{place}', header.decode(), count=1),
            )
        )
        texts.append(
            (f"all at {place}", re.sub(r'"data_offsets":\[[^]]*\]', f'"data_offsets":{place}', header.decode()))
        )
    for name, text in texts:
        yield name, struct.pack("<Q", len(text.encode())) + text.encode() + content


def evil_pickles() -> Damage:
    for protocol in range(6):
        yield f"code by protocol {protocol}", pickle.dumps(Evil(), protocol=protocol)
    marker = os.environ["MARKER"].encode()
    argument = b"\x8c" + bytes([len(marker)]) + marker + b"\x85R."
    for module in (
        "torch.distributed.checkpoint.filesystem",
        "torch.distributed.checkpoint.planner",
        "torch.serialization",
    ):
        name = b"\x8c" + bytes([len(module)]) + module.encode() + b"\x8c\x08os.mkdir\x93"
        yield f"code by a dotted name in {module}", b"\x80\x04" + name + argument
    yield "an unknown extension", b"\x82\x01."
    yield "a table of 64 GB", b"\x80\x02Nr\xff\xff\xff\xff."
    yield "an array of 64 GB", b"\x80\x05\x96" + struct.pack("<Q", 2**36) + b"x."
    yield "text of 2^60 bytes", b"\x80\x04\x8d" + struct.pack("<Q", 2**60) + b"x."
    yield "bytes of 8 GB", b"\x80\x04\x8e" + struct.pack("<Q", 2**33) + b"x."
    yield "a frame of 8 GB", b"\x80\x04\x95" + struct.pack("<Q", 2**33) + b"N."
    yield "a number of 2^31 bytes", b"\x80\x02\x8b\xff\xff\xff\x7fx."
    yield "tuples in tuples", b"\x80\x02" + b"N" + b"\x85" * 200_000 + b"."
    yield "lists in lists", b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."


def archive_of(records: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
    return out.getvalue()


def records_of(whole: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {name.split("/", 1)[1]: archive.read(name) for name in archive.namelist()}


def damaged_archive(whole: bytes, count: int) -> Damage:
    """What `torch.save` wrote."""
    yield from truncated(whole, count // 8)
    yield from flipped(whole, count // 2)
    yield from overwritten(whole, count // 4)


def forged_archive(whole: bytes, count: int) -> Damage:
    """What somebody made who can count checksums. Nobody can tell what it should have been."""
    records = records_of(whole)
    for name, content in evil_pickles():
        yield name, archive_of({**records, "data.pkl": content})
    pickled = records["data.pkl"]
    for name, content in [*flipped(pickled, count), *overwritten(pickled, count // 2)]:
        yield f"{name} of its pickle", archive_of({**records, "data.pkl": content})
    yield "compressed", archive_of(records, zipfile.ZIP_DEFLATED)
    yield "compressed 2 GB", _bomb(records)
    for name in records:
        yield f"no {name}", archive_of({other: content for other, content in records.items() if other != name})
    yield "another byte order", archive_of({**records, "byteorder": b"big"})


def _bomb(records: dict[str, bytes]) -> bytes:
    """Two gigabytes of zeros, as two megabytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
        with archive.open("archive/data/1", "w", force_zip64=True) as record:
            for _ in range(64):
                record.write(bytes(2**25))
    return out.getvalue()


def everything(source: TensorSource) -> list[torch.Tensor]:
    """All weights, as they are read to be written elsewhere."""
    sizes = axis_sizes(source.shape)
    return [
        source.read(param, layer, [np.arange(n) for n in param.size(sizes)])
        for param in parameters(source.shape)
        for layer in instances(param, source.shape)
    ]


def targets(kind: str, folder: Path) -> Iterator[Target]:
    """What is damaged of each kind of result."""
    if kind == "huggingface":
        single = save_hf(folder / "single", hf_model(**SMALL))
        sharded = save_hf(folder / "sharded", hf_model(**SMALL))
        shard(sharded)

        def read_single():
            everything(HuggingFaceFolder(single))

        def read_sharded():
            everything(HuggingFaceFolder(sharded))

        file = single / "model.safetensors"
        yield Target(file, damaged_safetensors(file, 300), read_single)
        yield Target(single / "config.json", damaged_json(single / "config.json", 200), read_single)
        file = sharded / "part-1.safetensors"
        yield Target(file, damaged_safetensors(file, 100), read_sharded)
        file = sharded / "model.safetensors.index.json"
        yield Target(file, damaged_json(file, 120), read_sharded)
        yield Target(file, foreign_files(file), read_sharded)
    elif kind == "checkpoint":
        root = import_hf(folder, hf_model(**SMALL))
        iteration = root / "release"

        def read():
            return everything(Checkpoint(root))

        def read_more():
            checkpoint = Checkpoint(root)
            return checkpoint.manifest, checkpoint.megatron_args(), everything(checkpoint)

        def resume():
            require_plain(iteration)

        index = iteration / ".metadata"
        yield Target(index, damaged_index(index.read_bytes(), 120), read)
        chunks = iteration / "__0_0.distcp"
        whole = chunks.read_bytes()
        yield Target(chunks, truncated(whole, 20), read)
        yield Target(chunks, flipped(whole, 80), read)
        yield Target(chunks, overwritten(whole, 30), read)
        yield from damaged_chunk(iteration, read)
        args = iteration / "common.pt"
        torch.save({"iteration": 0, "args": argparse.Namespace(num_layers=2, seq_length=5)}, args)
        yield Target(args, damaged_archive(args.read_bytes(), 60), lambda: read_args(iteration, {}))
        yield Target(args, forged_archive(args.read_bytes(), 40), lambda: read_args(iteration, {}) and None)
        yield Target(args, forged_archive(args.read_bytes(), 20), resume)
        extra = iteration / "__extra_state.distcp"
        yield Target(extra, damaged_archive(extra.read_bytes(), 40), resume)
        yield Target(extra, forged_archive(extra.read_bytes(), 20), resume)
        yield Target(index, damaged_index(index.read_bytes(), 40), resume)
        file = root / "manifest.json"
        yield Target(file, damaged_json(file, 120), lambda: read_more() and None)
        file = root / "latest_checkpointed_iteration.txt"
        yield Target(file, ((text[:20], text.encode()) for text in ("", "-1", "x", "²", "9" * 5000, "1", "\0")), read)
    elif kind == "scores":
        root = import_hf(folder, hf_model(**SMALL))
        shape = Checkpoint(root).shape
        sizes = [(12,), (2, 10), (2, 2, 3), (2,)]
        *width, depth = (torch.rand(size, dtype=torch.float64) for size in sizes)
        scores = Scores(shape, *width, {"loss": depth}, rounds={"ffn": torch.ones(2, 10, dtype=torch.int64)})
        made = folder / "scores"
        made.mkdir()
        scores.write(made)
        Manifest("scores").write(made)

        def plan():
            make_plan(Scores.read(made), TargetConfig(layers=1, hidden=8, ffn=6, heads=4)).target  # noqa: B018

        yield Target(made / "scores.safetensors", damaged_safetensors(made / "scores.safetensors", 200), plan)
        yield Target(made / "scores.safetensors", other_sizes(made / "scores.safetensors"), plan)
        yield Target(
            made / "manifest.json", damaged_json(made / "manifest.json", 60), lambda: Manifest.read(made) and None
        )
        make_plan(scores, TargetConfig(hidden=8, ffn=6, heads=4), merge_heads=True).write(made)
        file = made / "plan.json"
        yield Target(file, damaged_json(file, 250), lambda: Plan.read(file).target and None)
        ranges = [f"0-{2**60}", f"{2**60}", "0-4194303" * 2, "0-7," * 1000, "-1", "7-0", "\u0661"]
        texts = ((text[:20], file.read_text().replace('"0', f'"{text}').encode()) for text in ranges)
        yield Target(file, texts, lambda: Plan.read(file).target and None)
    elif kind == "tokens":
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        from minitron_megatron.data.indexed import read_index

        builder = IndexedDatasetBuilder(str(folder / "tokens.bin"), np.uint16)
        for length in (3, 5, 0, 7, 20):
            builder.add_document(torch.arange(length), [length])
        builder.finalize(str(folder / "tokens.idx"))
        file = folder / "tokens.idx"
        whole = file.read_bytes()

        def read_tokens():
            index = read_index(folder / "tokens")
            starts = (index.pointers // index.dtype.itemsize).tolist()
            return [index.tokens()[start : start + n].copy() for start, n in zip(starts, index.lengths.tolist())]

        def read_loosely():
            index = read_index(folder / "tokens", contiguous=False)
            starts = (index.pointers // index.dtype.itemsize).tolist()
            for start, length in zip(starts, index.lengths.tolist()):
                assert len(index.tokens()[start : start + length]) == length

        for read in (lambda: read_tokens() and None, read_loosely):
            yield Target(file, truncated(whole, 40), read)
            yield Target(file, flipped(whole, 8 * len(whole)), read)
            yield Target(file, overwritten(whole, len(whole) - 7), read)
    elif kind == "gguf":
        file = folder / "model.gguf"
        write_gguf(file)

        def read_gguf():
            for path in folder.glob("*imported*"):
                for part in sorted(path.rglob("*"), reverse=True):
                    part.rmdir() if part.is_dir() else part.unlink()
                path.rmdir()
            import_checkpoint(ImportConfig(str(file), str(folder / "imported")))

        whole = file.read_bytes()
        yield Target(file, truncated(whole, 4), read_gguf)
        yield Target(file, flipped(whole, 10, until=400), read_gguf)
        yield Target(file, overwritten(whole, 10, until=100), read_gguf)


def shard(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = list(tensors)
    parts = {f"part-{i}.safetensors": names[i::3] for i in range(3)}
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, folder / file)
    weight_map = {name: file for file, own in parts.items() for name in own}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}, indent=1))


def foreign_files(path: Path) -> Damage:
    for name in ("/etc/passwd", "../single/model.safetensors", ".", "", "x\0y", "a" * 5000, "config.json"):
        index = json.loads(path.read_text())
        index["weight_map"][next(iter(index["weight_map"]))] = name
        yield f"a tensor in {name[:30]!r}", json.dumps(index).encode()


def other_sizes(path: Path) -> Damage:
    from safetensors import safe_open
    from safetensors.torch import save

    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, values in tensors.items():
        for kind, other in {
            "no dimension": values.sum(),
            "one too many": values[None].contiguous(),
            "a row less": values[1:].contiguous(),
            "nothing": values[:0].contiguous(),
            "bf16": values.to(torch.bfloat16),
            "bool": values.bool(),
            "complex": values.to(torch.complex64),
        }.items():
            yield f"{name}: {kind}", save({**tensors, name: other}, metadata)
    for name in metadata:
        for kind, text in rewritten(metadata[name], 20):
            yield f"metadata {name}: {kind}", save(tensors, {**metadata, name: text})
        yield f"no metadata {name}", save(tensors, {n: m for n, m in metadata.items() if n != name})
    yield "no metadata", save(tensors)


def damaged_index(whole: bytes, count: int) -> Damage:
    yield from truncated(whole, count // 16)
    yield from flipped(whole, count)
    yield from overwritten(whole, count // 4)
    yield from evil_pickles()
    for name, change in changes_of_index():
        metadata = pickle.loads(whole)
        change(metadata)
        yield name, pickle.dumps(metadata)


def changes_of_index() -> Iterator[tuple[str, Callable]]:
    def places(name, value):
        def change(metadata):
            for info in metadata.storage_data.values():
                setattr(info, name, value)

        return change

    def chunks(name, value):
        def change(metadata):
            for tensor in metadata.state_dict_metadata.values():
                for chunk in getattr(tensor, "chunks", []):
                    setattr(chunk, name, value)

        return change

    def tensors(change_one):
        def change(metadata):
            for tensor in metadata.state_dict_metadata.values():
                if hasattr(tensor, "chunks"):
                    change_one(tensor)

        return change

    for number in (2**60, 2**63, -1, 0, 1.5, "x", None, [1]):
        yield f"offset {number}", places("offset", number)
        yield f"length {number}", places("length", number)
        yield f"sizes {number}", chunks("sizes", (number,) * 2)
        yield f"offsets {number}", chunks("offsets", (number,) * 2)
        yield f"size {number}", tensors(lambda tensor, number=number: setattr(tensor, "size", (number,) * 2))
    for name in ("/etc/passwd", "../x", "", ".", "x\0", 5, None):
        yield f"file {name!r}", places("relative_path", name)
    yield "no chunks", tensors(lambda tensor: tensor.chunks.clear())
    yield "chunks twice", tensors(lambda tensor: tensor.chunks.extend(tensor.chunks))
    for dtype in (torch.float64, torch.int8, torch.complex64, torch.bool, None, "x"):
        yield f"dtype {dtype}", tensors(lambda tensor, dtype=dtype: setattr(tensor.properties, "dtype", dtype))
    yield "no tensors", lambda metadata: metadata.state_dict_metadata.clear()
    yield "no files", lambda metadata: metadata.storage_data.clear()
    for name in ("state_dict_metadata", "storage_data"):
        for value in (None, [], {1: 2}, "x"):
            yield f"{name} = {value}", lambda metadata, name=name, value=value: setattr(metadata, name, value)


def damaged_chunk(iteration: Path, read: Callable) -> Iterator[Target]:
    """One chunk in a file of its own, so that it may be of another length."""
    index = iteration / ".metadata"
    metadata = pickle.loads(index.read_bytes())
    place = next(info for key, info in metadata.storage_data.items() if "word_embeddings" in key.fqn)
    with open(iteration / place.relative_path, "rb") as file:
        file.seek(place.offset)
        whole = file.read(place.length)
    before, path = index.read_bytes(), iteration / "__own.distcp"

    def read_own():
        place.relative_path, place.offset, place.length = path.name, 0, path.stat().st_size
        index.write_bytes(pickle.dumps(metadata))
        try:
            return read()
        finally:
            index.write_bytes(before)

    path.write_bytes(whole)
    yield Target(path, damaged_archive(whole, 24), read_own)
    yield Target(path, forged_archive(whole, 40), lambda: read_own() and None)
    values = torch.load(io.BytesIO(whole))
    others = {
        "a parameter": torch.nn.Parameter(values),
        "another dtype": values.double(),
        "a row less": values[1:].clone(),
        "a list": [values],
        "a text": "x",
        "sparse": values.to_sparse(),
        "on no device": values.to("meta"),
        "stretched": values[:1].clone().expand(values.shape),
        "quantised": torch.quantize_per_tensor(values, 0.1, 0, torch.qint8),
    }
    yield Target(path, ((name, saved(other)) for name, other in others.items() if name != "stretched"), read_own)
    yield Target(path, iter([("stretched", saved(others["stretched"]))]), lambda: read_own() and None)


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def write_gguf(path: Path) -> None:
    """A llama with a tokenizer of some letters."""
    import gguf

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(32)
    tokens = ["<unk>", "<s>", "</s>", *(chr(97 + i) for i in range(26)), "ab", "cd", "\u0120"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * 29)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    generator = np.random.default_rng(0)
    sizes = {
        "token_embd": (32, 32),
        "output": (32, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (32, 32),
        "blk.0.ffn_up": (32, 32),
        "blk.0.ffn_down": (32, 32),
    }
    for name, size in sizes.items():
        writer.add_tensor(f"{name}.weight", generator.standard_normal(size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def memory(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def equal(found: object, expected: object) -> bool:
    if isinstance(found, torch.Tensor):
        return torch.equal(found, expected)
    if isinstance(found, list):
        return len(found) == len(expected) and all(map(equal, found, expected))
    return found == expected


def try_case(target: Target, expected: object) -> str:
    """How the reading of a file ends."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    started = time.monotonic()
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        found = target.read()
        outcome = "read" if expected is None or equal(found, expected) else "read, and it is not what was written"
    except UserError as error:
        outcome = "refused" if len(str(error)) < 20_000 else f"an error of {len(str(error))} letters"
    except TooSlow:
        outcome = f"took {time.monotonic() - started:.1f} s"
    except BaseException as error:
        outcome = f"{error!r:.300}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if (peak := memory("VmHWM") - before) > MEMORY:
        outcome += f"; took {peak / 2**20:.0f} MiB"
    if Path(os.environ["MARKER"]).exists():
        os.rmdir(os.environ["MARKER"])
        outcome += "; was run"
    return outcome


def main(folder: Path, kinds: list[str]) -> None:
    torch.set_num_threads(1)
    os.environ["MARKER"] = str(folder / MARKER)

    def stop(number, frame):
        raise TooSlow

    signal.signal(signal.SIGALRM, stop)
    logging.disable()
    limited = False
    for kind, target in ((name, target) for name in kinds for target in targets(name, folder / name)):
        whole = target.path.read_bytes()
        expected = target.read()
        if not limited:
            limit = memory("VmSize") + ADDRESSES
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            limited = True
        print(f"{kind}\t{target.path.name}, undamaged\t{try_case(target, expected)}", flush=True)
        for name, content in target.cases:
            target.path.write_bytes(content)
            print(f"{kind}\t{target.path.name}, {name!r}", end="\t", flush=True)
            print(try_case(target, expected), flush=True)
        target.path.write_bytes(whole)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
