"""What the measurements on a model of Llama 3.1 8B's network share: the model, and a verb's work beside plain copies.

The model has random weights, in bf16. A verb's work is done by one process and by two; beside it stands a loop that
reads the bytes that the result is made of and writes as many as the result has, a buffer at a time, as `cp` does. All
start with nothing of the source in the page cache and end when all is on the disk (fsync); the seconds that Python
takes to start and import count in none of them. Memory is the largest resident set of each process.
"""

import json
import math
import os
import shutil
import socket
import statistics
import string
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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

WORKERS = (1, 2)
MAX_RATIO, MAX_MEMORY_GB = 1.5, 1.5
BUFFER_BYTES = 16 * 2**20
PLAIN = "plain copies"
COLUMNS = ["case", "by", "seconds", "times plain copies", "GB read", "GB written", "peak GB of a process"]


@dataclass
class Case:
    """A verb's work.

    Attributes:
        verb: its function's name in `minitron_megatron`.
        settings: what the function takes.
        source: the folder that it reads.
        needed: file, first byte and length of what the result is made of; everything in the source by default.
    """

    verb: str
    settings: object
    source: Path
    needed: list[tuple[Path, int, int]] | None = None

    def __post_init__(self):
        if self.needed is None:
            self.needed = [(path, 0, path.stat().st_size) for path in files_in(self.source)]


def run(name: str, description: str, title: str, make_cases: Callable[[Path, int], dict[str, Case]]) -> None:
    """Measure every case, and show and keep what was found.

    Args:
        name: of the results.
        description: of the command line.
        title: of the table.
        make_cases: writes the sources into a folder, for a number of layers, and returns the cases.
    """
    options = parser(description, repeats=3)
    options.add_argument("--layers", type=int, default=32, help="of the model; fewer for a quick look")
    args = options.parse_args()
    if args.docs:
        write_docs(name, in_markdown)
        return
    facts = machine()
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        cases = in_fresh_process(make_cases, Path(folder), args.layers)
        runs = {title: measure(title, case, args.repeats) for title, case in cases.items()}
    results = {"machine": facts, "layers": args.layers, "cases": summarise(runs), "runs": runs}
    write_results(name, results)
    print_table(f"{title}, {args.layers} layers", COLUMNS, rows(results))
    console.print(describe(facts))
    for line in verdict(results["cases"]):
        console.print(line)


class RandomModel:
    """A source of weights of Llama 3.1 8B's network, cut when they are asked for out of the same numbers."""

    def __init__(self, layers: int):
        import torch

        from minitron_megatron.model.layers import DENSE
        from minitron_megatron.model.network import Network, transformer

        attention, mlp = DENSE
        layer = [attention(num_heads=32, num_query_groups=8, head_dim=128), mlp(ffn_hidden_size=14336)]
        vocab = dict(vocab_size=128256, padded_vocab_size=128256)
        self.network = Network(transformer(layers, layer), hidden_size=4096, **vocab, max_positions=131072)
        self.dtype = torch.bfloat16
        generator = torch.Generator().manual_seed(0)
        self._values = torch.randn(2**28, generator=generator, dtype=self.dtype).mul_(0.02)

    def read(self, param, index):
        size = [len(i) for i in index]
        place = f"{param.name} {param.layer} {[int(i[0]) for i in index]}"
        start = zlib.crc32(place.encode()) % (len(self._values) - math.prod(size))
        return self._values[start : start + math.prod(size)].view(size)


def write_assets(folder: Path, words: Iterable[str] = string.ascii_lowercase) -> Path:
    """Make a folder with what a Hugging Face model has beside its weights: a config and a tokenizer, of some words."""
    from tokenizers import Tokenizer, models

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    vocab = {token: number for number, token in enumerate(["<eos>", *words])}
    Tokenizer(models.WordLevel(vocab, unk_token="<eos>")).save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def require_disk(work: Path, num_bytes: int, left_gb: float) -> None:
    """End the measurement if less than `left_gb` would stay free."""
    free = shutil.disk_usage(work).free
    if free - num_bytes < left_gb * 1e9:
        raise SystemExit(
            f"{work} has {free / 1e9:.0f} GB free: {num_bytes / 1e9:.0f} are needed, and {left_gb} stay free"
        )


def measure(name: str, case: Case, repeats: int) -> dict[str, list[dict]]:
    """Seconds, bytes and memory of every repeat, of plain copies and of each number of workers, in turn."""
    result = Path(case.settings.output)
    runs: dict[str, list[dict]] = {PLAIN: [], **{show_workers(n): [] for n in WORKERS}}
    for repeat in range(repeats):
        for num_workers in WORKERS:
            way = show_workers(num_workers)
            with console.status(f"{name}, {way}, repeat {repeat + 1} of {repeats}"), cold(case.source, result):
                ranks = in_ranks(num_workers, case.verb, case.settings)
                seconds = max(rank["seconds"] for rank in ranks)
                runs[way].append({"seconds": seconds, "peak_gb": [rank["peak_gb"] for rank in ranks]})
                written = sum(path.stat().st_size for path in files_in(result))
        with console.status(f"{name}, {PLAIN}, repeat {repeat + 1} of {repeats}"), cold(case.source, result):
            runs[PLAIN].append(in_fresh_process(copy_plainly, case.needed, result, written))
    return runs


def show_workers(num_workers: int) -> str:
    return "one process" if num_workers == 1 else f"{num_workers} processes"


@contextmanager
def cold(source: Path, result: Path) -> Iterator[None]:
    """Begin with nothing of the source in the page cache, and leave no result behind."""
    os.sync()
    for path in files_in(source):
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    try:
        yield
    finally:
        shutil.rmtree(result, ignore_errors=True)


def files_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def in_ranks(num_workers: int, verb: str, settings) -> list[dict]:
    """Do a verb's work in fresh processes that share it, as those that `workers=N` starts."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    sizes = {"WORLD_SIZE": num_workers, "LOCAL_WORLD_SIZE": num_workers}
    world = {**sizes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        ranks = [pool.submit(as_rank, {**world, "RANK": rank}, verb, settings) for rank in range(num_workers)]
        return [rank.result() for rank in ranks]


def as_rank(variables: dict, verb: str, settings) -> dict:
    """One rank's seconds, and its memory at the peak."""
    os.environ.update({name: str(value) for name, value in variables.items()})
    import minitron_megatron

    function = getattr(minitron_megatron, verb)
    started = time.perf_counter()
    function(settings)
    return {"seconds": time.perf_counter() - started, "peak_gb": memory_gib()["peak_gib"] * 2**30 / 1e9}


def copy_plainly(needed: list[tuple[Path, int, int]], result: Path, num_bytes: int) -> dict:
    """Read what the result is made of, and write `num_bytes` of it."""
    total, read = sum(length for *_, length in needed), 0
    buffer = memoryview(bytearray(BUFFER_BYTES))
    result.mkdir()
    started = time.perf_counter()
    with open(result / "copy", "wb", buffering=0) as copy:
        for path, position, length in needed:
            with open(path, "rb", buffering=0) as file:
                file.seek(position)
                while length:
                    count = file.readinto(buffer[: min(length, BUFFER_BYTES)])
                    length, read = length - count, read + count
                    copy.write(buffer[: num_bytes * read // total - copy.tell()])
        os.fsync(copy.fileno())
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "read_gb": total / 1e9, "written_gb": num_bytes / 1e9}


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
