"""EleutherAI's lm-eval harness: how fast does it run on a Megatron checkpoint, and on the same model in transformers?

SmolLM2-135M answers the same requests twice: as a checkpoint, through `MegatronLM`, and as a Hugging Face
folder, through lm-eval's own HFLM. The requests are those of a multiple-choice task whose choices have several tokens,
of one whose choices are single tokens, and of a task that generates. Texts are the standard library's.
"""

from collections.abc import Iterator
from pathlib import Path

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

NAME = "harness"
OURS, THEIRS = "minitron_megatron", "lm-eval's HFLM"
KINDS = {"choices": "several tokens", "letters": "single tokens", "generation": "generation"}
COLUMNS = ["", *(f"{title}, requests/s" for title in KINDS.values()), "peak memory, GiB"]
CHOICES, CHOICE_WORDS = 4, 12


def main() -> None:
    options = parser(__doc__, repeats=5, threads=2)
    options.add_argument("--questions", type=int, default=32, help="of each multiple-choice task, four choices each")
    options.add_argument("--prompts", type=int, default=16, help="to continue")
    options.add_argument("--tokens", type=int, default=64, help="to generate for each prompt")
    options.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"], help="a CPU without bf16 is slow in it")
    options.add_argument("--batch", type=int, default=8, help="requests per forward pass")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts = machine()
    checkpoint, folder = prepare_model(args.work)
    runs = run_in_turn({OURS: measure_ours, THEIRS: measure_theirs}, args.repeats, checkpoint, folder, args)
    found = {name: [merge(steps) for steps in of_case] for name, of_case in runs.items()}
    check_equal(found)
    results = {
        "machine": facts,
        "settings": {name: value for name, value in vars(args).items() if isinstance(value, int | str)},
        "cases": {
            name: {key: spread([run[key] for run in runs]) for key in (*KINDS, "peak_gib", "others_share")}
            for name, runs in found.items()
        },
    }
    write_results(NAME, results)
    print_table("median (least-largest)", COLUMNS, rows(results))
    console.print(describe(facts))


def prepare_model(work: Path) -> tuple[Path, Path]:
    """The model in bf16, as a checkpoint and as a Hugging Face folder. What is there already is kept."""
    from minitron_megatron import export, import_checkpoint
    from minitron_megatron.config.schema import DType, ExportConfig, ImportConfig

    checkpoint = import_checkpoint(ImportConfig("builtin:smollm2-135m", str(work / "teacher"), DType.BF16))
    return checkpoint, export(ExportConfig(str(checkpoint), str(work / "teacher_hf")))


def make_requests(tokenizer, args) -> dict[str, list]:
    """Instances of lm-eval by kind, alike for both cases."""
    from lm_eval.api.instance import Instance

    from minitron_megatron.data.builtin import builtin_documents

    words = [word for document in builtin_documents() for word in document.split()]

    def text(number: int, start: int) -> str:
        start = (start * 7919) % (len(words) - number)
        return " ".join(words[start : start + number])

    def instances(kind: str, pairs: list[tuple]) -> list[Instance]:
        return [Instance(kind, {}, pair, number) for number, pair in enumerate(pairs)]

    # Contexts of 40 to 167 words, in no order.
    contexts = [text(40 + 37 * number % 128, number) for number in range(max(args.questions, args.prompts))]
    settings = {"until": ["\0"], "max_gen_toks": args.tokens}
    return {
        "choices": instances(
            "loglikelihood",
            [
                (context, " " + text(CHOICE_WORDS, 1000 + CHOICES * number + choice))
                for number, context in enumerate(contexts[: args.questions])
                for choice in range(CHOICES)
            ],
        ),
        "letters": instances(
            "loglikelihood",
            [(context + "\nAnswer:", f" {c}") for context in contexts[: args.questions] for c in "ABCDEFGH"[:CHOICES]],
        ),
        "generation": instances("generate_until", [(c, dict(settings)) for c in contexts[: args.prompts]]),
    }


