"""Reads thousands of damaged and hostile files in one process, and says how each reading ends: a line each.

    python -m tests.damaged FOLDER KIND...

A line is the kind, the name of the case, written before it is read so that a crash can be told, and its outcome:
`refused` by one of our errors, `read`, or what went wrong.
"""

import argparse
import gc
import io
import json
import logging
import os
import pickle
import resource
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from minitron_megatron.artifacts.manifest import Manifest
from minitron_megatron.checkpoint.convert import import_checkpoint
from minitron_megatron.checkpoint.dist_reader import Checkpoint, require_plain
from minitron_megatron.checkpoint.huggingface import HuggingFaceFolder
from minitron_megatron.checkpoint.saved_args import read_args
from minitron_megatron.checkpoint.source import TensorSource
from minitron_megatron.config.schema import ImportConfig, TargetConfig
from minitron_megatron.errors import UserError
from minitron_megatron.model.parameters import parameters
from minitron_megatron.pruning.make_plan import make_plan
from minitron_megatron.pruning.plan import Plan
from minitron_megatron.pruning.scores import Scores
from tests.damage import (
    Damage,
    damaged_archive,
    damaged_index,
    damaged_json,
    damaged_safetensors,
    flipped,
    foreign_files,
    forged_archive,
    other_sizes,
    overwritten,
    saved,
    truncated,
)
from tests.tiny import LLAMA, hf_model, import_hf, save_hf, scores_by_chance, write_gguf

SECONDS, MEMORY, ADDRESSES = 5, 200 * 2**20, 2**30
MARKER = "was-run"
SMALL = {**LLAMA, "num_hidden_layers": 2, "hidden_size": 12, "intermediate_size": 10, "vocab_size": 30, "head_dim": 4}


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


def everything(source: TensorSource) -> list[torch.Tensor]:
    """All weights, as they are read to be written elsewhere."""
    return [source.read(param, [np.arange(n) for n in param.shape]) for param in parameters(source.network)]


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
        network = Checkpoint(root).network
        scores = scores_by_chance(network)
        scores.element_rounds = {
            setting: [torch.ones(values.shape, dtype=torch.int64) for values in own]
            for setting, own in scores.elements.items()
        }
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
        sizes = dict(hidden_size=32, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
        write_gguf(file, hf_model(**LLAMA | sizes | dict(num_hidden_layers=1, vocab_size=32)))

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
    gc.freeze()  # nothing that was imported is ever freed, and looking through it takes longer than a case
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
