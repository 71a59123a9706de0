"""Sparsifying a model of Llama 3.1 8B's network: seconds a layer and memory, beside llm-compressor.

Every matrix of the layers becomes 2:4 by SparseGPT, each layer calibrated on the outputs of the sparse ones before it,
on the same random tokens. The model is as wide as Llama 3.1 8B, has fewer layers, and random weights in bf16. `minitron
sparsify` goes from a checkpoint to a checkpoint on the disk; llm-compressor from a Hugging Face folder of the same
weights to its model in memory. The seconds of a layer are those that the deeper model takes more, by layer: what a run
takes once counts in none. Memory is the largest resident set of the process: packages, all that it allocates, and pages
of the files that it maps. llm-compressor has an interpreter of its own, which `LLM_COMPRESSOR_PYTHON` names.
"""

import json
import os
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
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
from large import RandomModel, cold, in_ranks, require_disk, write_assets

NAME = "sparse_large"
OURS, THEIRS = "minitron_megatron", "llm-compressor"
SAMPLES, LENGTH = 16, 512
RECIPE = dict(sparsity=0.5, mask_structure="2:4", dampening_frac=0.01, targets=["Linear"], ignore=["re:.*lm_head"])
MAX_MEMORY, MAX_TIME, MAX_GROWTH = 0.5, 1.0, 1.05
LEAST_FREE_GB = 20
COMPRESS = Path(__file__).parent.parent / "tests" / "outside" / "compress.py"
COLUMNS = ["by", "layers", "seconds", "seconds a layer", "peak GB", "ours: time a layer", "ours: memory"]


@dataclass
class Case:
    """A model of some depth.

    Attributes:
        folder: with the model twice, as `huggingface` and as `checkpoint`.
        settings: of `sparsify`.
        tokens: the calibration set, `[sequences][tokens]`.
    """

    folder: Path
    settings: object
    tokens: list[list[int]]


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--layers", type=int, nargs=2, default=[4, 8], help="of the two models; 1 2 for a quick look")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of all processes that are started from here
    facts, interpreter = machine(), os.environ.get("LLM_COMPRESSOR_PYTHON")
    if interpreter is None:
        console.print("LLM_COMPRESSOR_PYTHON names no interpreter that has llm-compressor: its rows are left out")
    else:
        facts["versions"] |= versions_of(interpreter)
    args.work.mkdir(parents=True, exist_ok=True)
    results = {"machine": facts, "threads": args.threads, "runs": {OURS: {}, THEIRS: {}}}
    with tempfile.TemporaryDirectory(dir=args.work) as folder:
        cases = {layers: in_fresh_process(make_case, Path(folder), layers) for layers in args.layers}
        for repeat in range(args.repeats):
            for layers, case in cases.items():
                for tool in (OURS, THEIRS) if interpreter else (OURS,):
                    with (
                        console.status(f"{tool}, {layers} layers, repeat {repeat + 1} of {args.repeats}"),
                        cold(case.folder, case.folder / "result"),
                    ):
                        found = sparsify(case) if tool == OURS else compress(case, interpreter, args.threads)
                    results["runs"][tool].setdefault(str(layers), []).append(found)
                    write_results(NAME, results)
    print_table("2:4 by SparseGPT at Llama 3.1 8B's width", COLUMNS, rows(results))
    console.print(describe(facts))
    for line in verdict(results):
        console.print(line)


