"""Criteria: which score picks the best channels, neurons, heads and layers to keep, before any training?

SmolLM2-135M is pruned to the demo's width by every aggregation of activations, by the size of weights and by chance,
and to two thirds of its layers by every depth criterion and search. Held-out loss tells how much is left. Every
calibration seed is another draw of sequences; held-out text is the same for all. What was measured already is kept and
not measured again.
"""

import json
from pathlib import Path

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
    write_docs,
    write_results,
)

NAME = "pruning_criteria"
WIDTH = {"hidden": 448, "ffn": 1152}
LAYERS = 20
# Zero-shot LM loss of 15B pruned to 8B, by aggregation over (sequence, batch): 2407.14679, Table 13, which writes the
# pair as (batch, sequence).
PAPER = {
    ("mean", "l2"): 7.18,
    ("mean", "mean"): 7.21,
    ("variance", "mean"): 7.94,
    ("variance", "l2"): 8.18,
    ("mean", "variance"): 8.34,
    ("l2", "mean"): 8.41,
    ("l2", "l2"): 8.73,
    ("l2", "variance"): 9.01,
    ("variance", "variance"): 10.55,
}
SEARCHES = {"single": "one by one", "block": "contiguous block", "greedy": "one after another"}
CRITERIA = {
    "block_influence": "Block Influence",
    "loss": "loss increase",
    "kl": "KL of the predictions",
    "logits": "change of the logits",
    "accuracy": "right answers lost",
}
# Which of so many texts goes on like this? One is the true end of a window, the others are of other windows.
CHOICES, CONTEXT_TOKENS, CHOICE_TOKENS = 3, 80, 16
WIDTH_COLUMNS = ["criterion", "over tokens", "over sequences", "held-out loss", "paper, 15B to 8B"]
DEPTH_COLUMNS = ["criterion", *SEARCHES.values()]


def main() -> None:
    options = parser(__doc__, threads=2)
    options.add_argument("--seeds", type=int, default=3, help="draws of calibration sequences, for width")
    options.add_argument("--depth-seeds", type=int, default=3, help="the same for depth, where a greedy search is long")
    options.add_argument("--samples", type=int, default=64, help="calibration sequences of 512 tokens, for width")
    options.add_argument("--depth-samples", type=int, default=16, help="the same for depth")
    options.add_argument("--greedy-samples", type=int, default=4, help="the same for a greedy search")
    options.add_argument("--questions", type=int, default=50, help="of a draw, for right answers lost")
    options.add_argument("--greedy-questions", type=int, default=16, help="the same for a greedy search")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown, draw)
        return
    facts = machine()
    models = prepare_models(args.work)
    known = Known(args.work / f"{NAME}.jsonl")
    in_fresh_process(measure, models.teacher, models.recipe["scores"].data, known, args)
    settings = {name: value for name, value in vars(args).items() if isinstance(value, int)}
    results = {"machine": facts, "settings": settings, "losses": known.by_kind()}
    write_results(NAME, results)
    print_table("width: held-out loss, median (least-largest)", WIDTH_COLUMNS, width_rows(results))
    print_table("depth: held-out loss, median (least-largest)", DEPTH_COLUMNS, depth_rows(results))
    console.print(describe(facts))


class Known:
    """Losses that were measured already: a line of JSON each."""

    def __init__(self, path: Path):
        self.path = path

    def get(self, kind: str, seed: int, of) -> float:
        """The loss under a name and seed, measured by `of` if it is not known."""
        found = self.losses().get((kind, seed))
        if found is None:
            found = of()
            with open(self.path, "a") as f:
                f.write(json.dumps([kind, seed, found]) + "\n")
            print(f"{kind}, draw {seed}: {found:.4f}", flush=True)
        return found

    def by_kind(self) -> dict[str, list[float]]:
        """All losses that are known, in the order of their seeds."""
        found: dict[str, list[float]] = {}
        for (kind, _), loss in sorted(self.losses().items()):
            found.setdefault(kind, []).append(loss)
        return found

    def losses(self) -> dict:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        return {(kind, seed): loss for kind, seed, loss in map(json.loads, lines)}


