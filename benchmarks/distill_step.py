"""One distillation step of a pruned SmolLM2-135M: this project beside Hugging Face models and ModelOpt's loss.

All cases run the same models (teacher: 30 layers, hidden 576, FFN 1536; student: 448 and 1152) on the same tokens with
AdamW. Each runs in a process of its own, whose peak resident memory is measured, and all of them take turns by steps.
"""

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common import (
    Models,
    Stopwatch,
    console,
    describe,
    device,
    in_fresh_process,
    machine,
    markdown_table,
    memory_gib,
    parser,
    prepare_models,
    print_table,
    run_in_turn,
    show_spread,
    spread,
    write_docs,
    write_results,
)

NAME = "distill_step"
OURS, LEANER = "minitron_megatron", "minitron_megatron, recompute=true"
LENGTH = 512
# The same for all: the loop's own defaults, at a constant rate.
LR, BETAS, EPS, WEIGHT_DECAY, CLIP_GRAD = 1e-4, (0.9, 0.95), 1e-8, 0.1, 1.0
# Standard deviations that the difference of two cases' first losses stays below but for one pair in 100,000: as many
# as in tests/rounding.py.
DEVIATIONS = 5.0
MODELOPT, PLAIN = "HF + ModelOpt's loss", "HF + plain KL"
# Least times the tokens/s, and largest share of the memory: beside the better of both, and beside ModelOpt's.
GOAL, MODELOPT_GOAL = (1.4, 0.6), (1.7, 0.5)
# Of the processor's time: with more than this to other processes, the times say nothing.
MAX_OTHERS = 0.05
COLUMNS = ["case", "tokens/s", "peak GiB", "GiB with models", "first loss", "ours: speed", "ours: memory"]


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--steps", type=int, default=8, help="timed steps of each case in each repeat")
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
    error = in_fresh_process(loss_error, models, tokens, args.threads)
    runs = run_in_turn(CASES, args.repeats, models, tokens, args.threads)
    asked = {"batch": args.batch, "threads": args.threads, "steps": args.steps, "repeats": args.repeats}
    results = {"machine": facts, **asked, "warmup": args.warmup, "runs": runs}
    check_losses(runs, error)
    write_results(NAME, results)
    print_table(f"{args.batch} x {LENGTH} tokens a step, {args.threads} threads", COLUMNS, rows(results))
    console.print(describe(facts))
    for line in verdict(results):
        console.print(line)


def write_tokens(models: Models, path: Path, steps: int, batch: int) -> None:
    """Save the tokens of all steps `[steps, batch, length + 1]`: the first of the demo's training text."""
    import torch

    from minitron_megatron.data.samples import rank_batches, training_samples
    from minitron_megatron.data.tokens import prepare_corpus
    from minitron_megatron.parallel.context import parallel_context

    config = models.recipe["distilled"]
    corpus = prepare_corpus(config.data, models.teacher / "huggingface")
    with parallel_context(config.parallel):
        samples = training_samples(corpus, config.data, steps * batch)
        batches = list(rank_batches(samples, 0, steps * batch, batch, 0, 1))
    torch.save(torch.stack([torch.cat([b["tokens"], b["labels"][:, -1:]], dim=1) for b in batches]), path)


def ours(recompute: bool, models: Models, tokens: Path, threads: int) -> Iterator[dict]:
    """Teacher and student under Megatron-Core, as `training/loop.py` runs them: bf16 with float32 main weights."""
    import torch

    torch.set_num_threads(threads)

    from minitron_megatron.config.schema import ParallelConfig
    from minitron_megatron.parallel.context import parallel_context

    with parallel_context(ParallelConfig()) as ctx:
        distillation, _, trained = teacher_and_student(models, ctx, recompute)
        loaded = memory_gib()["resident_gib"]

        def step(tokens: torch.Tensor) -> float:
            trained.zero_grad()
            result = distillation.train([as_batch(tokens)])
            trained.step()
            return result.losses["kd_logits"]

        yield from measure(step, read_tokens(tokens), loaded)


def read_tokens(path: Path):
    import torch

    return torch.load(path, map_location=device())