def make_case(work: Path, layers: int) -> Case:
    """Write a model and random tokens."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    from minitron_megatron.artifacts.manifest import Manifest
    from minitron_megatron.checkpoint.convert import import_checkpoint
    from minitron_megatron.checkpoint.huggingface import write_huggingface
    from minitron_megatron.config.schema import DataConfig, ImportConfig
    from minitron_megatron.config.sparsify import SparsifyConfig, SparsifyMethod
    from minitron_megatron.data.samples import training_samples
    from minitron_megatron.data.tokens import prepare_corpus
    from minitron_megatron.model.count import num_parameters

    model, folder = RandomModel(layers), work / f"{layers}_layers"
    require_disk(work, 3 * 2 * num_parameters(model.network), LEAST_FREE_GB)
    folder.mkdir()
    vocabulary = model.network.vocab_size
    assets = write_assets(folder / "assets", (f"w{number}" for number in range(1, vocabulary)))
    write_huggingface(folder / "huggingface", model, assets, 5e9, Manifest("huggingface"), "")
    import_checkpoint(ImportConfig(str(folder / "huggingface"), str(folder / "checkpoint")))
    corpus = IndexedDatasetBuilder(str(folder / "tokens.bin"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(2 * SAMPLES):
        tokens = torch.randint(1, vocabulary, (LENGTH,), generator=generator)
        tokens[-1] = 0  # the end of a document
        corpus.add_document(tokens, [LENGTH])
    corpus.finalize(str(folder / "tokens.idx"))
    data = DataConfig([str(folder / "tokens")], str(folder / "corpora"), LENGTH)
    settings = SparsifyConfig(
        str(folder / "checkpoint"),
        str(folder / "result"),
        num_samples=SAMPLES,
        micro_batch=1,  # as llm-compressor's
        method=SparsifyMethod.SPARSEGPT,
        refit=False,
        by_activation=False,
        data=data,
    )
    samples = training_samples(prepare_corpus(data, assets), data, SAMPLES)
    return Case(folder, settings, [samples[number]["tokens"].tolist() for number in range(SAMPLES)])


def sparsify(case: Case) -> dict:
    [rank] = in_ranks(1, "sparsify", case.settings)
    return rank


def compress(case: Case, interpreter: str, threads: int) -> dict:
    """Let llm-compressor do the same, in a new process of its interpreter."""
    output = case.folder / "result"
    output.mkdir()
    asked = {
        "folder": str(case.folder / "huggingface"),
        "tokens": case.tokens,
        "recipes": {"sparsegpt": ["SparseGPTModifier", RECIPE, True]},
        "dtype": "bfloat16",
        "threads": threads,
    }
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [interpreter, COMPRESS, output]
    subprocess.run(command, input=json.dumps(asked), text=True, env=environment, check=True)
    return json.loads((output / "sparsegpt.json").read_text())


def versions_of(interpreter: str) -> dict[str, str]:
    """Versions of llm-compressor and what it runs on, as `PACKAGE (llm-compressor's)`."""
    code = "import json; from importlib.metadata import version as v; print(json.dumps({p: v(p) for p in %r}))"
    packages = ["llmcompressor", "torch", "transformers"]
    found = json.loads(subprocess.run([interpreter, "-c", code % packages], capture_output=True, check=True).stdout)
    return {f"{name} (llm-compressor's)": number for name, number in found.items()}


def seconds_a_layer(runs: dict[str, list[dict]]) -> list[float]:
    """What a layer more takes, by repeat."""
    few, many = sorted(runs, key=int)
    return [
        (deep["seconds"] - shallow["seconds"]) / (int(many) - int(few))
        for shallow, deep in zip(runs[few], runs[many], strict=False)
    ]


def peak_gb(runs: list[dict]) -> float:
    return max(run["peak_gb"] for run in runs)


def rows(results: dict) -> list[list[str]]:
    ours, table = results["runs"][OURS], []
    for tool, runs in results["runs"].items():
        for layers, own in runs.items():
            is_other = tool != OURS
            per_layer = seconds_a_layer(runs)
            time = statistics.median(seconds_a_layer(ours)) / statistics.median(per_layer)
            memory = peak_gb(ours[layers]) / peak_gb(own)
            table.append(
                [
                    tool,
                    layers,
                    show_spread(spread([run["seconds"] for run in own]), 0),
                    show_spread(spread(per_layer), 1),
                    f"{peak_gb(own):.2f}",
                    f"{time:.2f}" if is_other else "–",
                    f"{memory:.2f}" if is_other else "–",
                ]
            )
    return table


def verdict(results: dict) -> list[str]:
    """Whether the goals are reached."""
    ours, theirs = results["runs"][OURS], results["runs"][THEIRS]
    few, many = sorted(ours, key=int)

    def goal(what: str, value: float, most: float) -> str:
        return f"{what}: {value:.2f}; goal of at most {most}: {'' if value <= most else 'not '}reached."

    growth = peak_gb(ours[many]) / peak_gb(ours[few])
    lines = [goal(f"Memory with {many} layers, of that with {few}", growth, MAX_GROWTH)]
    for layers in theirs:
        memory = peak_gb(ours[layers]) / peak_gb(theirs[layers])
        lines.append(goal(f"Memory with {layers} layers, of {THEIRS}'s", memory, MAX_MEMORY))
    if theirs:
        time = statistics.median(seconds_a_layer(ours)) / statistics.median(seconds_a_layer(theirs))
        lines.append(goal(f"Seconds a layer, of {THEIRS}'s", time, MAX_TIME))
    return lines


def in_markdown(results: dict) -> str:
    repeats = len(next(iter(results["runs"][OURS].values())))
    lines = "\n".join(f"- {line}" for line in verdict(results))
    how = (
        f"{SAMPLES} sequences of {LENGTH} tokens, {results['threads']} threads, {repeats} repeats: median "
        f"(least-largest). {describe(results['machine'])}"
    )
    return "\n\n".join([markdown_table(COLUMNS, rows(results)), lines, how])


if __name__ == "__main__":
    main()