def measure(lm, tokenizer, args) -> Iterator[dict]:
    """Requests per second of each kind, and the answers."""
    for kind, instances in make_requests(tokenizer, args).items():
        answer = getattr(lm, instances[0].request_type)
        answer(instances[: args.batch // 2], disable_tqdm=True)  # what is done once
        with Stopwatch() as watch:
            answers = answer(instances, disable_tqdm=True)
        yield {
            kind: len(instances) / watch.seconds[0],
            "answers": {kind: answers},
            "peak_gib": memory_gib()["peak_gib"],
            "others_share": watch.others_share,
        }


def merge(steps: list[dict]) -> dict:
    """One repeat of a case: all kinds of requests together."""
    found = {key: value for step in steps for key, value in step.items()}
    answers = {kind: of_kind for step in steps for kind, of_kind in step["answers"].items()}
    return {**found, "answers": answers, "others_share": max(step["others_share"] for step in steps)}


def measure_ours(checkpoint: Path, folder: Path, args) -> Iterator[dict]:
    """The harness on the checkpoint."""
    import torch

    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.config.schema import DType, ParallelConfig
    from minitron_megatron.data.tokens import load_tokenizer
    from minitron_megatron.evaluation.evaluate import generation_defaults
    from minitron_megatron.evaluation.inference import Inference
    from minitron_megatron.evaluation.lm import MegatronLM
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context

    torch.set_num_threads(args.threads)
    source = Checkpoint(checkpoint)
    with parallel_context(ParallelConfig()) as ctx:
        model_chunks = build_model(source.network, ctx, DType(args.dtype))
        load_weights(model_chunks, source, ctx)
        tokenizer, defaults = load_tokenizer(folder), generation_defaults(folder)
        inference = Inference(model_chunks, ctx, source.network, tokenizer, [defaults.eos_token_id], args.batch)
        lm = MegatronLM(
            lambda method, *arguments: getattr(inference, method)(*arguments),
            tokenizer,
            source.network.max_positions,
            defaults,
        )
        yield from measure(lm, tokenizer, args)


def measure_theirs(checkpoint: Path, folder: Path, args) -> Iterator[dict]:
    """The harness on the exported model."""
    import torch
    from lm_eval.models.huggingface import HFLM

    torch.set_num_threads(args.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = {"bf16": "bfloat16", "fp32": "float32"}[args.dtype]
    lm = HFLM(str(folder), dtype=dtype, device=device, batch_size=args.batch, softmax_dtype="float32")
    yield from measure(lm, lm.tokenizer, args)


def check_equal(found: dict[str, list[dict]]) -> None:
    """Both cases have to give the same answers, but for the rounding of bf16.

    Raises:
        SystemExit: they do not.
    """
    ours, theirs = (found[name][0]["answers"] for name in (OURS, THEIRS))
    for kind in ("choices", "letters"):
        pairs = list(zip(ours[kind], theirs[kind], strict=True))
        worst = max(abs(one - other) / abs(other) for (one, _), (other, _) in pairs)
        console.print(f"{KINDS[kind]}: log-probabilities differ by {worst:.2%} at most")
        if worst > 0.05:
            raise SystemExit("the log-probabilities are not of the same model")
    same = sum(one == other for one, other in zip(ours["generation"], theirs["generation"], strict=True))
    console.print(f"generation: {same} of {len(ours['generation'])} texts are equal")


def rows(results: dict) -> list[list[str]]:
    return [
        [name, *(show_spread(case[kind], 2) for kind in KINDS), show_spread(case["peak_gib"], 2)]
        for name, case in results["cases"].items()
    ]


def in_markdown(results: dict) -> str:
    busy = max(case["others_share"]["max"] for case in results["cases"].values())
    settings = results["settings"]
    return (
        f"{markdown_table(COLUMNS, rows(results))}\n\n"
        f"Median (least-largest) of {settings['repeats']} runs in {settings['dtype']}, in batches of "
        f"{settings['batch']}, {settings['tokens']} tokens generated for each prompt; other processes had at most "
        f"{busy:.0%} of the processor. "
        f"{describe(results['machine'])}"
    )


if __name__ == "__main__":
    main()
