"""What the measurements share: the models, cases in processes of their own, tables, JSON and the docs."""

import json
import os
import platform
import statistics
import sys
import time
import warnings
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from rich.console import Console
from rich.table import Table

# A case runs in a process that imports this file and the script it belongs to. What is heavy is imported by the
# functions that need it, so that a case's memory is its own.

# Of this tree, whichever is installed; the processes of cases get this path, too.
sys.path.insert(0, str(Path(__file__).parent.parent))

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs" / "benchmarks.md"
IMAGES = DOCS.parent / "images"
PACKAGES = ["torch", "megatron-core", "transformers", "nvidia-modelopt", "minitron-megatron"]

console = Console(width=None if sys.stdout.isatty() else 120)


def parser(description: str, repeats: int | None = None, threads: int | None = None) -> ArgumentParser:
    """The options that every measurement has.

    Args:
        description: the first line of it is shown by `--help`.
        repeats, threads: the defaults of `--repeats` and `--threads`; None leaves that option out.
    """
    found = ArgumentParser(description=description.splitlines()[0], formatter_class=ArgumentDefaultsHelpFormatter)
    found.add_argument("--work", type=Path, default=Path("runs/benchmarks"), help="models and runs are kept here")
    found.add_argument("--docs", action="store_true", help="measure nothing; write the last results into the docs")
    if repeats:
        found.add_argument("--repeats", type=int, default=repeats, help="of every case, each in a fresh process")
    if threads:
        found.add_argument("--threads", type=int, default=threads, help="of torch, in every case")
    return found


@dataclass
class Models:
    """The demo's models, as its recipe makes them, in bf16.

    Attributes:
        teacher, pruned: checkpoints.
        teacher_hf, pruned_hf: the same as Hugging Face folders.
        recipe: the settings of each stage of the demo's recipe, by name.
    """

    teacher: Path
    pruned: Path
    teacher_hf: Path
    pruned_hf: Path
    recipe: dict


def prepare_models(work: Path) -> Models:
    """Run the demo's recipe as far as the pruned model, and export both models. What is there already is kept."""
    from minitron_megatron import export
    from minitron_megatron.config.compose import compose, resolve_stages
    from minitron_megatron.config.schema import ExportConfig
    from minitron_megatron.config.verbs import verb_function

    overrides = ["experiment=smollm2_135m", f"run_dir={work}", "stages.teacher.dtype=bf16"]
    stages = resolve_stages(compose("compress", overrides))
    for name in ("teacher", "scores", "pruned"):
        verb, settings = stages[name]
        verb_function(verb)(settings)
    for name in ("teacher", "pruned"):
        export(ExportConfig(str(work / name), str(work / f"{name}_hf")))
    folders = [work / name for name in ("teacher", "pruned", "teacher_hf", "pruned_hf")]
    return Models(*folders, {name: settings for name, (_, settings) in stages.items()})


def in_fresh_process(function: Callable, *args):
    """What `function` returns in a new interpreter, whose peak memory is therefore that of the call."""
    return in_fresh_processes([(function, *args)], 1)[0]


def in_fresh_processes(calls: list[tuple], jobs: int) -> list:
    """What each call of a function with its arguments returns, every one in a new interpreter, `jobs` at a time."""
    context = get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running = [pool.submit(_quietly, *call) for call in calls]
        return [one.result() for one in running]


def _quietly(function: Callable, *args):
    # Megatron-Core and ModelOpt say what is not installed or not tested, in every process again.
    warnings.simplefilter("ignore")
    return function(*args)


def run_in_turn(cases: dict[str, Callable], repeats: int, *args) -> dict[str, list[list[dict]]]:
    """Run all cases at once, of which one works while the others wait: after each step it is the next one's turn.

    What slows the machine for a while hits all cases alike, and the steps of a round can be compared.

    Args:
        cases: generator functions, each of which does a step between one `yield` and the next.
        repeats: so many times, with fresh processes.
        args: of every case.

    Returns:
        what the steps of each case yielded, by repeat.

    Raises:
        SystemExit: a case failed.
    """
    results: dict[str, list[list[dict]]] = {name: [] for name in cases}
    context = get_context("spawn")
    for repeat in range(repeats):
        turns = {}
        for name, case in cases.items():
            turns[name], theirs = context.Pipe()
            context.Process(target=_quietly, args=(_take_turns, theirs, case, *args), daemon=True).start()
            theirs.close()
            results[name].append([])
        while turns:
            for name, turn in list(turns.items()):
                steps = results[name][-1]
                with console.status(f"{name}, repeat {repeat + 1} of {repeats}, step {len(steps) + 1}"):
                    turn.send("go on")
                    try:
                        found = turn.recv()
                    except EOFError:
                        raise SystemExit(f"{name} failed in step {len(steps) + 1}; its error stands above") from None
                if found is None:
                    del turns[name]
                else:
                    steps.append(found)
    return results