def measure(teacher: Path, data, known: Known, args) -> None:
    """Score, cut and judge, all in memory."""
    import torch

    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.config.schema import (
        Aggregation,
        Criterion,
        DepthConfig,
        DepthCriterion,
        DepthSearch,
        DType,
        ParallelConfig,
        ScoreConfig,
        TargetConfig,
    )
    from minitron_megatron.data.choices import ChoiceSamples
    from minitron_megatron.data.encoding import load_tokenizer
    from minitron_megatron.data.samples import heldout_samples, rank_batches, training_samples
    from minitron_megatron.data.tokens import prepare_corpus
    from minitron_megatron.distillation.objectives import CrossEntropy, Entry
    from minitron_megatron.distillation.result import combine
    from minitron_megatron.distillation.step import DistillationStep
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.pruning.make_plan import make_plan
    from minitron_megatron.pruning.resumable_sums import ResumableSums
    from minitron_megatron.pruning.score_model import score_model
    from minitron_megatron.pruning.slicing import Pruned

    torch.set_num_threads(args.threads)
    checkpoint = Checkpoint(teacher)
    corpus = prepare_corpus(data, checkpoint.huggingface_folder)
    with parallel_context(ParallelConfig()) as ctx:
        whole = build_model(checkpoint.network, ctx, DType.BF16)
        load_weights(whole, checkpoint, ctx)
        heldout = heldout_samples(corpus, data)
        tokenizer = load_tokenizer(checkpoint.huggingface_folder)

        def judge(source) -> float:
            model_chunks = whole
            if source is not checkpoint:
                model_chunks = build_model(source.network, ctx, DType.BF16)
                load_weights(model_chunks, source, ctx)
            step = DistillationStep(model_chunks, [Entry(None, CrossEntropy())], ctx, source.network.vocab_size)
            batches = rank_batches(heldout, 0, len(heldout), 4, 0, 1)
            return combine([step.evaluate([batch]) for batch in batches]).losses["lm"]

        per_draw = max(args.samples, args.depth_samples, args.greedy_samples)
        pool = training_samples(corpus, data, per_draw * max(args.seeds, args.depth_seeds))

        def score(draw: int, num_samples: int, num_questions=0, resumable=None, **settings):
            drawn = [pool[draw * per_draw + i] for i in range(per_draw)]
            choices = ChoiceSamples(questions(drawn, tokenizer, num_questions), tokenizer, 1) if num_questions else None
            config = ScoreConfig(num_samples=num_samples, **settings)
            return score_model(whole, checkpoint.network, ctx, drawn[:num_samples], config, choices, resumable)

        def loss_of(scores, criterion=None, **target) -> float:
            return judge(Pruned(checkpoint, make_plan(scores, TargetConfig(**target), depth_criterion=criterion)))

        known.get("teacher", 0, lambda: judge(checkpoint))
        no_depth = DepthConfig(criteria=[])
        for seed in range(args.seeds):
            # What is summed over the tokens serves every aggregation over the sequences.
            sums = {tokens: ResumableSums(ctx, ScoreConfig.micro_batch) for tokens, _ in PAPER}
            for tokens, sequences in PAPER:
                how = {"sequence_aggregation": Aggregation(tokens), "batch_aggregation": Aggregation(sequences)}
                how |= {"partial": sums[tokens], "depth": no_depth}
                known.get(
                    f"activation {tokens} {sequences}",
                    seed,
                    lambda seed=seed, how=how: loss_of(score(seed, args.samples, **how), **WIDTH),
                )
            # Weights know nothing of the draw, and chance of nothing but its seed.
            for criterion in (Criterion.WEIGHT, Criterion.RANDOM):
                settings = {"criterion": criterion, "seed": seed, "depth": no_depth}
                known.get(
                    criterion.value,
                    seed,
                    lambda settings=settings: loss_of(score(0, args.samples, **settings), **WIDTH),
                )
        criteria = [DepthCriterion(name) for name in CRITERIA]
        by_weight = {"criterion": Criterion.WEIGHT}
        headed = {**by_weight, "target": TargetConfig(layers=LAYERS)}
        for seed in range(args.depth_seeds):
            for search, how in {"single": by_weight, "block": headed}.items():
                depth = DepthConfig(criteria=criteria, search=DepthSearch(search))
                scores = None
                for criterion in criteria:
                    if (f"{criterion.value} {search}", seed) not in known.losses():
                        scores = scores or score(seed, args.depth_samples, args.questions, depth=depth, **how)
                    known.get(
                        f"{criterion.value} {search}",
                        seed,
                        lambda scores=scores, criterion=criterion: loss_of(scores, criterion, layers=LAYERS),
                    )
            for criterion in criteria:
                depth = DepthConfig(criteria=[criterion], search=DepthSearch.GREEDY)
                asked = args.greedy_questions if criterion is DepthCriterion.ACCURACY else 0
                known.get(
                    f"{criterion.value} greedy",
                    seed,
                    lambda seed=seed, depth=depth, asked=asked: loss_of(
                        score(seed, args.greedy_samples, asked, depth=depth, **headed), layers=LAYERS
                    ),
                )


