"""One-shot sparsity and 4 bits on SmolLM2-135M: held-out loss of every method, beside those of a plain trial.

The tokens are fixed, 64 sequences of 512 to calibrate on and 24 held out, so that results do not depend on the Python
whose documentation they are of. The trial was a few hundred lines of torch on a model of transformers, with the same
tokens; its held-out losses are of bf16. The weights come from a 4-bit file, which flatters every 4-bit figure.
"""

import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import (
    RESULTS,
    console,
    describe,
    in_fresh_process,
    machine,
    markdown_table,
    parser,
    print_table,
    write_docs,
    write_results,
)

NAME = "sparse"
TOKENS = Path(__file__).parent / "sparse_tokens.safetensors"
MODEL = "builtin:smollm2-135m"
COLUMNS = ["method", "one pass", "sequential", "trial: one pass", "trial: sequential", "zeros", "broken", "seconds"]
NOT_TRIED = "–"


@dataclass(frozen=True)
class Case:
    """A method.

    Attributes:
        name: in the table.
        verb: that runs it.
        settings: of the verb.
        trial: held-out loss of the trial's one pass, and of its sequential one; None where it had none.
        passes: which of the two are measured here, by `sequential`.
    """

    name: str
    verb: str
    settings: tuple[str, ...]
    trial: tuple[float | None, float | None] = (None, None)
    passes: tuple[bool, ...] = (False, True)


def sparse(
    name: str, method: str, *settings: str, refit: bool, trial: tuple = (None, None), passes: tuple = (False, True)
) -> Case:
    return Case(name, "sparsify", (f"method={method}", f"refit={refit}", *settings), trial, passes)


HALF = ("pattern=unstructured", "sparsity=0.5")
PLAIN, CAPPED = "by_activation=false", "most_norms=4"
INT4 = ("scheme=w4a16", "group_size=64")
CASES = [
    sparse("2:4 magnitude", "magnitude", refit=False, trial=(7.438, None), passes=(False,)),
    sparse("2:4 magnitude, refit", "magnitude", refit=True, trial=(3.648, None)),
    sparse("2:4 Wanda", "wanda", refit=False, trial=(4.153, None)),
    sparse("2:4 Wanda, refit", "wanda", refit=True, trial=(3.245, None)),
    sparse("2:4 SparseGPT", "sparsegpt", PLAIN, refit=False, trial=(3.484, 3.356)),
    sparse("2:4 SparseGPT, refit", "sparsegpt", PLAIN, refit=True, trial=(3.269, 3.174)),
    sparse("2:4 SparseGPT by activation", "sparsegpt", refit=False, trial=(3.300, None)),
    sparse("2:4 SparseGPT by activation, refit", "sparsegpt", refit=True, trial=(3.150, None)),
    sparse("2:4 ALPS", "alps", refit=True, trial=(3.084, 3.065)),
    sparse("50% magnitude", "magnitude", *HALF, refit=False, trial=(5.623, None), passes=(False,)),
    sparse("50% Wanda", "wanda", *HALF, refit=False, trial=(3.171, None)),
    sparse(
        "50% Wanda, shares by error", "wanda", *HALF, "by_error=true", refit=False, trial=(None, None), passes=(False,)
    ),
    sparse("50% Wanda, refit", "wanda", *HALF, refit=True, trial=(2.859, None)),
    sparse("50% SparseGPT", "sparsegpt", PLAIN, *HALF, refit=False, trial=(2.942, None)),
    sparse("50% SparseGPT, refit", "sparsegpt", PLAIN, *HALF, refit=True, trial=(2.878, None)),
    sparse("50% ALPS", "alps", *HALF, refit=True, trial=(None, None)),
    Case("int4, nearest", "quantize", ("method=rtn", "group_size=64"), (2.925, None), (False,)),
    Case("int4, GPTQ", "quantize", ("group_size=64", PLAIN, "most_norms=null"), (2.926, None)),
    Case("int4, GPTQ by activation", "quantize", ("group_size=64", "most_norms=null"), (2.785, 2.774)),
    Case("int4, GPTQ by activation, capped", "quantize", ("group_size=64", CAPPED), (2.737, None)),
    sparse("2:4 and int4, SparseGPT in one pass", "sparsegpt", CAPPED, *INT4, refit=False, trial=(3.476, None)),
    sparse("2:4 and int4, SparseGPT, refit, then GPTQ", "sparsegpt", CAPPED, *INT4, refit=True, trial=(None, None)),
    sparse("2:4 and int4, ALPS, then GPTQ", "alps", *INT4, refit=True, trial=(None, None)),
    sparse("2:4 and int4, ALPS, then GPTQ, capped", "alps", CAPPED, *INT4, refit=True, trial=(None, None)),
]


class Tokens:
    """Sequences as samples."""

    def __init__(self, tokens):
        self.tokens = tokens.long()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict:
        import torch

        own = self.tokens[index]
        return {"tokens": own, "loss_mask": torch.ones(len(own)), "position_ids": torch.arange(len(own))}


