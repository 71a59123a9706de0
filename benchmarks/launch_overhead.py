"""What `minitron launch` adds to a bare srun, from the command to the first step of training.

A real Slurm of two nodes on this machine, without GPUs: the same training, of a tiny model on two nodes with two ranks
each, is started by a batch script that holds nothing but the srun, and by `minitron launch` with and without its check
of the nodes. In turn, several times.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import (
    console,
    describe,
    machine,
    markdown_table,
    parser,
    print_table,
    show_spread,
    spread,
    write_docs,
    write_results,
)

ROOT = Path(__file__).parent.parent
NAME = "launch_overhead"
CASES = ["bare srun", "minitron launch, no preflight", "minitron launch"]
COLUMNS = [
    "started by",
    "until submitted, s",
    "until the job starts, s",
    "until the first step, s",
    "more than bare, s",
]
MINITRON = [sys.executable, "-m", "minitron_megatron.cli"]


def main() -> None:
    args = parser(__doc__, repeats=3).parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    sys.path.insert(0, str(ROOT))
    from tests.launch.cluster import missing_programs, slurm
    from tests.tiny import tiny_inputs

    if missing := missing_programs():
        sys.exit(f"{', '.join(missing)} not installed: apt-get install slurm-wlm munge")
    facts = machine()
    found: dict[str, list[dict]] = {name: [] for name in CASES}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "slurm").mkdir()
        (work / "inputs").mkdir()
        inputs = tiny_inputs(work / "inputs")
        with slurm(work / "slurm") as variables:
            environment = {**os.environ, **variables, "PYTHONPATH": str(ROOT)}
            for repeat in range(args.repeats + 1):  # the first one tokenises, and warms the disk
                for name in CASES:
                    times = _first_step(
                        name, inputs, work / f"{repeat}" / name.replace(",", "").replace(" ", "_"), environment
                    )
                    console.print(f"{name}: {times}")
                    if repeat:
                        found[name].append(times)
    results = {
        "machine": facts,
        "settings": {"repeats": args.repeats},
        "cases": {
            name: {key: spread([times[key] for times in of_case]) for key in of_case[0]}
            for name, of_case in found.items()
        },
    }
    write_results(NAME, results)
    print_table(NAME, COLUMNS, rows(results))
    console.print(describe(facts))


def _first_step(name: str, inputs: Path, folder: Path, environment: dict) -> dict[str, float]:
    """Seconds from the command to the first line of metrics, and on the way."""
    folder.mkdir(parents=True)
    teacher, output = inputs.parent / "teacher", folder / "out"
    imported = [*MINITRON, "import", f"source={inputs / 'source'}", f"output={teacher}"]
    subprocess.run(imported, env=environment, cwd=ROOT, capture_output=True, check=True)
    training = [
        *("distill", f"teacher={teacher}", f"student={teacher}", f"output={output}", "steps=2", "save_every=null"),
        *(f"data={{text:[{inputs / 'text.jsonl'}],cache_dir:{inputs.parent / 'corpora'},sequence_length:16}}",),
        *("dtype=fp32", "optimizer.warmup_steps=1", "parallel={tensor:2,pipeline:2}"),
    ]
    if name == CASES[0]:
        script = folder / "bare.sh"
        command = " ".join(f"'{part}'" for part in [*MINITRON, *training])
        script.write_text(
            f"#!/bin/bash\nexport OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1 MASTER_ADDR=127.0.0.1\n"
            f"date +%s.%N > {folder}/began\nsrun --ntasks=4 --ntasks-per-node=2 {command}\n"
        )
        start = ["sbatch", "--parsable", "--nodes=2", "--ntasks-per-node=2", f"--output={folder}/log", str(script)]
    else:
        cluster = ["cluster=slurm", "cluster.nodes=null", "cluster.ranks_per_node=2", "cluster.gpus_per_node=0"]
        cluster += ["cluster.gpu=null", "cluster.cpus_per_rank=null", "cluster.memory=null"]
        start = [*MINITRON, "launch", *training, *cluster, f"cluster.preflight={str(name == CASES[2]).lower()}"]
    started = time.time()
    done = subprocess.run(start, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    submitted = time.time()
    metrics = output / "metrics.jsonl"
    while not (metrics.is_file() and metrics.stat().st_size):
        if time.time() > started + 300:
            sys.exit(f"no step within 300 seconds: see {folder}")
        time.sleep(0.02)
    first_step = time.time()
    if name == CASES[0]:
        began = float((folder / "began").read_text())
    else:
        [log] = (folder / "out.launch" / "launch").glob("*.state")
        began = log.stat().st_mtime
    while subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True).stdout:
        time.sleep(0.2)
    return {"submitted": submitted - started, "began": began - started, "first_step": first_step - started}


def rows(results: dict) -> list[list[str]]:
    bare = results["cases"][CASES[0]]["first_step"]["median"]
    return [
        [
            name,
            *(show_spread(found[key], 1) for key in ("submitted", "began", "first_step")),
            f"{found['first_step']['median'] - bare:.1f}",
        ]
        for name, found in results["cases"].items()
    ]


def in_markdown(results: dict) -> str:
    table, repeats = markdown_table(COLUMNS, rows(results)), results["settings"]["repeats"]
    return (
        f"{table}\n\nMedian (least-largest) of {repeats} repeats. "
        f"Ranks share {os.cpu_count()} cores with the nodes' checks and Slurm. {describe(results['machine'])}"
    )


if __name__ == "__main__":
    main()
