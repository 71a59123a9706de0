"""Proves that a refactoring changed nothing: records what a version of the package computes, compares two records.

    python tests/equality.py record FOLDER [--package CHECKOUT] [--only NAME ...]
    python tests/equality.py compare BEFORE AFTER [--only NAME ...]

A case is a network in a layout, `llama/tp2_sp`; a NAME is a case or a network. Each case is scored, pruned, distilled,
evaluated and exported through the command line of the package in CHECKOUT, and FOLDER gets one JSON file per case with
what was computed. Tensors are recorded by the hash of their bytes, everything else in full. The package is known by its
command line and its files alone, so that versions with different insides can be compared. Both records must be made
on one machine with one set of packages; `compare` says where they were not, and exits 1 if anything differs.
"""

import argparse
import hashlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

# Python finds it beside this file, which is run as a command.
from equality_cases import Case, all_cases, data_settings, make_inputs
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).resolve().parent.parent
Facts = dict[str, Any]

# Cases that run side by side.
AT_ONCE = 2
COLUMNS = (
    "checkpoint tensors",  # of what `import` writes, in the row of that name, else of what `prune` writes
    "scores",
    "plan",
    "losses",
    "gradient norms",
    "evaluation",
    "exported weights",
    "exported config",
)
# What a verb reads and writes, seen from the folder of a case.
PATHS = {
    "score": ["checkpoint=../imported", "output=scores"],
    "prune": ["checkpoint=../imported", "scores=scores", "output=pruned"],
    "distill": ["teacher=../imported", "student=pruned", "output=distilled"],
    "evaluate": ["model=distilled", "output=evaluation"],
    "export": ["checkpoint=distilled", "output=exported"],
}
# The part of a layout that some verbs have a use for; the others use all of it.
USED = {"prune": ("tensor", "pipeline", "virtual_pipeline"), "evaluate": ("tensor", "pipeline", "data"), "export": ()}
WITH_DATA = ("score", "distill", "evaluate")


class CommandFailed(Exception):
    """A command of the package ended with an error."""


class Recorder:
    """Runs cases with the package of a checkout, and writes a file for each.

    Args:
        folder: of the record.
        checkout: of the package.
    """

    def __init__(self, folder: Path, checkout: Path):
        self.folder = folder
        self.work = folder / "work"
        self.inputs = folder / "inputs"
        # Several threads add up in an order of their own. Without bytecode every process compiles torch anew.
        self.environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        self.environment |= {
            "PYTHONPATH": str(checkout),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
        }
        self.made_with = made_with(checkout)

    def import_network(self, network: str, source: str) -> None:
        """Import a network, for all of its cases."""
        work = self.work / network
        shutil.rmtree(work, ignore_errors=True)  # the package would skip what is there
        work.mkdir(parents=True)
        self.run(work, "import", [f"source={source}", "output=imported", "dtype=fp32"])
        files = [path for path in Path(source).glob("*") if path.is_file()]
        if files:
            files.append(self.inputs / "text.jsonl")
        hashes = {f"input {path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(files)}
        self.write(f"{network}/import", {"checkpoint tensors": hashes | checkpoint_tensors(work / "imported")})

    def run_case(self, case: Case) -> None:
        """Run the verbs of a case and record what they compute."""
        started = time.monotonic()
        work = self.work / case.network / case.name
        work.mkdir()
        columns: dict[str, Facts] = {}
        for verb in case.verbs:
            used = USED.get(verb)
            layout = [one for one in case.layout if used is None or one.split("=")[0].removeprefix("parallel.") in used]
            data = data_settings(case.network, self.inputs) if verb in WITH_DATA else []
            self.run(work, verb, [*PATHS[verb], *layout, *data, *case.settings.get(verb, [])])
            columns |= {column: read(work) for column, read in READERS[verb].items()}
        if empty := [column for column, facts in columns.items() if not facts]:
            raise CommandFailed(f"the files of {work} have no {' and no '.join(empty)}")
        self.write(case.full_name, columns)
        shutil.rmtree(work)
        print(f"{case.full_name}: {time.monotonic() - started:.0f} s", flush=True)

    def run(self, work: Path, verb: str, settings: list[str]) -> None:
        """Run a command of the package in a folder, which keeps its log.

        Raises:
            CommandFailed: it ended with an error.
        """
        command = [sys.executable, "-m", "minitron_megatron.cli", verb, *settings]
        path = work / f"{verb}.log"
        with open(path, "w") as log:
            status = subprocess.run(command, cwd=work, env=self.environment, stdout=log, stderr=log).returncode
        if status:
            end = "\n".join(path.read_text().splitlines()[-15:])
            raise CommandFailed(f"{verb} {' '.join(settings)}\nended with status {status}, see {path}:\n{end}")

    def path(self, name: str) -> Path:
        """The file of a case."""
        return self.folder / f"{name}.json"

    def write(self, name: str, columns: dict[str, Facts]) -> None:
        """Write the file of a case."""
        path = self.path(name)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"made_with": self.made_with, "columns": columns}, indent=1) + "\n")