def questions(samples: list, tokenizer, count: int) -> list:
    """Questions whose right answer is always the first choice; the order plays no part in the losses of choices."""
    from minitron_megatron.data.choices import Question

    stride = CONTEXT_TOKENS + CHOICE_TOKENS
    tokens = [token for sample in samples for token in sample["tokens"].tolist()]
    pieces = [tokens[start : start + stride] for start in range(0, len(tokens) - stride, stride)][:count]
    ends = [tokenizer.decode(piece[CONTEXT_TOKENS:]) for piece in pieces]
    return [
        Question(
            tokenizer.decode(piece[:CONTEXT_TOKENS]),
            [ends[(number + 7 * other) % len(ends)] for other in range(CHOICES)],
            0,
        )
        for number, piece in enumerate(pieces)
    ]


def width_rows(results: dict) -> list[list[str]]:
    losses = results["losses"]
    rows = []
    for (tokens, sequences), paper in PAPER.items():
        found = show_spread(spread(losses[f"activation {tokens} {sequences}"]), 3)
        rows.append(["activation", tokens, sequences, found, f"{paper:.2f}"])
    rows += [[name, "–", "–", show_spread(spread(losses[name]), 3), "–"] for name in ("weight", "random")]
    return rows


def depth_rows(results: dict) -> list[list[str]]:
    def shown(name: str) -> str:
        found = results["losses"].get(name)
        return show_spread(spread(found), 3) if found else "–"

    return [[title, *(shown(f"{name} {search}") for search in SEARCHES)] for name, title in CRITERIA.items()]


def in_markdown(results: dict) -> str:
    asked, [teacher] = results["settings"], results["losses"]["teacher"]
    return "\n\n".join(
        [
            f"To hidden {WIDTH['hidden']} and ffn {WIDTH['ffn']}, all layers; the whole model has {teacher:.3f}:",
            markdown_table(WIDTH_COLUMNS, width_rows(results)),
            f"To {LAYERS} of 30 layers, the first and the last one protected:",
            markdown_table(DEPTH_COLUMNS, depth_rows(results)),
            f"Held-out loss in nats per token, right after the cut: median (least-largest) over {asked['seeds']} draws "
            f"of {asked['samples']} calibration sequences of 512 tokens; for depth over {asked['depth_seeds']} of "
            f"{asked['depth_samples']}, and one after another of {asked['greedy_samples']}. "
            f"Right answers are of {asked['questions']} questions ({asked['greedy_questions']} one after another), "
            f"which of {CHOICES} texts goes on like this. "
            f"{describe(results['machine'])}",
        ]
    )


def draw(results: dict, path: Path) -> None:
    """Losses by criterion, a dot per draw: width beside the paper's order, and depth."""
    from minitron_megatron.plotting import CUT, INK, KEPT, MUTED, heading, label, new_figure, png, tidy

    losses, [teacher] = results["losses"], results["losses"]["teacher"]
    figure = new_figure(f"Held-out loss right after pruning, by criterion; {teacher:.2f} before", 4.4)
    left, right = figure.subplots(1, 2)
    names = [f"activation {t} {s}" for t, s in PAPER] + ["weight", "random"]
    for row, name in enumerate(names):
        colour = KEPT if name.startswith("activation") else MUTED
        left.scatter(losses[name], [row] * len(losses[name]), s=30, color=colour, edgecolors="white", linewidths=0.6)
    left.set_yticks(range(len(names)), labels=[n.removeprefix("activation ").replace(" ", ", ") for n in names])
    left.set_ylim(len(names) - 0.5, -0.5)
    tidy(left, "nats", grid="x")
    heading(left, "width: over tokens, over sequences; in the paper's order")
    colours = dict(zip(SEARCHES, (KEPT, CUT, INK), strict=True))
    for row, name in enumerate(CRITERIA):
        for shift, (search, colour) in zip((-0.2, 0, 0.2), colours.items(), strict=True):
            values = losses.get(f"{name} {search}", [])
            right.scatter(values, [row + shift] * len(values), s=30, color=colour, edgecolors="white", linewidths=0.6)
    right.set_yticks(range(len(CRITERIA)), labels=list(CRITERIA.values()))
    right.set_ylim(len(CRITERIA) - 0.5, -0.5)
    tidy(right, "nats", grid="x")
    heading(right, f"depth: {LAYERS} of 30 layers")
    for i, (search, colour) in enumerate(colours.items()):
        label(right, SEARCHES[search], (1, 1), (-4, -16 - 14 * i), ha="right", color=colour, xycoords="axes fraction")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(figure))


if __name__ == "__main__":
    main()
