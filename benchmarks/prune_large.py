"""Pruning a checkpoint of Llama 3.1 8B's shape: seconds and memory, beside plain file copies of as many bytes.

The checkpoint is in bf16, of random weights, in the chunks in which 4 tensor-parallel x 2 pipeline ranks of Megatron
write it. It is pruned to Minitron's 4B-Width shape (hidden 4096 to 3072, FFN 14336 to 9216) and 4B-Depth shape (32
layers to 16), by random scores, and the results are thrown away.

What is compared: `minitron prune`, by one process and by two, and a loop that reads the bytes that the pruned network
is made of (all, or those of the layers that stay) and writes as many bytes as the result has, a buffer at a time, as
`cp` does. Both start with nothing of the source in the page cache and end when all is on the disk (fsync); the seconds
that Python takes to start and import count in neither. Memory is the largest resident set of each process.
"""

import os
import shutil
import socket
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

from common import (
    console,
    describe,
    in_fresh_process,
    machine,
    markdown_table,
    memory_gib,
    parser,
    print_table,
    show_spread,
    spread,
    write_docs,
    write_results,
)

NAME = "prune_large"
WORKERS = (1, 2)
MAX_RATIO, MAX_MEMORY_GB = 1.5, 1.5
LEAST_FREE_GB = 40
BUFFER_BYTES = 16 * 2**20
PLAIN = "plain copies"
COLUMNS = ["case", "by", "seconds", "times plain copies", "GB read", "GB written", "peak GB of a process"]


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--layers", type=int, default=32, help="of the source; fewer for a quick look")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts = machine()
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as name:
        work = Path(name)
        in_fresh_process(make_source, work, args.layers)
        runs = {case: measure(work, target, args.repeats, case) for case, target in targets(args.layers).items()}
    results = {"machine": facts, "layers": args.layers, "cases": summarise(runs), "runs": runs}
    write_results(NAME, results)
    print_table(f"Pruning a checkpoint of Llama 3.1 8B's shape, {args.layers} layers", COLUMNS, rows(results))
    console.print(describe(facts))
    for line in verdict(results["cases"]):
        console.print(line)