def teacher_and_student(models: Models, ctx, recompute: bool = False):
    """The step of the training loop, its teacher, and the student's optimiser."""
    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.config.loss import LossConfig
    from minitron_megatron.config.schema import DType, OptimizerConfig
    from minitron_megatron.distillation.entries import loss_entries
    from minitron_megatron.distillation.live_teacher import LiveTeacher
    from minitron_megatron.distillation.step import DistillationStep
    from minitron_megatron.model.build import build_model
    from minitron_megatron.training.optimizer import setup_optimizer

    teacher, student = Checkpoint(models.teacher), Checkpoint(models.pruned)
    student_chunks = build_model(student.network, ctx, DType.BF16, recompute)
    load_weights(student_chunks, student, ctx)
    teacher_chunks = build_model(teacher.network, ctx, DType.BF16)
    load_weights(teacher_chunks, teacher, ctx)
    for chunk in teacher_chunks:
        chunk.requires_grad_(False)
    settings = OptimizerConfig(LR, LR, 0, CLIP_GRAD, WEIGHT_DECAY, *BETAS, EPS)
    trained = setup_optimizer(student_chunks, settings, 1000, DType.BF16, ctx)
    live_teacher = LiveTeacher(teacher_chunks, ctx, student.network.vocab_size)
    entries = loss_entries(LossConfig(), live_teacher)
    return DistillationStep(trained.model_chunks, entries, ctx, student.network.vocab_size), live_teacher, trained


def as_batch(tokens) -> dict:
    """A micro-batch of `[batch, length + 1]` tokens, all of which count."""
    import torch

    inputs = tokens[:, :-1].contiguous()
    return {
        "tokens": inputs,
        "labels": tokens[:, 1:].contiguous(),
        "loss_mask": torch.ones_like(inputs, dtype=torch.float32),
        "position_ids": torch.arange(LENGTH, device=tokens.device).repeat(len(tokens), 1),
    }


def theirs(make_loss, models: Models, tokens: Path, threads: int, autocast: bool = False) -> Iterator[dict]:
    """Hugging Face models in bf16, and AdamW on the bf16 parameters: fused, as transformers' Trainer asks for it.

    With `autocast` the student's weights, gradients and moments are float32 and its products bf16, which is what this
    project's are.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(threads)
    settings = {"dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    teacher = AutoModelForCausalLM.from_pretrained(models.teacher_hf, **settings).to(device())
    teacher.eval().requires_grad_(False)
    if autocast:
        settings["dtype"] = torch.float32
    student = AutoModelForCausalLM.from_pretrained(models.pruned_hf, **settings).to(device()).train()
    loss_of = make_loss()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    loaded = memory_gib()["resident_gib"]

    def step(tokens: torch.Tensor) -> float:
        inputs = tokens[:, :-1].contiguous()
        optimizer.zero_grad()
        with torch.no_grad():
            teacher_logits = teacher(inputs, use_cache=False).logits
        with torch.autocast(device(), torch.bfloat16, enabled=autocast):
            logits = student(inputs, use_cache=False).logits
        loss = loss_of(logits, teacher_logits)
        del teacher_logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), CLIP_GRAD)
        optimizer.step()
        return loss.item()

    yield from measure(step, read_tokens(tokens), loaded)


def modelopt_loss():
    """ModelOpt's loss, called as its trainer for Hugging Face models calls it: on float32 logits, token by token."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    loss = LogitsDistillationLoss(reduction="none")
    return lambda student, teacher: loss(student.float(), teacher.float()).mean()


def modelopt_bf16_loss():
    """ModelOpt's loss on the models' own logits: leaner, with softmaxes and gradients rounded to bf16."""
    from modelopt.torch.distill.losses import LogitsDistillationLoss

    loss = LogitsDistillationLoss(reduction="none")
    return lambda student, teacher: loss(student, teacher).float().mean()


def plain_loss():
    """KL(teacher || student) as one would write it down, with softmaxes in float32."""

    def loss(student, teacher):
        student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
        return (teacher.exp() * (teacher - student)).sum(-1).mean()

    return loss


CASES = {
    OURS: partial(ours, False),
    LEANER: partial(ours, True),
    MODELOPT: partial(theirs, modelopt_loss),
    PLAIN: partial(theirs, plain_loss),
    # The goals are not measured against these: the softmaxes of the one are rounded to bf16, which ours are not, and
    # the other keeps the student in float32, as we do and as the goals' alternatives do not.
    "HF + ModelOpt's loss in bf16": partial(theirs, modelopt_bf16_loss),
    "HF + plain KL, float32 student under autocast": partial(theirs, plain_loss, autocast=True),
}


def measure(step, tokens, loaded_gib: float) -> Iterator[dict]:
    """Run a step on each `[batch, length + 1]` of `tokens`, and measure it."""
    for batch in tokens:
        with Stopwatch() as watch:
            loss = step(batch)
        yield {
            "loss": loss,
            "seconds": watch.seconds[0],
            "others_share": watch.others_share,
            "loaded_gib": loaded_gib,
            "peak_gib": memory_gib()["peak_gib"],
        }


