"""Where the time of one distillation step of ours goes: the models, tokens and settings of distill_step.py."""

import statistics
import time
from pathlib import Path

from common import (
    Models,
    console,
    describe,
    device,
    in_fresh_process,
    machine,
    markdown_table,
    parser,
    prepare_models,
    print_table,
    synchronize,
    write_docs,
    write_results,
)
from distill_step import LENGTH, as_batch, read_tokens, teacher_and_student, write_tokens

NAME = "distill_step_profile"
PHASES = ["phase", "seconds", "share", "TFLOP", "TFLOP/s", "of the peak"]


def main() -> None:
    options = parser(__doc__, threads=2)
    options.add_argument("--steps", type=int, default=8, help="timed steps")
    options.add_argument("--warmup", type=int, default=2, help="steps before those; the first one allocates much")
    options.add_argument("--batch", type=int, default=4, help=f"sequences of {LENGTH} tokens in a step")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts = machine()
    models = prepare_models(args.work)
    tokens = args.work / "distill_step_tokens.pt"
    in_fresh_process(write_tokens, models, tokens, args.warmup + args.steps, args.batch)
    found = {"machine": facts, **in_fresh_process(measure_phases, models, tokens, args.warmup, args.threads)}
    write_results(NAME, found)
    print_table("the phases of a step", PHASES, rows(found))
    console.print(about(found))


def measure_phases(models: Models, tokens: Path, warmup: int, threads: int) -> dict:
    """Median seconds of each phase of a step of ours, the phase's FLOPs, and the peak of a bf16 matrix product."""
    import torch

    torch.set_num_threads(threads)

    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.config.schema import ParallelConfig
    from minitron_megatron.distillation.linear_losses import Predictions, linear_distillation_loss
    from minitron_megatron.model.count import forward_flops_per_token
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.parallel.schedule import forward_hidden, output_weight, run_forward

    networks = {
        name: Checkpoint(folder).network for name, folder in (("teacher", models.teacher), ("student", models.pruned))
    }
    steps = read_tokens(tokens)
    count = len(steps[0]) * LENGTH
    head = {name: 2 * network.padded_vocab_size * network.hidden_size * count for name, network in networks.items()}
    body = {n: forward_flops_per_token(network, LENGTH) * count - head[n] for n, network in networks.items()}
    flops = {
        "teacher forward": body["teacher"],
        "student forward": body["student"],
        # The student's projection has two gradients, of its input and of its weight.
        "loss and its gradients": head["teacher"] + 3 * head["student"],
        "student backward": 2 * body["student"],
        "optimiser": 0,
    }
    seconds: dict[str, list[float]] = {phase: [] for phase in flops}
    with parallel_context(ParallelConfig()) as ctx:
        distillation, live_teacher, trained = teacher_and_student(models, ctx)
        student, teacher = trained.model_chunks[0], live_teacher.model_chunks[0]
        for number, step_tokens in enumerate(steps):
            batch = as_batch(step_tokens)
            labels, mask = (batch[key].transpose(0, 1).flatten() for key in ("labels", "loss_mask"))
            student.train()
            times = [now()]
            [state] = run_forward([teacher], [batch], ctx, on_output=lambda output, batch: output)
            times.append(now())
            output = forward_hidden(student, batch)
            times.append(now())
            loss, _ = linear_distillation_loss(
                output.flatten(0, 1),
                output_weight(student.module),
                labels,
                mask,
                ctx.collection.tp,
                distillation.vocab,
                Predictions(state.flatten(0, 1), output_weight(teacher)),
                kd_weight=1.0,
                lm_weight=0.0,
                chunk_tokens=distillation.chunk_tokens,
            )
            times.append(now())
            (loss / count).backward()
            times.append(now())
            trained.step()
            trained.zero_grad()
            times.append(now())
            if number >= warmup:
                for phase, start, end in zip(seconds, times[:-1], times[1:], strict=True):
                    seconds[phase].append(end - start)
    medians = {phase: statistics.median(s) for phase, s in seconds.items()}
    attention = attention_seconds(networks["teacher"], len(steps[0]))
    return {"seconds": medians, "flops": flops, "tokens": count, "peak": matmul_peak(), "attention": attention}


def attention_seconds(network, batch: int, repeats: int = 20) -> dict[str, list[float]]:
    """Median seconds of the attention of one layer, forward and backward, by blocks of queries as it is in this
    project, and by one call of torch's for everything."""
    from types import SimpleNamespace

    import torch
    import torch.nn.functional as F
    from megatron.core.transformer.enums import AttnMaskType

    from minitron_megatron.model.torch_modules import CausalAttention

    own = network.sublayers[0]
    scale = own.head_dim**-0.5

    def at_once(query, key, value, documents):
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)

    def random(heads: int):
        return torch.randn(LENGTH, batch, heads, own.head_dim, dtype=torch.bfloat16, device=device())

    inputs = [random(count).requires_grad_() for count in (own.num_heads, *[own.num_query_groups] * 2)]
    grad = random(own.num_heads).flatten(2)
    config = SimpleNamespace(context_parallel_size=1)
    by_blocks = CausalAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=scale)
    seconds = {"blocks": ([], []), "at once": ([], [])}
    for _ in range(1 + repeats):
        for name, attention in (("blocks", by_blocks), ("at once", at_once)):
            times = [now()]
            out = attention(*inputs, None)
            times.append(now())
            out.backward(grad)
            times.append(now())
            for of_pass, start, end in zip(seconds[name], times[:-1], times[1:], strict=True):
                of_pass.append(end - start)
    return {name: [statistics.median(of_pass[1:]) for of_pass in passes] for name, passes in seconds.items()}


def now() -> float:
    synchronize()
    return time.perf_counter()


def matmul_peak(size: int = 4096, repeats: int = 10) -> float:
    """FLOP/s of the best of several bf16 products of square matrices."""
    import torch

    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device()) for _ in range(2))
    seconds = []
    for _ in range(repeats):
        started = now()
        torch.mm(a, b)
        seconds.append(now() - started)
    return 2 * size**3 / min(seconds)


def rows(found: dict) -> list[list[str]]:
    total, rows = sum(found["seconds"].values()), []
    for phase, seconds in [*found["seconds"].items(), ("step", total)]:
        flops = found["flops"].get(phase, sum(found["flops"].values()))
        rate = flops / seconds
        speed = [f"{flops / 1e12:.3f}", f"{rate / 1e12:.3f}", f"{rate / found['peak']:.0%}"] if flops else ["–"] * 3
        rows.append([phase, f"{seconds:.3f}", f"{seconds / total:.0%}", *speed])
    return rows


def about(found: dict) -> str:
    blocks, at_once = (
        " and ".join(f"{1e3 * seconds:.0f}" for seconds in found["attention"][name]) for name in ("blocks", "at once")
    )
    return (
        f"{found['tokens'] / sum(found['seconds'].values()):,.0f} tokens/s; the peak of a bf16 matrix product was "
        f"{found['peak'] / 1e12:.3f} TFLOP/s. The attention of a layer of the teacher took {blocks} ms, forward and "
        f"backward, and {at_once} ms with all queries at once. {describe(found['machine'])}"
    )


def in_markdown(found: dict) -> str:
    return f"{markdown_table(PHASES, rows(found))}\n\n{about(found)}"


if __name__ == "__main__":
    main()