def targets(layers: int) -> dict[str, dict]:
    """What each case prunes to."""
    return {"4B-Width": {"hidden": 3072, "ffn": 9216}, "4B-Depth": {"layers": layers // 2}}


def require_disk(work: Path, num_bytes: int, left: float = LEAST_FREE_GB) -> None:
    """End the measurement if less than `left` GB would stay free."""
    free = shutil.disk_usage(work).free
    if free - num_bytes < left * 1e9:
        raise SystemExit(f"{work} has {free / 1e9:.0f} GB free: {num_bytes / 1e9:.0f} are needed, and {left} stay free")


def make_source(work: Path, layers: int) -> None:
    """Write the checkpoint `source` and the folder `scores`."""
    import torch

    from minitron_megatron.checkpoint import writer
    from minitron_megatron.checkpoint.manifest import Manifest
    from minitron_megatron.model.count import num_parameters
    from minitron_megatron.model.shape import ModelShape, layers_pattern
    from minitron_megatron.pruning.scores import Scores

    sizes = dict(hidden=4096, ffn=14336, num_heads=32, num_query_groups=8, head_dim=128)
    shape = ModelShape(layers_pattern(layers), **sizes, vocab=128256, padded_vocab=128256, max_positions=131072)
    results = [shape.replace(hidden=3072, ffn=9216), shape.replace(pattern=layers_pattern(layers // 2))]
    num_bytes = 2 * (num_parameters(shape) + max(map(num_parameters, results)))
    require_disk(work, num_bytes)

    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2**28, generator=generator, dtype=torch.bfloat16).mul_(0.02)

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
    writer.CHUNK_BYTES = num_bytes  # Megatron has no largest chunk: a rank's part of a tensor is one
    writer.write_checkpoint(work / "source", source, torch.bfloat16, Manifest("checkpoint"), None, tensor_ranks=4)
    scores = [(4096,), (layers, 14336), (layers, 8, 4), (layers,)]
    (work / "scores").mkdir()
    *width, depth = (torch.rand(size, generator=generator) for size in scores)
    Scores(shape, *width, {"loss": depth}).write(work / "scores")
    Manifest("scores").write(work / "scores")


def measure(work: Path, target: dict, repeats: int, case: str) -> dict[str, list[dict]]:
    """Seconds, bytes and memory of every repeat, of plain copies and of each number of workers, in turn."""
    folders = work / "source", work / "result"
    runs: dict[str, list[dict]] = {PLAIN: [], **{show_workers(n): [] for n in WORKERS}}
    for repeat in range(repeats):
        for num_workers in WORKERS:
            name = show_workers(num_workers)
            with (
                console.status(f"{case}, {name}, repeat {repeat + 1} of {repeats}"),
                cold(*folders),
            ):
                workers = in_ranks(num_workers, prune_as, work, target)
                seconds = max(worker["seconds"] for worker in workers)
                runs[name].append({"seconds": seconds, "peak_gb": [worker["peak_gb"] for worker in workers]})
                written = size_of(work / "result")
        with (
            console.status(f"{case}, {PLAIN}, repeat {repeat + 1} of {repeats}"),
            cold(*folders),
        ):
            runs[PLAIN].append(in_fresh_process(copy_plainly, work, target, written))
    return runs


def show_workers(num_workers: int) -> str:
    return "one process" if num_workers == 1 else f"{num_workers} processes"


@contextmanager
def cold(source: Path, result: Path) -> Iterator[None]:
    """Begin with nothing of the source in the page cache, and leave no result behind."""
    os.sync()
    for path in source.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        yield
    finally:
        shutil.rmtree(result, ignore_errors=True)


def in_ranks(num_workers: int, function: Callable[..., dict], *args) -> list[dict]:
    """Call `function(rank, *args)` in fresh processes that share the work, as those that `workers=N` starts."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    sizes = {"WORLD_SIZE": num_workers, "LOCAL_WORLD_SIZE": num_workers}
    world = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        ranks = [pool.submit(function, {**world, "RANK": rank}, *args) for rank in range(num_workers)]
        return [rank.result() for rank in ranks]


def prune_as(rank: dict, work: Path, target: dict) -> dict:
    """One rank's seconds, and its memory at the peak."""
    os.environ.update({name: str(value) for name, value in rank.items()})
    from minitron_megatron.config.schema import PruneConfig, TargetConfig
    from minitron_megatron.pruning.prune import prune

    config = PruneConfig(*(str(work / name) for name in ("source", "result", "scores")), target=TargetConfig(**target))
    started = time.perf_counter()
    prune(config)
    return {"seconds": time.perf_counter() - started, "peak_gb": memory_gib()["peak_gib"] * 2**30 / 1e9}


def copy_plainly(work: Path, target: dict, num_bytes: int) -> dict:
    """Read what the result is made of, and write `num_bytes` of it."""
    parts = needed(work, target)
    total, read = sum(length for *_, length in parts), 0
    buffer = memoryview(bytearray(BUFFER_BYTES))
    (work / "result").mkdir()
    started = time.perf_counter()
    with open(work / "result/copy", "wb", buffering=0) as copy:
        for path, position, length in parts:
            with open(path, "rb", buffering=0) as file:
                file.seek(position)
                while length:
                    count = file.readinto(buffer[: min(length, BUFFER_BYTES)])
                    length, read = length - count, read + count
                    copy.write(buffer[: num_bytes * read // total - copy.tell()])
        os.fsync(copy.fileno())
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "read_gb": total / 1e9, "written_gb": num_bytes / 1e9}


def needed(work: Path, target: dict) -> list[tuple[Path, int, int]]:
    """File, first byte and length of the chunks that the result is made of, in the order in which they lie there."""
    from minitron_megatron.checkpoint.sharded import Checkpoint
    from minitron_megatron.config.schema import TargetConfig
    from minitron_megatron.pruning.plan import make_plan
    from minitron_megatron.pruning.scores import Scores

    checkpoint = Checkpoint(work / "source")
    plan = make_plan(Scores.read(work / "scores"), TargetConfig(**target))
    kept = {position // 2 for position in plan.sublayers}
    return sorted(
        (chunk.path, chunk.position, chunk.length)
        for key, tensor in checkpoint.tensors.items()
        for chunk in tensor.chunks
        if not key.startswith("decoder.layers.") or chunk.offsets[0] in kept
    )


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def summarise(runs: dict[str, dict[str, list[dict]]]) -> dict[str, dict]:
    """Spread of the seconds, ratio of the medians, and the largest memory of a process, for each case and way."""
    found: dict[str, dict] = {}
    for case, ways in runs.items():
        plain = statistics.median(run["seconds"] for run in ways[PLAIN])
        found[case] = {}
        for way, repeats in ways.items():
            seconds = [run["seconds"] for run in repeats]
            peaks = [peak for run in repeats for peak in run.get("peak_gb", [])]
            found[case][way] = {
                "seconds": spread(seconds),
                "ratio": statistics.median(seconds) / plain,
                "read_gb": ways[PLAIN][0]["read_gb"],
                "written_gb": ways[PLAIN][0]["written_gb"],
                "peak_gb": max(peaks, default=None),
            }
    return found


def rows(results: dict) -> list[list[str]]:
    return [
        [
            case,
            way,
            show_spread(found["seconds"], 1),
            f"{found['ratio']:.2f}",
            f"{found['read_gb']:.1f}",
            f"{found['written_gb']:.1f}",
            f"{found['peak_gb']:.2f}" if found["peak_gb"] else "–",
        ]
        for case, ways in results["cases"].items()
        for way, found in ways.items()
    ]


def verdict(cases: dict[str, dict]) -> list[str]:
    """Whether the goals are reached, a line per case."""
    lines = []
    for case, ways in cases.items():
        for way, found in ways.items():
            if way != PLAIN:
                reached = found["ratio"] <= MAX_RATIO and found["peak_gb"] <= MAX_MEMORY_GB
                lines.append(
                    f"{case} by {way}: {found['ratio']:.2f} times the seconds of plain copies, {found['peak_gb']:.2f} "
                    f"GB; goal of at most {MAX_RATIO} and {MAX_MEMORY_GB} GB: {'' if reached else 'not '}reached."
                )
    return lines


def in_markdown(results: dict) -> str:
    lines = "\n".join(f"- {line}" for line in verdict(results["cases"]))
    return "\n\n".join([markdown_table(COLUMNS, rows(results)), lines, describe(results["machine"])])


if __name__ == "__main__":
    main()
