"""Ways to damage a file: every one a name and the bytes to put in its place."""

import io
import json
import os
import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

EXTREMES = [2**60, 2**63 - 1, -1, 2**32 + 1, 0]
Damage = Iterator[tuple[str, bytes]]


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
    yield "compressed 500 MB", _bomb(records)
    for name in records:
        yield f"no {name}", archive_of({other: content for other, content in records.items() if other != name})
    yield "another byte order", archive_of({**records, "byteorder": b"big"})


def _bomb(records: dict[str, bytes]) -> bytes:
    """Half a gigabyte of zeros, more than any reader may take, as some kilobytes."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in records.items():
            archive.writestr(f"archive/{name}", content)
        with archive.open("archive/data/1", "w", force_zip64=True) as record:
            for _ in range(16):
                record.write(bytes(2**25))
    return out.getvalue()


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


def saved(value: object) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()
