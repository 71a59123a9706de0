"""Scoring: what does it cost beside the forward pass that it needs anyway?

The same sequences go through SmolLM2-135M without being watched, with everything scored that one pass can give
(channels, neurons, heads, Block Influence) by each aggregation over a sequence, and with every layer left out once and
the predictions compared, for which what comes before a layer is computed once.
"""

import time
from functools import partial

from common import (
    console,
    describe,
    in_fresh_process,
    machine,
    markdown_table,
    parser,
    prepare_models,
    print_table,
    show_spread,
    spread,
    synchronize,
    write_docs,
    write_results,
)

NAME = "score_overhead"
MAX_PASSES = 1.2
BARE, SCORED, LEFT_OUT = "forward pass", "scored, {} over tokens", "every layer left out once"
COLUMNS = ["", "seconds", "forward passes"]


def main() -> None:
    options = parser(__doc__, repeats=5, threads=2)
    options.add_argument("--samples", type=int, default=16, help="sequences of 512 tokens")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts = machine()
    models = prepare_models(args.work)
    seconds = in_fresh_process(measure, models.teacher, models.recipe["scores"].data, args)
    bare = spread(seconds[BARE])["median"]
    cases = {
        name: {"seconds": spread(found), "passes": spread([s / bare for s in found])} for name, found in seconds.items()
    }
    results = {"machine": facts, "settings": {"samples": args.samples, "repeats": args.repeats}, "cases": cases}
    write_results(NAME, results)
    print_table(f"{args.samples} sequences of 512 tokens: median (least-largest)", COLUMNS, rows(results))
    console.print(describe(facts))
    console.print(verdict(results))


def measure(teacher, data, args) -> dict[str, list[float]]:
    """Seconds of every case, each repeat running them in turn."""
    import torch

    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.config.schema import (
        Aggregation,
        Criterion,
        DepthConfig,
        DepthCriterion,
        DType,
        ParallelConfig,
        ScoreConfig,
    )
    from minitron_megatron.data.samples import rank_batches, training_samples
    from minitron_megatron.data.tokens import prepare_corpus
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.parallel.schedule import run_forward, to_device
    from minitron_megatron.pruning.score_model import score_model

    torch.set_num_threads(args.threads)
    checkpoint = Checkpoint(teacher)
    corpus = prepare_corpus(data, checkpoint.huggingface_folder)
    with parallel_context(ParallelConfig()) as ctx:
        model_chunks = build_model(checkpoint.network, ctx, DType.BF16)
        load_weights(model_chunks, checkpoint, ctx)
        samples = training_samples(corpus, data, args.samples)
        every_layer = DepthConfig(criteria=[DepthCriterion.KL])

        def bare():
            for batch in rank_batches(samples, 0, args.samples, 4, 0, 1):
                run_forward(model_chunks, to_device([batch], ctx.device), ctx, on_output=lambda output, batch: None)

        def scored(**settings):
            config = ScoreConfig(num_samples=args.samples, micro_batch=4, **settings)
            score_model(model_chunks, checkpoint.network, ctx, samples, config)

        ways = {BARE: bare}
        ways |= {SCORED.format(how.value): partial(scored, sequence_aggregation=how) for how in Aggregation}
        ways[LEFT_OUT] = partial(scored, criterion=Criterion.RANDOM, depth=every_layer)
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        bare()
        for _ in range(args.repeats):
            for name, way in ways.items():
                synchronize()
                started = time.perf_counter()
                way()
                synchronize()
                seconds[name].append(time.perf_counter() - started)
    return seconds


def rows(results: dict) -> list[list[str]]:
    return [
        [name, show_spread(found["seconds"], 2), show_spread(found["passes"], 2)]
        for name, found in results["cases"].items()
    ]


def verdict(results: dict) -> str:
    found = {name: case["passes"]["median"] for name, case in results["cases"].items() if name not in (BARE, LEFT_OUT)}
    shown = ", ".join(f"{name}: {passes:.2f}" for name, passes in found.items())
    reached = "reached" if max(found.values()) <= MAX_PASSES else "not reached"
    return f"{shown} bare passes; goal of at most {MAX_PASSES}: {reached}."


def in_markdown(results: dict) -> str:
    asked = results["settings"]
    table = markdown_table(COLUMNS, rows(results))
    return (
        f"{table}\n\n- {verdict(results)}\n\n{asked['samples']} sequences of 512 tokens, {asked['repeats']} "
        f"repeats: median (least-largest). {describe(results['machine'])}"
    )


if __name__ == "__main__":
    main()
