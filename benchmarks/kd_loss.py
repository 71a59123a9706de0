"""The loss alone: from last hidden states to the gradients of these and of the output projection.

This project's chunked loss, NVIDIA ModelOpt's `LogitsKLLoss` for Megatron, and KL as one would write it in torch, over
vocabularies and numbers of tokens, whole and split over two tensor-parallel ranks. Every case runs in processes of its
own. What is measured is memory on top of what was there before: the hidden states and both projections.
"""

import time
from multiprocessing import get_context
from pathlib import Path

import psutil
from common import (
    console,
    describe,
    device,
    machine,
    markdown_table,
    memory_gib,
    on_gpu,
    parser,
    print_table,
    show_spread,
    spread,
    synchronize,
    write_docs,
    write_results,
)

NAME = "kd_loss"
OURS, MODELOPT, PLAIN = "minitron_megatron", "ModelOpt", "plain torch"
VOCABS, TOKENS, RANKS = (32_768, 131_072, 262_144), (1024, 4096, 16_384), (1, 2)
HIDDEN = 256  # of both models: small, so that what is measured is the loss and not the projection
COLUMNS = ["ranks", "vocabulary", "tokens", "loss", "seconds", "GiB per rank"]
# What does not fit is not run: more than this share of the machine's memory, going by the last case that did.
MOST_MEMORY = 0.8


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--largest", type=int, default=None, help="most tokens x vocabulary of the other losses")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts, cases = machine(), []
    for ranks in (1,) if on_gpu() else RANKS:
        for name in (OURS, MODELOPT, PLAIN):
            if name == PLAIN and ranks > 1:
                continue  # log_softmax knows nothing of other ranks
            bytes_per_logit = 0.0
            for size, vocab, tokens in sorted((v * t, v, t) for v in VOCABS for t in TOKENS):
                case = {"ranks": ranks, "vocab": vocab, "tokens": tokens, "loss": name}
                needed = 0.0 if name == OURS else bytes_per_logit * size
                if (name == OURS or size <= (args.largest or size)) and needed < MOST_MEMORY * memory_of_the_machine():
                    found = measure_on(ranks, name, vocab, tokens, args.repeats, args.threads)
                    case |= {key: spread(values) for key, values in found.items()}
                    bytes_per_logit = ranks * case["gib"]["median"] * 2**30 / size
                    console.print(*row(case), sep="  ")
                else:
                    case["needed_gib"] = needed / 2**30 / ranks
                cases.append(case)
    results = {"machine": facts, "settings": {"hidden": HIDDEN, "repeats": args.repeats}, "cases": cases}
    write_results(NAME, results)
    print_table("forward and backward of the loss", COLUMNS, [row(case) for case in cases])
    console.print(describe(facts))


def memory_of_the_machine() -> int:
    """Bytes that there are for tensors."""
    if on_gpu():
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    return psutil.virtual_memory().total


