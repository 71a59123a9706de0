"""Reads what Weights & Biases wrote offline, for comparison with what was logged."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _HEADER = 32 * 1024, struct.Struct("<IHB")  # checksum, length and kind of a piece
_WHOLE, _LAST = 1, 4


def records(file: Path) -> Iterator[Record]:
    """All whole records of a `.wandb` file, which is a log in LevelDB's format behind seven bytes of its own."""
    data, position, parts = file.read_bytes(), 7, b""
    while position + _HEADER.size <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER.size:
            position += left
            continue
        _, length, kind = _HEADER.unpack_from(data, position)
        parts += data[position + _HEADER.size :][:length]
        position += _HEADER.size + length
        if kind in (_WHOLE, _LAST):
            yield Record.FromString(parts)
            parts = b""


def sessions(folder: Path) -> list[list[Record]]:
    """The records of every start of a run, oldest first, once W&B's process has written the end of the newest."""
    files = folder.glob("wandb/*run-*/run-*.wandb")
    files = sorted(files, key=lambda file: file.parent.name)  # which begins with time
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not any(r.WhichOneof("record_type") == "exit" for r in records(files[-1])):
        time.sleep(0.1)
    return [list(records(file)) for file in files]


def rows(session: list[Record]) -> list[dict]:
    """What one start of a run logged, with W&B's own columns, whose names begin with `_`."""
    lines = [record.history for record in session if record.WhichOneof("record_type") == "history"]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in line.item} for line in lines]


def history(folder: Path) -> tuple[set[str], list[dict]]:
    """A run's history over all of its starts, the last line of every `progress/step`, in their order.

    Args:
        folder: of the run.

    Returns:
        the ids of the W&B runs that there are, which should be one, and the lines without W&B's own columns.
    """
    found, ids = {}, set()
    for session in sessions(folder):
        ids |= {record.run.run_id for record in session if record.WhichOneof("record_type") == "run"}
        for row in rows(session):
            if "progress/step" in row:
                found[row["progress/step"]] = {key: value for key, value in row.items() if not key.startswith("_")}
    return ids, [found[step] for step in sorted(found)]


def artifacts(session: list[Record]) -> list:
    """The artifacts of one start of a run, in the order in which they were logged."""
    found = [record.request.log_artifact.artifact for record in session if record.request.HasField("log_artifact")]
    return found + [record.artifact for record in session if record.WhichOneof("record_type") == "artifact"]