def loss_error(models: Models, tokens: Path, threads: int) -> float:
    """By how much the first losses of two cases may differ, for what bf16 does to the loss of a token.

    The plain loss of every token of the first batch is computed in bf16, and in float32 with the same weights. A case's
    loss is a mean over these tokens, whose errors have that size and differ from case to case.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device()).eval()
        for folder in (models.teacher_hf, models.pruned_hf)
    )

    def of_tokens() -> torch.Tensor:
        losses = []
        with torch.no_grad():
            for row in read_tokens(tokens)[0]:  # the logits of one sequence at a time
                inputs = row[None, :-1]
                log_q, log_p = (model(inputs, use_cache=False).logits[0].float() for model in (teacher, student))
                log_q, log_p = log_q.log_softmax(-1), log_p.log_softmax(-1)
                losses.append((log_q.exp() * (log_q - log_p)).sum(-1).double())
        return torch.cat(losses)

    in_bf16 = of_tokens()
    teacher.float(), student.float()
    errors = in_bf16 - of_tokens()
    return DEVIATIONS * 2**0.5 * errors.square().mean().sqrt().item() / len(errors) ** 0.5


def check_losses(runs: dict[str, list[list[dict]]], error: float) -> None:
    """All cases must compute the same thing: the loss before anything has learned."""
    losses = {name: of_case[0][0]["loss"] for name, of_case in runs.items()}
    if max(losses.values()) - min(losses.values()) > error:
        raise SystemExit(f"the first losses differ by more than bf16 makes them, {error:.4f}: {losses}")


def timed(results: dict, name: str, key: str) -> list[float]:
    """A value of every timed step of a case, over all repeats."""
    return [step[key] for steps in results["runs"][name] for step in steps[results["warmup"] :]]


def speed(results: dict, one: str, other: str) -> list[float]:
    """How many times as fast each step of `one` was as the step of `other` in the same round."""
    pairs = zip(timed(results, one, "seconds"), timed(results, other, "seconds"), strict=True)
    return [theirs / ours for ours, theirs in pairs]


def peaks(results: dict, name: str) -> list[float]:
    """The peak memory of each repeat of a case, in GiB."""
    return [steps[-1]["peak_gib"] for steps in results["runs"][name]]


def memory(results: dict, one: str, other: str) -> float:
    """The share that the median peak of `one` is of that of `other`."""
    return statistics.median(peaks(results, one)) / statistics.median(peaks(results, other))


def rows(results: dict) -> list[list[str]]:
    tokens, found = results["batch"] * LENGTH, []
    for name, [first, *_] in results["runs"].items():
        beside = [show_spread(spread(speed(results, OURS, name)), 2), f"{memory(results, OURS, name):.2f}"]
        found.append(
            [
                name,
                show_spread(spread([tokens / seconds for seconds in timed(results, name, "seconds")]), 0),
                show_spread(spread(peaks(results, name)), 2),
                f"{first[0]['loaded_gib']:.2f}",
                f"{first[0]['loss']:.4f}",
                *(beside if name != OURS else ["–"] * 2),
            ]
        )
    return found


def verdict(results: dict) -> list[str]:
    """Whether the goals are reached, by each of our cases alone: both have to be by the same one."""
    lines = []
    runs = [steps[results["warmup"] :] for of_case in results["runs"].values() for steps in of_case]
    busiest = max(statistics.fmean(step["others_share"] for step in steps) for steps in runs)
    if busiest > MAX_OTHERS:
        lines.append(f"NOT A MEASUREMENT: other processes took up to {busiest:.0%} of the processor meanwhile.")
    for name in (OURS, LEANER):
        speeds = {other: statistics.median(speed(results, name, other)) for other in (MODELOPT, PLAIN)}
        shares = {other: memory(results, name, other) for other in (MODELOPT, PLAIN)}
        fastest, leanest = min(speeds, key=speeds.get), max(shares, key=shares.get)
        for faster, leaner, (least, most) in ((fastest, leanest, GOAL), (MODELOPT, MODELOPT, MODELOPT_GOAL)):
            beside = faster if faster == leaner else f"the faster one ({faster}) and the leaner one ({leaner})"
            reached = "reached" if speeds[faster] >= least and shares[leaner] <= most else "not reached"
            lines.append(
                f"{name} beside {beside}: {speeds[faster]:.2f} times as fast in {shares[leaner]:.2f} of the memory; "
                f"goal of at least {least} and at most {most}: {reached}."
            )
    return lines


def in_markdown(results: dict) -> str:
    lines = "\n".join(f"- {line}" for line in verdict(results))
    return "\n\n".join([markdown_table(COLUMNS, rows(results)), lines, describe(results["machine"])])


if __name__ == "__main__":
    main()