def main() -> None:
    options = parser(__doc__, threads=2)
    options.add_argument("--only", nargs="+", help="names of cases to measure again")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts = machine()
    known = RESULTS / f"{NAME}.json"
    before = json.loads(known.read_text())["cases"] if args.only and known.exists() else {}
    model = args.work / "smollm2_fp32"
    if not model.exists():
        in_fresh_process(import_model, model)
    results = {"machine": facts, "dense": in_fresh_process(dense_loss, model, args.threads), "cases": before}
    console.print(f"dense: {results['dense']:.4f}")
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        for sequential in case.passes:
            with console.status(f"{case.name}, {'sequential' if sequential else 'one pass'}"):
                measured = in_fresh_process(measure, model, case, sequential, args.threads)
            results["cases"].setdefault(case.name, {})["sequential" if sequential else "one pass"] = measured
            write_results(NAME, results)
    print_table(f"held-out loss; dense {results['dense']:.3f}", COLUMNS, rows(results))
    console.print(describe(facts))


def import_model(folder: Path) -> None:
    from minitron_megatron.checkpoint.convert import import_checkpoint
    from minitron_megatron.config.schema import DType, ImportConfig

    import_checkpoint(ImportConfig(MODEL, str(folder), DType.FP32))


def dense_loss(model: Path, threads: int) -> float:
    """Loss of the model as it is; transformers' is 2.581 on these tokens."""
    import torch

    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.config.schema import ParallelConfig
    from minitron_megatron.parallel.context import parallel_context

    torch.set_num_threads(threads)
    with parallel_context(ParallelConfig()) as ctx:
        return heldout_loss(Checkpoint(model), ctx)


def measure(model: Path, case: Case, sequential: bool, threads: int) -> dict:
    """Held-out loss, zeros, groups of four with more than two weights, and seconds."""
    import torch
    from safetensors.torch import load_file

    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.config.compose import compose
    from minitron_megatron.config.schema import ParallelConfig
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.sparsity.layerwise import solve
    from minitron_megatron.sparsity.quantize import quantization
    from minitron_megatron.sparsity.sparsify import sparsification

    torch.set_num_threads(threads)
    samples = Tokens(load_file(TOKENS)["calibration"])
    run = [f"sequential={sequential}", "dtype=fp32", f"num_samples={len(samples)}", "output=unused"]
    config = compose(case.verb, [f"checkpoint={model}", *run, *case.settings])
    assert not config.problems()
    checkpoint, work = Checkpoint(model), Path(tempfile.mkdtemp(dir=model.parent))
    try:
        with parallel_context(ParallelConfig()) as ctx:
            task = (sparsification if case.verb == "sparsify" else quantization)(config, checkpoint)
            started = time.perf_counter()
            solved = solve(config, checkpoint, samples if config.needs_text else None, task, work, ctx)
            seconds = time.perf_counter() - started
            zeros, broken = count_zeros(solved, task.chosen)
            return {"loss": heldout_loss(solved, ctx), "zeros": zeros, "broken": broken, "seconds": seconds}
    finally:
        shutil.rmtree(work)


def count_zeros(source, chosen) -> tuple[float, int]:
    """Share of zeros, and number of groups of four with more than two weights."""
    import numpy as np

    zeros = count = broken = 0
    for param in chosen:
        weight = source.read(param, [np.arange(size) for size in param.shape])
        zeros += int((weight == 0).sum())
        count += weight.numel()
        broken += int(((weight != 0).unflatten(1, (-1, 4)).sum(2) > 2).sum())
    return zeros / count, broken


def heldout_loss(source, ctx) -> float:
    """Mean loss over the next tokens of the held-out sequences, in fp32."""
    import torch
    from safetensors.torch import load_file

    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.config.schema import DType
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.schedule import forward_hidden, output_weight

    [model] = build_model(source.network, ctx, DType.FP32)
    load_weights([model], source, ctx)
    total = count = 0
    with torch.no_grad():
        for tokens in load_file(TOKENS)["heldout"].long().split(4):
            positions = torch.arange(tokens.shape[1]).expand(len(tokens), -1)
            hidden = forward_hidden(model.eval(), {"tokens": tokens, "position_ids": positions})
            logits = hidden.transpose(0, 1)[:, :-1].flatten(0, 1) @ output_weight(model).T
            logits = logits[:, : source.network.vocab_size]
            total += float(torch.nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum"))
            count += tokens[:, 1:].numel()
    return total / count


def rows(results: dict) -> list[list[str]]:
    def show(value: float | None) -> str:
        return NOT_TRIED if value is None else f"{value:.3f}"

    table = []
    for case in CASES:
        if not (own := results["cases"].get(case.name)):
            continue
        losses = [own.get(name, {}).get("loss") for name in ("one pass", "sequential")]
        one = next(iter(own.values()))
        is_2_of_4 = case.name.startswith("2:4")
        table.append(
            [
                case.name,
                *map(show, losses),
                *map(show, case.trial),
                f"{100 * one['zeros']:.1f}%",
                f"{max(each['broken'] for each in own.values()):,}" if is_2_of_4 else NOT_TRIED,
                f"{max(each['seconds'] for each in own.values()):.0f}",
            ]
        )
    return table


def in_markdown(results: dict) -> str:
    table = markdown_table(COLUMNS, rows(results))
    return f"{table}\n\nThe dense model has {results['dense']:.3f}. {describe(results['machine'])}"


if __name__ == "__main__":
    main()