def made_with(checkout: Path) -> dict[str, str]:
    """The version of the package, and what else the last bits of a sum depend on."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12"]
    found = {"package": subprocess.run(command, capture_output=True, text=True).stdout.strip()}
    found |= {name: version(name) for name in ("torch", "megatron-core", "transformers")}
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")
    instructions = torch.backends.cpu.get_cpu_capability()
    return found | {"python": platform.python_version(), "processor": f"{processor} with {instructions}"}


# What is recorded.


def fact_of_tensor(tensor: torch.Tensor) -> Facts:
    """What identifies a tensor, and its norm, which shows by how much it differs from another one."""
    data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    norm = float(np.sqrt(np.nansum(np.square(tensor.double().numpy()))))
    dtype = str(tensor.dtype).removeprefix("torch.")
    return {"dtype": dtype, "shape": list(tensor.shape), "norm": norm, "sha256": hashlib.sha256(data).hexdigest()}


def facts_of_tensors(tensors: dict[str, torch.Tensor]) -> Facts:
    return {name: fact_of_tensor(tensors[name]) for name in sorted(tensors)}


def checkpoint_tensors(root: Path) -> Facts:
    """The tensors of a checkpoint, as torch reads them."""
    folder = root / "release"
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(tensor.size, dtype=tensor.properties.dtype)
        for key, tensor in stored.items()
        if isinstance(tensor, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # neither available nor initialised
        dcp.load(tensors, checkpoint_id=folder)
    return facts_of_tensors(tensors)


def plan(work: Path) -> Facts:
    """Kept indices; not how the plan describes the network that they are of, nor which checkpoint that is."""
    values = json.loads((work / "pruned/plan.json").read_text())
    rows = {f"sublayer {row['position']}": row for row in values["sublayers"]}
    return {"hidden": values["hidden"], "order": [row["position"] for row in values["sublayers"]]} | rows


def metrics(work: Path, prefix: str) -> Facts:
    lines = map(json.loads, (work / "distilled/metrics.jsonl").read_text().splitlines())
    return {
        f"step {number}, {name}": value
        for number, line in enumerate(lines, start=1)
        for name, value in line.items()
        if name.startswith(prefix)
    }


def evaluation(work: Path) -> Facts:
    """What was measured, without times and paths."""
    values = json.loads((work / "evaluation/evaluation.json").read_text())
    facts = {name: value for name, value in values.items() if name.startswith("parameters")}
    facts |= {f"heldout {name}": value for name, value in values["heldout"].items()}
    return facts | {name: values["generation"][name] for name in ("prompt", "text")}


def exported_weights(work: Path) -> Facts:
    tensors = {}
    for path in (work / "exported").glob("*.safetensors"):
        tensors |= load_file(path)
    return facts_of_tensors(tensors)


READERS: dict[str, dict[str, Callable[[Path], Facts]]] = {
    "score": {"scores": lambda work: facts_of_tensors(load_file(work / "scores/scores.safetensors"))},
    "prune": {"plan": plan, "checkpoint tensors": lambda work: checkpoint_tensors(work / "pruned")},
    "distill": {
        "losses": lambda work: metrics(work, "loss/"),
        "gradient norms": lambda work: metrics(work, "optim/grad_norm"),
    },
    "evaluate": {"evaluation": evaluation},
    "export": {
        "exported weights": exported_weights,
        "exported config": lambda work: json.loads((work / "exported/config.json").read_text()),
    },
}


def is_named(name: str, only: list[str] | None) -> bool:
    """Whether a case is asked for, by its name or its network's."""
    return not only or name in only or name.split("/")[0] in only


