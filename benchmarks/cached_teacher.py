"""Distillation from a cache of the teacher's predictions, beside the live teacher: quality, size, time and memory.

The demo's student learns the demo's way, by KL, from the live teacher and from caches of each form: the same starting
weights, the same batches in the same order. Then all are judged alike, by their cross-entropy and their KL from the
teacher on held-out documents and on text of another kind. A step's time and memory are measured with all cases alive
at once, which take turns by steps. Runs that are done are skipped, and one that was interrupted goes on.
"""

import copy
import re
import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common import (
    Models,
    Stopwatch,
    console,
    describe,
    in_fresh_process,
    in_fresh_processes,
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
from controls import MEASURES, TEXTS, describe_text, judge_once, prepare_texts, train_and_judge

NAME = "cached_teacher"
LIVE, HIDDEN, DEFAULT = "live teacher", "hidden states", "50 drawn"
TOP = {"logits.top_k": 50}
# Settings of the cache, and changes to those of the loss.
CASES: dict[str, tuple[dict, dict]] = {
    LIVE: ({}, {}),
    "12 drawn": ({"draws": 12}, {}),
    "25 drawn": ({"draws": 25}, {}),
    DEFAULT: ({"draws": 50}, {}),
    "100 drawn": ({"draws": 100}, {}),
    "50 likeliest": ({"form": "top_k", "top_k": 50}, TOP),
    "50 likeliest and the rest": ({"form": "top_k", "top_k": 50}, {**TOP, "logits.tail": True}),
    HIDDEN: ({"form": "hidden"}, {}),
}
TIMED = (LIVE, DEFAULT, "50 likeliest and the rest", HIDDEN)
MAX_LOSS, MAX_BYTES, MIN_SPEED = 0.03, 150, 1.25
QUALITY = ["teacher", "bytes a token", "corpus: loss", "corpus: KL", "licences: loss", "licences: KL"]
STEP = ["teacher", "tokens/s", "times the live one's", "peak GiB", "GiB with models"]


def main() -> None:
    options = parser(__doc__, repeats=3, threads=2)
    options.add_argument("--steps", type=int, default=None, help="of every run; the demo's own number if not given")
    options.add_argument("--seeds", type=int, nargs="+", default=[1234, 1235], help="of the data order")
    options.add_argument("--timed", type=int, default=8, help="timed steps of each case in each repeat")
    options.add_argument("--warmup", type=int, default=2, help="steps before those; the first one allocates much")
    options.add_argument("--windows", type=int, default=32, help="at most so many windows of each text are judged")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts = machine()
    models, work = prepare_models(args.work), args.work / NAME
    texts = in_fresh_process(prepare_texts, work, models)
    configs = {
        (name, seed): in_fresh_process(settings, models, work, name, seed, args)
        for name in CASES
        for seed in args.seeds
    }
    first = configs[LIVE, args.seeds[0]]
    results = {
        "machine": facts,
        "settings": {
            "steps": first.steps,
            "batch": [first.global_batch, first.data.sequence_length],
            "seeds": args.seeds,
        },
        "texts": {name: describe_text(path, args.windows) for name, path in texts.items()},
        "bytes": {name: bytes_of(Path(configs[name, args.seeds[0]].teacher)) for name in CASES if name != LIVE},
        "warmup": args.warmup,
    }
    cases = {name: partial(run_steps, configs[name, args.seeds[0]]) for name in TIMED}
    results["runs"] = run_in_turn(cases, args.repeats, args.warmup + args.timed, args.threads)
    write_results(NAME, results)
    calls = [(train_and_judge, config, models.teacher, texts, args, False) for config in configs.values()]
    judged: dict[str, list[dict]] = {}
    for (name, _), found in zip(configs, in_fresh_processes(calls, 1), strict=True):
        judged.setdefault(name, []).append(found)
    results["models"] = {name: {m: spread([f[m] for f in own]) for m in MEASURES} for name, own in judged.items()}
    teacher = in_fresh_process(judge_once, work / "teacher", models.teacher, models.teacher, texts, args)
    results["teacher"] = {m: spread([teacher[m]]) for m in MEASURES}
    write_results(NAME, results)
    print_table(f"{first.steps} steps, {len(args.seeds)} seeds", QUALITY, quality_rows(results))
    print_table("a step", STEP, step_rows(results))
    for line in verdict(results):
        console.print(line)
    console.print(describe(facts))


def settings(models: Models, work: Path, name: str, seed: int, args):
    """The settings of one run: the demo's, with a cache as the teacher, which is made."""
    import torch

    from minitron_megatron.config.cache import CacheConfig, CacheForm
    from minitron_megatron.training.cache import cache

    torch.set_num_threads(args.threads)
    of_cache, of_loss = CASES[name]
    config = copy.deepcopy(models.recipe["distilled"])
    config.student, config.teacher = str(models.pruned), str(models.teacher)
    config.steps, config.validate_every = args.steps or config.steps, None
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.steps - 1)
    config.data.text, config.data.heldout_pct = [str(work / "train.jsonl")], 1.0
    config.seed = config.data.seed = seed
    folder = work / f"{config.steps}_steps_{seed}"
    words = re.sub("[^a-z0-9]+", "_", name.lower())
    config.output = str(folder / words)
    for path, value in of_loss.items():
        setattr(config.loss.logits, path.removeprefix("logits."), value)
    if of_cache:
        form = CacheForm(of_cache.get("form", "sampled"))
        config.teacher = str(
            cache(
                CacheConfig(
                    str(models.teacher),
                    str(folder / f"cache_{form.value}_{of_cache.get('draws', '')}"),
                    num_samples=config.steps * config.global_batch,
                    shard_samples=32,
                    data=config.data,
                    **{**of_cache, "form": form},
                )
            )
        )
        config.teacher_dtype = None
    return config