def measure_on(ranks: int, name: str, vocab: int, tokens: int, repeats: int, threads: int) -> dict[str, list[float]]:
    """`measure` on processes that form one world: seconds of the slowest rank, memory of the largest.

    On the CPU these are fresh ones, for the sake of their memory; on a GPU, whose memory is counted, it is this one.
    """
    import torch.distributed as dist

    if on_gpu():
        seconds, gib, loss = measure(0, 1, None, name, vocab, tokens, repeats, threads)
        return {"seconds": seconds, "gib": [gib], "value": [loss]}

    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    threads = max(1, threads // ranks)
    with get_context("spawn").Pool(ranks) as pool:
        work = [(rank, ranks, store.port, name, vocab, tokens, repeats, threads) for rank in range(ranks)]
        found = pool.starmap(measure, work, chunksize=1)
    seconds = [max(of_repeat) for of_repeat in zip(*(seconds for seconds, _, _ in found), strict=True)]
    losses = {round(loss, 2) for _, _, loss in found}
    assert len(losses) == 1, losses
    return {"seconds": seconds, "gib": [max(gib for _, gib, _ in found)], "value": [losses.pop()]}


def measure(rank, ranks, port, name, vocab, tokens, repeats, threads) -> tuple[list[float], float, float]:
    """Seconds of each repeat but a first one that is not counted, GiB on top of the inputs, and the loss per token."""
    import os
    import warnings

    warnings.simplefilter("ignore")
    import torch

    if ranks > 1:
        world = {"RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in world.items()} | {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    torch.set_num_threads(threads)

    from minitron_megatron.config.schema import ParallelConfig
    from minitron_megatron.parallel.context import parallel_context

    with parallel_context(ParallelConfig(tensor=ranks)) as ctx:
        generator = torch.Generator().manual_seed(0)
        rows = slice(rank * vocab // ranks, (rank + 1) * vocab // ranks)

        def random(count: int, part: slice = slice(None)):
            whole = torch.empty(count, HIDDEN, dtype=torch.bfloat16).normal_(generator=generator)
            return (whole[part] / HIDDEN**0.5).to(device())

        states = {"student": 4 * random(tokens), "teacher": 4 * random(tokens)}
        weights = {"student": random(vocab, rows), "teacher": random(vocab, rows)}
        labels = torch.randint(vocab, (tokens,), generator=generator).to(device())
        loss_of = LOSSES[name](ctx, vocab, labels)
        for tensor in (states["student"], weights["student"]):
            tensor.requires_grad_()
        reset_peak()
        before, seconds = memory_gib()["resident_gib"], []
        for _ in range(1 + repeats):
            states["student"].grad = weights["student"].grad = None
            if ranks > 1:
                torch.distributed.barrier()
            synchronize()
            started = time.perf_counter()
            loss = loss_of(states, weights)
            loss.backward()
            synchronize()
            seconds.append(time.perf_counter() - started)
        return seconds[1:], memory_gib()["peak_gib"] - before, loss.item()


def reset_peak() -> None:
    """The most memory in use starts anew from what is in use now."""
    if on_gpu():
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def ours(ctx, vocab, labels):
    import torch
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    from minitron_megatron.distillation.linear_losses import Predictions, linear_distillation_loss

    mask = torch.ones(len(labels), device=device())
    group = ctx.collection.tp

    def loss(states, weights):
        hidden = copy_to_tensor_model_parallel_region(states["student"], group=group)
        teacher = Predictions(states["teacher"], weights["teacher"])
        found, _ = linear_distillation_loss(
            hidden, weights["student"], labels, mask, group, vocab, teacher, kd_weight=1.0, lm_weight=0.0
        )
        return found / len(labels)

    return loss


def whole_logits(ctx, states, weights):
    """`[tokens, vocab/tp]` of both models, the teacher's without gradient."""
    import torch
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    hidden = copy_to_tensor_model_parallel_region(states["student"], group=ctx.collection.tp)
    with torch.no_grad():
        teacher = states["teacher"] @ weights["teacher"].T
    return hidden @ weights["student"].T, teacher


def modelopt(ctx, vocab, labels):
    from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
    from megatron.core.transformer import TransformerConfig
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    ranks = ctx.layout.tensor
    config = TransformerConfig(
        num_layers=1, hidden_size=HIDDEN, num_attention_heads=ranks, tensor_model_parallel_size=ranks
    )
    kl = LogitsKLLoss(config)

    def loss(states, weights):
        student, teacher = whole_logits(ctx, states, weights)
        of_rank, is_partial, _ = kl(student.unsqueeze(1), teacher.unsqueeze(1))  # [seq, batch, vocab]
        assert is_partial
        return reduce_from_tensor_model_parallel_region(of_rank, group=ctx.collection.tp).mean()

    return loss


def plain(ctx, vocab, labels):
    def loss(states, weights):
        student, teacher = (x.float().log_softmax(-1) for x in whole_logits(ctx, states, weights))
        return (teacher.exp() * (teacher - student)).sum(-1).mean()

    return loss


LOSSES = {OURS: ours, MODELOPT: modelopt, PLAIN: plain}


def row(case: dict) -> list[str]:
    where = [str(case["ranks"]), f"{case['vocab']:,}", f"{case['tokens']:,}", case["loss"]]
    if "seconds" not in case:
        needed = case["needed_gib"]
        return [*where, "not run", f"would take {needed:.0f}" if needed else "–"]
    digits = 2 if case["seconds"]["median"] > 0.1 else 4
    return [*where, show_spread(case["seconds"], digits), f"{case['gib']['median']:.2f}"]


def in_markdown(results: dict) -> str:
    return "\n\n".join([markdown_table(COLUMNS, [row(c) for c in results["cases"]]), describe(results["machine"])])


if __name__ == "__main__":
    main()