def record(folder: Path, checkout: Path, only: list[str] | None) -> int:
    """Run the cases and write the record. Returns the exit status."""
    every = list(all_cases())
    cases = [case for case in every if is_named(case.full_name, only)]
    if not cases:
        print(f"--only {only} names no case: there are {', '.join(case.full_name for case in every)}")
        return 2
    recorder = Recorder(folder, checkout)
    for case in cases:
        recorder.path(case.full_name).unlink(missing_ok=True)  # of an older record
    sources = make_inputs(recorder.inputs)
    networks = list(dict.fromkeys(case.network for case in cases))
    failed, started = False, time.monotonic()
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(recorder.import_network, networks, [sources[network] for network in networks]))
        for case, result in [(case, pool.submit(recorder.run_case, case)) for case in cases]:
            try:
                result.result()
            except CommandFailed as error:
                failed = True
                print(f"{case.full_name}: {error}", flush=True)
    if not failed:
        shutil.rmtree(recorder.work)
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(
        f"{(time.monotonic() - started) / 60:.0f} min, {(used.ru_utime + used.ru_stime) / 60:.0f} min of all processors"
    )
    return int(failed)


# What is compared.


def read_record(folder: Path, only: list[str] | None) -> dict[str, dict[str, Any]]:
    """The cases of a record, by name."""
    paths = {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.glob("*/*.json"))}
    return {name: json.loads(path.read_text()) for name, path in paths.items() if is_named(name, only)}


def show(fact: Any) -> str:
    if isinstance(fact, dict) and "sha256" in fact:
        return f"{fact['dtype']} {fact['shape']} of norm {fact['norm']!r} ({fact['sha256'][:8]})"
    return "nothing" if fact is None else json.dumps(fact)


def identity(fact: Any) -> str:
    """What is compared of a fact: text, in which every bit of a float counts and a NaN equals itself."""
    if isinstance(fact, dict) and "sha256" in fact:
        fact = {name: value for name, value in fact.items() if name != "norm"}
    return json.dumps(fact, sort_keys=True)


def differences(before: Facts | None, after: Facts | None) -> dict[str, str]:
    """What differs in a cell, by name."""
    before, after = before or {}, after or {}
    pairs = {name: (before.get(name), after.get(name)) for name in {**before, **after}}
    return {name: f"{show(a)} became {show(b)}" for name, (a, b) in pairs.items() if identity(a) != identity(b)}


def compare(before: Path, after: Path, only: list[str] | None) -> int:
    """Print a table of what two records have in common. Returns the exit status."""
    records = read_record(before, only), read_record(after, only)
    console = Console(width=None if sys.stdout.isatty() else 180)
    table = Table("case", *COLUMNS)
    details, notes, num_equal = [], set(), 0
    for name in {**records[0], **records[1]}:
        cases = [found.get(name, {"made_with": {}, "columns": {}}) for found in records]
        made = [case["made_with"] for case in cases]
        if all(made):
            notes |= {f"{key}: {made[0][key]} became {made[1][key]}" for key in made[0] if made[0][key] != made[1][key]}
        cells = []
        for column in COLUMNS:
            old, new = (case["columns"].get(column) for case in cases)
            found = differences(old, new)
            first = next(iter(found), None)
            cells.append(first or ("equal" if old else ""))
            num_equal += bool(old and not found)
            if found:
                details.append(f"{name}, {column}: {len(found)} differ; {first}: {found[first]}")
        table.add_row(name, *cells)
    console.print(table)
    for line in [*sorted(notes), *details]:
        console.print(line, markup=False, highlight=False)
    print(f"{num_equal} cells are equal, {len(details)} differ")
    return 1 if details or not num_equal else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording, comparing = commands.add_parser("record"), commands.add_parser("compare")
    recording.add_argument("folder", type=Path, help="gets the record")
    recording.add_argument("--package", type=Path, default=ROOT, help="checkout of the package; default: this one")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    for command in (recording, comparing):
        command.add_argument("--only", nargs="+", metavar="NAME", help="networks and cases; default: all")
    options = parser.parse_args()
    if options.command == "compare":
        if missing := [folder for folder in (options.before, options.after) if not folder.is_dir()]:
            parser.error(f"there is no folder {missing[0]}")
        return compare(options.before, options.after, options.only)
    if not (options.package / "minitron_megatron/cli.py").is_file():
        parser.error(f"--package {options.package} is no checkout of the package")
    try:
        return record(options.folder.resolve(), options.package.resolve(), options.only)
    except CommandFailed as error:
        print(error)
        return 1


if __name__ == "__main__":
    sys.exit(main())