def bytes_of(cache: Path) -> dict:
    """Bytes of a cache: of its predictions for a token, and of the output layer."""
    from minitron_megatron.distillation.prediction_cache import OUTPUT, CacheIndex

    output = cache / OUTPUT
    return {
        "a token": CacheIndex.read(cache).bytes_per_token(cache),
        "output": output.stat().st_size if output.exists() else 0,
    }


def run_steps(config, steps: int, threads: int) -> Iterator[dict]:
    """Steps of a run, as the training loop makes them."""
    import torch

    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.data.samples import rank_batches, training_samples
    from minitron_megatron.data.tokens import prepare_corpus
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.training.matching import open_teacher
    from minitron_megatron.training.setup import set_up

    torch.set_num_threads(threads)
    student, count = Checkpoint(config.student), config.global_batch
    with parallel_context(config.parallel) as ctx:
        samples = training_samples(
            prepare_corpus(config.data, student.huggingface_folder), config.data, config.steps * count
        )
        setup = set_up(config, student, {"": open_teacher(Path(config.teacher))}, ctx)
        loaded, trained = memory_gib()["resident_gib"], setup.models[""]
        for number in range(steps):
            with Stopwatch() as watch:
                batches = list(rank_batches(samples, number * count, count, config.micro_batch, 0, 1))
                trained.zero_grad()
                result = setup.step.train(batches, number + 1)
                trained.step()
            yield {
                "loss": result.losses["kd_logits"],
                "seconds": watch.seconds[0],
                "others_share": watch.others_share,
                "loaded_gib": loaded,
                "peak_gib": memory_gib()["peak_gib"],
            }


def timed(results: dict, name: str, value: str) -> list[float]:
    """A value of every timed step of a case."""
    return [step[value] for repeat in results["runs"][name] for step in repeat[results["warmup"] :]]


def speed(results: dict, name: str) -> list[float]:
    """How much faster a case's steps are than those of the live teacher in the same rounds."""
    return [
        live / own for live, own in zip(timed(results, LIVE, "seconds"), timed(results, name, "seconds"), strict=True)
    ]


def quality_rows(results: dict) -> list[list[str]]:
    def row(name: str, of_model: dict) -> list[str]:
        size = results["bytes"].get(name)
        shown = "–" if size is None else f"{size['a token']:.0f}"
        if size and size["output"]:
            shown += f" and {size['output'] / 1e6:.0f} MB"
        return [name, shown, *(show_spread(of_model[measure], 3, "mean") for measure in MEASURES)]

    return [row("(the teacher itself)", results["teacher"])] + [row(*item) for item in results["models"].items()]


def step_rows(results: dict) -> list[list[str]]:
    tokens = results["settings"]["batch"][0] * results["settings"]["batch"][1]
    return [
        [
            name,
            show_spread(spread([tokens / seconds for seconds in timed(results, name, "seconds")]), 0),
            "–" if name == LIVE else show_spread(spread(speed(results, name)), 2),
            show_spread(spread([repeat[-1]["peak_gib"] for repeat in results["runs"][name]]), 2),
            f"{results['runs'][name][0][0]['loaded_gib']:.2f}",
        ]
        for name in results["runs"]
    ]


def verdict(results: dict) -> list[str]:
    """Whether the goals are reached by the cache that is made by default."""
    loss = MEASURES[0]
    off = results["models"][DEFAULT][loss]["mean"] - results["models"][LIVE][loss]["mean"]
    size, faster = results["bytes"][DEFAULT]["a token"], statistics.median(speed(results, DEFAULT))
    reached = "reached" if off <= MAX_LOSS and size <= MAX_BYTES and faster >= MIN_SPEED else "not reached"
    return [
        f"{DEFAULT}: {off:+.3f} nats beside the live teacher, {size:.0f} bytes a token, {faster:.2f} times as fast; "
        f"goal of at most {MAX_LOSS}, at most {MAX_BYTES} and at least {MIN_SPEED}: {reached}."
    ]


def in_markdown(results: dict) -> str:
    lines = "\n".join(f"- {line}" for line in verdict(results))
    texts, asked = results["texts"], results["settings"]
    batch, length = asked["batch"]
    tokens = ", ".join(f"{texts[name]['judged']:,} tokens of {what}" for name, what in TEXTS.items())
    note = (
        f"{asked['steps']} steps of {batch} x {length} tokens; mean (least-largest) of {len(asked['seeds'])} seeds. "
        f"Loss and KL(teacher || model) in nats per token, over {tokens}. Of steps: median (least-largest)."
    )
    quality, step = markdown_table(QUALITY, quality_rows(results)), markdown_table(STEP, step_rows(results))
    return "\n\n".join([quality, step, lines, f"{note} {describe(results['machine'])}"])


if __name__ == "__main__":
    main()
