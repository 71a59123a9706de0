"""Kills processes of running trainings, one at a time, and proves that nothing is lost and nothing stays.

    python tests/kills.py FOLDER [--kills 100] [--seed 0] [--layout tp2 dp2]

In each layout a training run is started by the command line and one of its processes is killed by SIGKILL at a moment
drawn by chance: a rank, a helper of one (a writer of a checkpoint, say), the launcher's agent, or the command itself.
Within a minute every other process has to be gone, and the command may not report success. Then the same command
is given again, and so on. The run that is left to its end has to have every figure and tensor of a run that nobody
killed, to the bit. FOLDER gets the table as JSON; exits 1 if anything was otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from minitron_megatron.checkpoint.dist_reader import Checkpoint  # noqa: E402
from minitron_megatron.model.parameters import layer_key, parameters  # noqa: E402
from tests.tiny import LLAMA, hf_model, import_hf, literate  # noqa: E402

STEPS, SAVE_EVERY = 240, 4
LAYOUTS = {
    "tp2": ["parallel.tensor=2", "parallel.sequence=true"],
    "dp2": ["parallel.data=2", "optimizer.distributed=true"],
}
GONE_WITHIN_S = 60.0
NOT_EXACT = ("time/", "throughput/", "memory/")
SETTINGS = [
    f"steps={STEPS}",
    f"save_every={SAVE_EVERY}",
    "validate_every=60",
    "validate_batches=1",
    "global_batch=8",
    "micro_batch=2",
    "dtype=fp32",
    "loss.lm_weight=0.3",
    "optimizer.lr=1e-2",
    "optimizer.warmup_steps=2",
    "data.sequence_length=32",
]


@dataclass
class Kill:
    """What a kill did.

    Attributes:
        layout: of the run.
        victim: which process was killed: `command`, `agent`, `rank N`, or `helper of` one of them.
        seconds: since the start of the command.
        step: the last one in the metrics, when it was killed.
        gone_s: until every process was gone; None if some stayed.
        status: of the command; None where it was killed itself.
        said: the last line of its log.
        problems: what was otherwise than it has to be.
    """

    layout: str
    victim: str
    seconds: float
    step: int
    gone_s: float | None
    status: int | None
    said: str
    problems: list[str]


def make_inputs(folder: Path) -> None:
    """A teacher, a student and a text."""
    import_hf(folder / "teacher", literate(hf_model(**LLAMA)))
    import_hf(folder / "student", hf_model(seed=1, **{**LLAMA, "num_hidden_layers": 3, "intermediate_size": 30}))
    generator = np.random.default_rng(0)
    documents = ("".join(generator.choice(list("abcdefgh"), 300)) for _ in range(100))
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))


def start(inputs: Path, output: Path, layout: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "minitron_megatron.cli", "distill", *SETTINGS, *LAYOUTS[layout]]
    command += [f"teacher={inputs}/teacher/checkpoint", f"student={inputs}/student/checkpoint", f"output={output}"]
    command += [f"data.text=[{inputs}/text.jsonl]", f"data.cache_dir={inputs}/corpora"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(output.with_suffix(".log"), "a") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, cwd=output.parent, start_new_session=True
        )


def processes_of(command: psutil.Process) -> dict[psutil.Process, str]:
    """Every process of a run, and what it is."""
    names = {command: "command"}
    try:
        for process in command.children(recursive=True):
            parent = names.get(process.parent(), "?")
            line = process.cmdline()
            if "minitron_megatron.launch.agent" in line:
                names[process] = "agent"
            elif parent == "agent" and "minitron_megatron.cli" in line:
                names[process] = f"rank {process.environ().get('RANK', '?')}"
            else:
                names[process] = parent if parent.startswith("helper") else f"helper of {parent}"
    except psutil.Error:  # one has just ended; the others are enough
        pass
    return names


def metrics(output: Path) -> list[dict]:
    path = output / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def kill_one(inputs: Path, output: Path, layout: str, chance: random.Random, longest: float) -> Kill | int:
    """Start a run, kill one of its processes and see what comes of it; its status if the run ended before."""
    command = start(inputs, output, layout)
    # What was killed goes on, and has less to do than a whole run.
    root, started, delay = psutil.Process(command.pid), time.monotonic(), chance.uniform(1.0, longest / 2)
    # Half of the moments are those in which a checkpoint is written.
    at_save, saving = chance.random() < 0.5, output / "checkpoints"
    while time.monotonic() - started < delay or (at_save and not list(saving.glob(".*.partial"))):
        if (status := command.poll()) is not None:
            return status
        time.sleep(0.005)
    processes = processes_of(root)
    kinds = sorted({name.split(" ")[0] for name in processes.values()})
    kind = chance.choice(kinds)
    victim = chance.choice([process for process, name in processes.items() if name.split(" ")[0] == kind])
    step = int(metrics(output)[-1]["progress/step"]) if metrics(output) else 0
    seconds = time.monotonic() - started
    with contextlib.suppress(psutil.NoSuchProcess):
        victim.kill()
    killed, problems = time.monotonic(), []
    while alive := [p for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]:
        command.poll()
        if time.monotonic() - killed > GONE_WITHIN_S:
            break
        time.sleep(0.05)
    gone = None if alive else time.monotonic() - killed
    if alive:
        problems.append("left after a minute: " + ", ".join(processes[process] for process in alive))
    for process in alive:
        process.kill()
    status = command.wait()
    log = output.with_suffix(".log").read_text().splitlines()
    # A helper may have had nothing left to do.
    if status == 0 and not (output / "DONE").exists():
        problems.append("the command's status was 0, and the run is not done")
    name = processes[victim]
    return Kill(
        layout, name, seconds, step, gone, None if name == "command" else status, log[-1] if log else "", problems
    )


def differences(output: Path, expected: Path) -> list[str]:
    """What of a run is otherwise than in one that nobody killed."""

    def exact(run: Path) -> list[dict]:
        return [{k: v for k, v in line.items() if not k.startswith(NOT_EXACT)} for line in metrics(run)]

    problems = [] if exact(output) == exact(expected) else ["the metrics differ"]
    ours, theirs = Checkpoint(output), Checkpoint(expected)
    for param in parameters(theirs.network):
        index = [np.arange(n) for n in param.shape]
        if not torch.equal(ours.read(param, index), theirs.read(param, index)):
            problems.append(f"{layer_key(param)} differs")
    return problems


def campaign(folder: Path, layout: str, num_kills: int, chance: random.Random) -> tuple[list[Kill], list[str]]:
    """Kill processes of runs in a layout until so many were killed, and let the last run end."""
    expected, output = folder / f"{layout}-unkilled", folder / f"{layout}-killed"
    began = time.monotonic()
    if start(folder, expected, layout).wait():
        raise SystemExit(f"the run that nobody kills failed, see {expected.with_suffix('.log')}")
    longest, kills, problems, round_number = time.monotonic() - began, [], [], 0
    while len(kills) < num_kills:
        kill = kill_one(folder, output, layout, chance, longest)
        if isinstance(kill, Kill):
            kills.append(kill)
            print(f"{layout} {len(kills)}: {kill.victim} at step {kill.step}, gone in {kill.gone_s}", flush=True)
        else:  # it has come to its end: compare, and begin another one
            if kill:
                problems.append(f"a run that was given again failed, see {output.with_suffix('.log')}")
            problems += differences(output, expected)
            round_number += 1
            output = folder / f"{layout}-killed-{round_number}"
    if start(folder, output, layout).wait():
        problems.append(f"the last run failed, see {output.with_suffix('.log')}")
    else:
        problems += differences(output, expected)
    return kills, problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100, help="over all layouts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    args = parser.parse_args()
    folder = args.folder.resolve()
    folder.mkdir(parents=True)
    make_inputs(folder)
    kills, problems = [], []
    for layout in args.layout:
        own, found = campaign(
            folder, layout, -(-args.kills // len(args.layout)), random.Random(f"{args.seed} {layout}")
        )
        kills += own
        problems += [f"{layout}: {problem}" for problem in found]
    table = Counter((kill.layout, kill.victim.split(" ")[0]) for kill in kills)
    for (layout, victim), count in sorted(table.items()):
        own = [kill for kill in kills if (kill.layout, kill.victim.split(" ")[0]) == (layout, victim)]
        slowest = max((kill.gone_s or GONE_WITHIN_S for kill in own), default=0.0)
        print(f"{layout} {victim}: {count} kills, all gone within {slowest:.1f} s")
    problems += [f"{kill.layout}: {kill.victim}: {problem}" for kill in kills for problem in kill.problems]
    values = {"kills": [asdict(kill) for kill in kills], "problems": problems}
    (folder / "kills.json").write_text(json.dumps(values, indent=2) + "\n")
    print("\n".join(problems) or "nothing was lost, and nothing stayed")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