def _take_turns(turn: Connection, case: Callable, *args) -> None:
    turn.recv()
    for found in case(*args):
        turn.send(found)
        turn.recv()
    turn.send(None)


def on_gpu() -> bool:
    """Whether this is measured on a GPU, whose results and tables stand beside those of the CPU."""
    import torch

    return torch.cuda.is_available()


def memory_gib() -> dict[str, float]:
    """Memory of this process, in GiB, now and at its peak: tensors on the GPU, or what is resident (Linux)."""
    if on_gpu():
        import torch

        return {
            "resident_gib": torch.cuda.memory_allocated() / 2**30,
            "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        }
    # ru_maxrss would start from the parent's peak; the kernel's high-water mark begins anew with each program.
    lines = Path("/proc/self/status").read_text().splitlines()
    kib = {key: int(value.split()[0]) for key, value in (line.split(":") for line in lines) if key.startswith("Vm")}
    return {"resident_gib": kib["VmRSS"] / 2**20, "peak_gib": kib["VmHWM"] / 2**20}


def device() -> str:
    """Where the tensors of a measurement lie."""
    return "cuda" if on_gpu() else "cpu"


def synchronize() -> None:
    """Wait for the GPU, if there is one: kernels run on after the call that starts them has returned."""
    if on_gpu():
        import torch

        torch.cuda.synchronize()


class Stopwatch:
    """Times steps, and tells how busy others kept the processor meanwhile (Linux)."""

    def __init__(self):
        self.seconds: list[float] = []
        self._others = 0.0

    def __enter__(self):
        synchronize()
        self._started = time.perf_counter(), _busy_s() - time.process_time()
        return self

    def __exit__(self, *_):
        synchronize()
        wall, others = self._started
        self.seconds.append(time.perf_counter() - wall)
        self._others += _busy_s() - time.process_time() - others

    @property
    def others_share(self) -> float:
        """Share of the processor's time that went to other processes: what makes a measurement worthless."""
        return max(0.0, self._others / (sum(self.seconds) * os.cpu_count()))


def _busy_s() -> float:
    """Seconds that all cores together have worked, for anybody, since the machine started."""
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def spread(values: list[float]) -> dict[str, float]:
    """Median, mean, least and largest value."""
    middle = {"median": statistics.median(values), "mean": statistics.fmean(values)}
    return {**middle, "min": min(values), "max": max(values)}


def show_spread(values: dict[str, float], digits: int, middle: str = "median") -> str:
    """`median (min-max)`, or with the mean."""
    middle, least, most = (f"{values[key]:,.{digits}f}" for key in (middle, "min", "max"))
    return f"{middle} ({least}-{most})"


def machine() -> dict:
    """What the numbers depend on beside the code."""
    name = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        models = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        name = models[0] if models else name
    gpu = {}
    if on_gpu():
        import torch

        gpu = {"gpu": torch.cuda.get_device_name()}
    return {
        **gpu,
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "date": date.today().isoformat(),
    }


def describe(machine: dict) -> str:
    """One line about the machine, for below a table."""
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    gpu = f"one {machine['gpu']}, " if "gpu" in machine else ""
    cpu = f"{machine['cpu']}, {machine['cores']} cores"
    return f"{gpu}{cpu}, Python {machine['python']}, {versions}; {machine['date']}."


def write_results(name: str, results: dict) -> None:
    """Write `results/NAME.json`, or `NAME_gpu.json` where it was measured on a GPU."""
    RESULTS.mkdir(exist_ok=True)
    name = f"{name}_gpu" if "gpu" in results["machine"] else name
    (RESULTS / f"{name}.json").write_text(json.dumps(results, indent=2) + "\n")


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Show a table; the first column is text, the others are numbers."""
    table = Table(title=title, title_justify="left", box=None, header_style="bold", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """The same table in Markdown."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_docs(name: str, in_markdown: Callable[[dict], str], draw: Callable[[dict, Path], None] | None = None) -> None:
    """Put a measurement's last results, of the CPU and of a GPU, between their markers in `docs/benchmarks.md`.

    Args:
        name: of the measurement.
        in_markdown: makes a table of results.
        draw: writes a figure of them to a path, which then is `docs/images/NAME.png`.
    """
    for of_device in (name, f"{name}_gpu"):
        path = RESULTS / f"{of_device}.json"
        if not path.exists():
            continue
        results = json.loads(path.read_text())
        begin, end = f"<!-- begin {of_device} -->", f"<!-- end {of_device} -->"
        before, rest = DOCS.read_text().split(begin)
        _, after = rest.split(end)
        DOCS.write_text(f"{before}{begin}\n{in_markdown(results)}\n{end}{after}")
        if draw:
            draw(results, IMAGES / f"{of_device}.png")
