"""Importing and exporting a model of Llama 3.1 8B's shape: seconds and memory, beside plain copies of as many bytes.

The Hugging Face folder is in bf16, of random weights, in files of 5 GB at most. It is imported, and the checkpoint that
comes of it exported; both results are thrown away.

What is compared: `minitron import` and `minitron export`, by one process and by two, and a loop that reads all bytes of
the source and writes as many, a buffer at a time, as `cp` does. All start with nothing of the source in the page cache
and end when all is on the disk (fsync); the seconds that Python takes to start and import count in none of them. Memory
is the largest resident set of each process.
"""

import os
import tempfile
import time
import zlib
from pathlib import Path

from common import (
    console,
    describe,
    in_fresh_process,
    machine,
    memory_gib,
    parser,
    print_table,
    write_docs,
    write_results,
)
from prune_large import (
    BUFFER_BYTES,
    COLUMNS,
    PLAIN,
    WORKERS,
    cold,
    in_markdown,
    in_ranks,
    require_disk,
    rows,
    show_workers,
    summarise,
    verdict,
)

NAME = "convert_large"
LEAST_FREE_GB = 10
# The result of one is the source of the other.
CASES = {"import": "huggingface", "export": "checkpoint"}


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--layers", type=int, default=32, help="of the model; fewer for a quick look")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts = machine()
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        in_fresh_process(make_sources, work, args.layers)
        runs = {case: measure(work, case, args.repeats) for case in CASES}
    results = {"machine": facts, "layers": args.layers, "cases": summarise(runs), "runs": runs}
    write_results(NAME, results)
    print_table(f"Converting a model of Llama 3.1 8B's shape, {args.layers} layers", COLUMNS, rows(results))
    console.print(describe(facts))
    for line in verdict(results["cases"]):
        console.print(line)


def make_sources(work: Path, layers: int) -> None:
    """Write the folder `huggingface` and the checkpoint `checkpoint`."""
    import json

    import torch

    from minitron_megatron.checkpoint.convert import import_checkpoint
    from minitron_megatron.checkpoint.huggingface import write_huggingface
    from minitron_megatron.checkpoint.manifest import Manifest
    from minitron_megatron.config.schema import ImportConfig
    from minitron_megatron.model.count import num_parameters
    from minitron_megatron.model.shape import ModelShape, layers_pattern

    sizes = dict(hidden=4096, ffn=14336, num_heads=32, num_query_groups=8, head_dim=128)
    shape = ModelShape(layers_pattern(layers), **sizes, vocab=128256, padded_vocab=128256, max_positions=131072)
    require_disk(work, 3 * 2 * num_parameters(shape), LEAST_FREE_GB)
    values = torch.randn(2**28, generator=torch.Generator().manual_seed(0), dtype=torch.bfloat16).mul_(0.02)

    class RandomWeights:
        """A source whose tensors are cut, when they are asked for, out of random numbers that are used many times."""

        dtype = torch.bfloat16

        def read(self, param, layer, index):
            size = torch.Size(len(i) for i in index)
            place = f"{param.name} {layer} {[int(i[0]) for i in index]}"
            start = zlib.crc32(place.encode()) % (values.numel() - size.numel())
            return values[start : start + size.numel()].view(size)

    source = RandomWeights()
    source.shape = shape
    (work / "companions").mkdir()
    (work / "companions/config.json").write_text(json.dumps({"model_type": "llama"}))
    write_huggingface(work / "huggingface", source, work / "companions", 5e9, Manifest("huggingface"), "")
    import_checkpoint(ImportConfig(str(work / "huggingface"), str(work / "checkpoint")))


def measure(work: Path, case: str, repeats: int) -> dict[str, list[dict]]:
    """Seconds, bytes and memory of every repeat, of plain copies and of each number of workers, in turn."""
    source, result = work / CASES[case], work / "result"
    runs: dict[str, list[dict]] = {PLAIN: [], **{show_workers(n): [] for n in WORKERS}}
    for repeat in range(repeats):
        for num_workers in WORKERS:
            name = show_workers(num_workers)
            with console.status(f"{case}, {name}, repeat {repeat + 1} of {repeats}"), cold(source, result):
                workers = in_ranks(num_workers, convert_as, case, source, result)
                seconds = max(worker["seconds"] for worker in workers)
                runs[name].append({"seconds": seconds, "peak_gb": [worker["peak_gb"] for worker in workers]})
        with console.status(f"{case}, {PLAIN}, repeat {repeat + 1} of {repeats}"), cold(source, result):
            runs[PLAIN].append(in_fresh_process(copy_plainly, source, result))
    return runs


def convert_as(rank: dict, case: str, source: Path, result: Path) -> dict:
    """One rank's seconds, and its memory at the peak."""
    os.environ.update({name: str(value) for name, value in rank.items()})
    from minitron_megatron.checkpoint.convert import export, import_checkpoint
    from minitron_megatron.config.schema import ExportConfig, ImportConfig

    convert, settings = {"import": (import_checkpoint, ImportConfig), "export": (export, ExportConfig)}[case]
    config = settings(str(source), str(result))
    started = time.perf_counter()
    convert(config)
    return {"seconds": time.perf_counter() - started, "peak_gb": memory_gib()["peak_gib"] * 2**30 / 1e9}


def copy_plainly(source: Path, result: Path) -> dict:
    """Read all of the source, and write as many bytes."""
    buffer = memoryview(bytearray(BUFFER_BYTES))
    total = 0
    result.mkdir()
    started = time.perf_counter()
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        with open(path, "rb", buffering=0) as file, open(result / path.name, "wb", buffering=0) as copy:
            while count := file.readinto(buffer):
                copy.write(buffer[:count])
                total += count
            os.fsync(copy.fileno())
    return {"seconds": time.perf_counter() - started, "read_gb": total / 1e9, "written_gb": total / 1e9}


if __name__ == "__main__":
    main()
