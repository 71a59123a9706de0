"""Fingerprints: what does it cost to know a model of Llama 3.1 8B's size by its content, the first time and later?

The model is a Hugging Face folder with files of 5 GB at most. Every case starts in a fresh process with nothing of the
folder in the page cache: a loop that reads every byte, the first look at the folder, a later one, and an import before
and after a first look. The seconds that Python takes to start and import count in none of them.
"""

import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from common import (
    console,
    describe,
    in_fresh_process,
    machine,
    markdown_table,
    parser,
    print_table,
    show_spread,
    spread,
    write_docs,
    write_results,
)
from large import BUFFER_BYTES, RandomModel, cold, files_in, require_disk, write_assets

NAME = "fingerprint"
LEAST_FREE_GB = 10
READ, FIRST, LATER = "read every byte", "first look", "later look"
IMPORT_FIRST, IMPORT_LATER = "import, not seen before", "import, seen before"
MAX_LATER_S = 1.0
COLUMNS = ["", "seconds", "of reading every byte"]


def main() -> None:
    options = parser(__doc__, repeats=3)
    options.add_argument("--layers", type=int, default=32, help="of the model; fewer for a quick look")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts = machine()
    args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        source = in_fresh_process(make_source, Path(folder), args.layers)
        num_bytes = sum(path.stat().st_size for path in files_in(source))
        seconds = measure(source, Path(folder) / "imported", args.repeats)
    reading = statistics.median(seconds[READ])
    cases = {
        name: {"seconds": spread(found), "ratio": statistics.median(found) / reading} for name, found in seconds.items()
    }
    results = {"machine": facts, "layers": args.layers, "gb": num_bytes / 1e9, "cases": cases, "runs": seconds}
    write_results(NAME, results)
    print_table(f"{num_bytes / 1e9:.1f} GB: median (least-largest)", COLUMNS, rows(results))
    console.print(describe(facts))
    console.print(verdict(results))


def make_source(work: Path, layers: int) -> Path:
    """Write the Hugging Face folder."""
    from minitron_megatron.artifacts.manifest import Manifest
    from minitron_megatron.checkpoint.huggingface import write_huggingface
    from minitron_megatron.model.count import num_parameters

    model = RandomModel(layers)
    require_disk(work, 2 * 2 * num_parameters(model.network), LEAST_FREE_GB)
    write_huggingface(work / "huggingface", model, write_assets(work / "assets"), 5e9, Manifest("huggingface"), "")
    return work / "huggingface"


def measure(source: Path, result: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of every case, each repeat running them in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in (READ, FIRST, LATER, IMPORT_FIRST, IMPORT_LATER)}
    memory = result.with_name("memory")
    for repeat in range(repeats):
        for name, found in seconds.items():
            if name in (FIRST, IMPORT_FIRST):
                shutil.rmtree(memory, ignore_errors=True)
            with console.status(f"{name}, repeat {repeat + 1} of {repeats}"), cold(source, result):
                found.append(in_fresh_process(seconds_of, name, source, result, memory))
    return seconds


def seconds_of(name: str, source: Path, result: Path, memory: Path) -> float:
    """Seconds of one case, with the digests of earlier ones in the folder `memory`."""
    os.environ["XDG_CACHE_HOME"] = str(memory)
    from minitron_megatron.artifacts.fingerprint import fingerprint
    from minitron_megatron.checkpoint.convert import import_checkpoint
    from minitron_megatron.config.schema import ImportConfig

    started = time.perf_counter()
    if name == READ:
        read(source)
    elif name in (FIRST, LATER):
        fingerprint(source)
    else:
        import_checkpoint(ImportConfig(str(source), str(result)))
    return time.perf_counter() - started


def read(folder: Path) -> None:
    buffer = memoryview(bytearray(BUFFER_BYTES))
    for path in files_in(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def rows(results: dict) -> list[list[str]]:
    return [
        [name, show_spread(found["seconds"], 2), f"{found['ratio']:.2f}"] for name, found in results["cases"].items()
    ]


def verdict(results: dict) -> str:
    medians = {name: found["seconds"]["median"] for name, found in results["cases"].items()}
    more = medians[IMPORT_FIRST] - medians[IMPORT_LATER]
    reached = more <= medians[READ] and medians[LATER] < MAX_LATER_S
    return (
        f"An import that hashes takes {more:.1f} s more than one that need not, reading every byte takes "
        f"{medians[READ]:.1f} s, and a later look {medians[LATER]:.2f} s; goal of no more than that reading, and of "
        f"less than {MAX_LATER_S:.0f} s: {'' if reached else 'not '}reached."
    )


def in_markdown(results: dict) -> str:
    return "\n\n".join([markdown_table(COLUMNS, rows(results)), verdict(results), describe(results["machine"])])


if __name__ == "__main__":
    main()
