"""A training step of a network whose layers have sizes of their own, beside one of equal FLOPs whose layers are alike.

Two networks of SmolLM2-135M's kind with random weights: in one every MLP has the same number of neurons, in the other
the same number on average, between a third and five thirds of it, and query heads between half and all in some layers.
Both are trained for a few steps of cross-entropy, in turns, so that what slows the machine hits both.
"""

import statistics
from collections.abc import Iterator

from common import (
    Stopwatch,
    console,
    describe,
    machine,
    markdown_table,
    memory_gib,
    parser,
    print_table,
    run_in_turn,
    show_spread,
    spread,
    write_docs,
    write_results,
)

NAME = "unlike_layers"
COLUMNS = ["layers", "s a step", "times the step of layers alike", "peak memory, GiB"]
LENGTH, BATCH, STEPS, WARMUP = 256, 4, 8, 2
UNIFORM, UNLIKE, HYBRID = "layers alike", "layers of their own sizes", "the same, by HybridModel"
MAX_SHARE = 1.05


def networks():
    """The uniform network, and one of unlike layers that takes as many operations."""
    import dataclasses

    from minitron_megatron.model.layers import DENSE
    from minitron_megatron.model.network import Network, transformer

    attention, mlp = (kind for kind in DENSE)
    own = attention(num_heads=9, num_query_groups=3, head_dim=64)
    common = dict(hidden_size=576, vocab_size=8192, padded_vocab_size=8192)
    sublayers = []
    for number in range(12):
        share = 1 + 2 * ((number % 6) - 2.5) / 7.5  # 1/3 to 5/3, 1 on average
        sublayers.append(dataclasses.replace(own, num_heads=(9, 6)[number % 2]))
        sublayers.append(mlp(ffn_hidden_size=round(1536 * share / 64) * 64))
    unlike = Network(tuple(sublayers), **common)
    alike = Network(transformer(12, [own, mlp(ffn_hidden_size=1536)]), **common)
    return alike, _as_many_operations(alike, unlike)


def _as_many_operations(alike, unlike):
    """The network of unlike layers with its MLPs scaled until it takes as many operations as the other, or nearly."""
    import dataclasses

    from minitron_megatron.model.count import forward_flops_per_token

    wanted, best = forward_flops_per_token(alike, LENGTH), unlike
    for percent in range(90, 140):
        sublayers = tuple(
            dataclasses.replace(one, ffn_hidden_size=round(one.ffn_hidden_size * percent / 100 / 16) * 16)
            if hasattr(one, "ffn_hidden_size")
            else one
            for one in unlike.sublayers
        )
        scaled = unlike.replace(sublayers=sublayers)
        if abs(forward_flops_per_token(scaled, LENGTH) - wanted) < abs(forward_flops_per_token(best, LENGTH) - wanted):
            best = scaled
    return best


def train(name: str, args) -> Iterator[dict]:
    """Steps of one network."""
    import torch

    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.checkpoint.random_weights import RandomWeights
    from minitron_megatron.config.parallel import Builder
    from minitron_megatron.config.schema import DType, LossConfig, OptimizerConfig, ParallelConfig
    from minitron_megatron.distillation.entries import loss_entries
    from minitron_megatron.distillation.step import DistillationStep
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.training.optimizer import setup_optimizer

    torch.set_num_threads(args.threads)
    alike, unlike = networks()
    network = alike if name == UNIFORM else unlike
    builder = Builder.HYBRID if name == HYBRID else Builder.GPT
    with parallel_context(ParallelConfig(builder=builder)) as ctx:
        model_chunks = build_model(network, ctx, DType.BF16)
        load_weights(model_chunks, RandomWeights(network, 0), ctx)
        model = setup_optimizer(model_chunks, OptimizerConfig(warmup_steps=1), 100, DType.BF16, ctx)
        step = DistillationStep(model.model_chunks, loss_entries(LossConfig(0.0, 1.0)), ctx, network.vocab_size)
        generator = torch.Generator().manual_seed(1)
        for number in range(WARMUP + STEPS):
            window = torch.randint(0, network.vocab_size, (BATCH, LENGTH + 1), generator=generator)
            batch = {
                "tokens": window[:, :-1],
                "labels": window[:, 1:],
                "loss_mask": torch.ones(BATCH, LENGTH),
                "position_ids": torch.arange(LENGTH).expand(BATCH, -1),
            }
            batch = {key: value.to(ctx.device) for key, value in batch.items()}
            watch = Stopwatch()
            with watch:
                model.zero_grad()
                step.train([batch])
                model.grad_norm()
                model.step()
            if number >= WARMUP:
                yield {"seconds": watch.seconds[0], **memory_gib()}


def _alike(args) -> Iterator[dict]:
    yield from train(UNIFORM, args)


def _unlike(args) -> Iterator[dict]:
    yield from train(UNLIKE, args)


def _hybrid(args) -> Iterator[dict]:
    yield from train(HYBRID, args)


_CASES = {UNIFORM: _alike, UNLIKE: _unlike, HYBRID: _hybrid}


def main() -> None:
    args = parser(__doc__, repeats=3, threads=2).parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts = machine()
    steps = run_in_turn(_CASES, args.repeats, args)
    cases = {}
    for name, repeats in steps.items():
        own = [step["seconds"] for repeat in repeats for step in repeat]
        base = [step["seconds"] for repeat in steps[UNIFORM] for step in repeat]
        cases[name] = {
            "seconds": spread(own),
            # Each step beside the other network's of the same round.
            "share": spread([one / other for one, other in zip(own, base, strict=True)]),
            "peak_gib": statistics.median(repeat[-1]["peak_gib"] for repeat in repeats),
        }
    results = {"machine": facts, "settings": {"repeats": args.repeats, "steps": STEPS}, "cases": cases}
    write_results(NAME, results)
    print_table("A training step of layers of their own sizes", COLUMNS, rows(results))
    console.print(verdict(results))
    console.print(describe(facts))


def rows(results: dict) -> list[list[str]]:
    return [
        [name, show_spread(case["seconds"], 2), show_spread(case["share"], 3), f"{case['peak_gib']:.2f}"]
        for name, case in results["cases"].items()
    ]


def verdict(results: dict) -> str:
    share = results["cases"][UNLIKE]["share"]["median"]
    reached = "reached" if share <= MAX_SHARE else "not reached"
    return f"{share:.3f} times the step of a uniform network of equal FLOPs; goal of at most {MAX_SHARE}: {reached}."


def in_markdown(results: dict) -> str:
    asked = results["settings"]
    return (
        f"{markdown_table(COLUMNS, rows(results))}\n\n- {verdict(results)}\n\n{asked['repeats']} repeats of "
        f"{asked['steps']} steps, in turns: median (least-largest). {describe(results['machine'])}"
    )


if __name__ == "__main__":
    main()
