"""What a student should minimise: losses, temperatures, hidden states and teacher correction, side by side.

Two students of SmolLM2-135M, a narrower one and one of half the layers, learn in turn with every loss: the same
starting weights, the same batches in the same order, the same number of steps. Then all are judged alike: by their
cross-entropy and their KL from the original teacher, on held-out documents and on text of another kind. Teachers are
also corrected on a text that none has seen: the corpus with its words substituted. Runs that are done are skipped, and
one that was interrupted goes on.
"""

import copy
import dataclasses
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from common import (
    Models,
    console,
    describe,
    in_fresh_process,
    in_fresh_processes,
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
from controls import (
    MEASURES,
    TEXTS,
    describe_text,
    judge_once,
    prepare_texts,
    split_corpus,
    train_and_judge,
    write_tokens,
    write_training_text,
)

NAME = "losses"
TARGETS = {"width": {"hidden": 448, "ffn": 1152}, "depth": {"layers": 15}}
TEACHER, CORRECTED = "teacher", "corrected teacher"
SUBSTITUTED = "substituted: "
# Words are substituted by others about as frequent: those of so many ranks in a row change places.
RANKS = 100
WORD = "[A-Za-z]{3,}"
STUDENTS = {student: f"{student} student, untrained" for student in TARGETS}
# A fifth of the rate that the teacher was trained with at most (2408.11796, section 2.1, of its own teacher).
TEACHER_LR = 2e-4
LR, WARMUP_SHARE = 1e-3, 10


@dataclass(frozen=True)
class Arm:
    """One way of learning.

    Attributes:
        student: whose weights it starts from.
        loss: changes to the settings of the loss, by their dotted names.
        teacher: the original one, the corrected one, or None.
        teacher_lr: of a teacher that is corrected in parallel.
        substituted: whether the text is the corpus with its words substituted.
    """

    student: str
    loss: dict = field(default_factory=dict, hash=False)
    teacher: str | None = TEACHER
    teacher_lr: float | None = None
    substituted: bool = False


CE = {"kd_logits_weight": 0.0, "lm_weight": 1.0}
STATES = {"hidden.weight": 1.0, "hidden.balance": "dynamic", "hidden.points": ["layer", "embedding"]}
PROJECTED = {**STATES, "hidden.projection": "shared"}
CORRECTIONS = {
    CORRECTED: Arm(TEACHER, CE, teacher=None),
    SUBSTITUTED + CORRECTED: Arm(TEACHER, CE, teacher=None, substituted=True),
}
ARMS = {
    "KL": Arm("width"),
    "CE + KL": Arm("width", {"lm_weight": 1.0}),
    "CE + cosine": Arm("width", {"lm_weight": 1.0, "logits.divergence": "cosine"}),
    "CE + reverse KL": Arm("width", {"lm_weight": 1.0, "logits.divergence": "reverse_kl"}),
    "CE + MSE": Arm("width", {"lm_weight": 1.0, "logits.divergence": "mse"}),
    "CE": Arm("width", CE, teacher=None),
    "KL, temperature 0.5": Arm("width", {"logits.temperature": 0.5}),
    "KL, temperature 2": Arm("width", {"logits.temperature": 2.0}),
    "KL + states 26:26": Arm("width", {**PROJECTED, "hidden.pairs": [[26, 26]]}),
    "KL + states 14:29": Arm("width", {**PROJECTED, "hidden.pairs": [[29, 14]]}),
    "depth: KL": Arm("depth"),
    "depth: KL + states 26:11": Arm("depth", {**STATES, "hidden.pairs": [[11, 26]]}),
    "depth: KL + states, end-aligned": Arm("depth", {**STATES, "hidden.map": "end_aligned"}),
    "depth: KL + states 14:14": Arm("depth", {**STATES, "hidden.pairs": [[14, 14]]}),
    "KL, teacher corrected before": Arm("width", teacher=CORRECTED),
    "KL, teacher corrected in parallel": Arm("width", teacher_lr=TEACHER_LR),
}
SUBSTITUTED_ARMS = {
    SUBSTITUTED + "KL": Arm("width", substituted=True),
    SUBSTITUTED + "KL, teacher corrected before": Arm("width", teacher=SUBSTITUTED + CORRECTED, substituted=True),
    SUBSTITUTED + "KL, teacher corrected in parallel": Arm("width", teacher_lr=TEACHER_LR, substituted=True),
    SUBSTITUTED + "CE": Arm("width", CE, teacher=None, substituted=True),
}
COLUMNS = ["learned by", "corpus: loss", "corpus: KL", "licences: loss", "licences: KL"]


def main() -> None:
    options = parser(__doc__, threads=2)
    options.add_argument("--steps", type=int, default=40, help="of every run")
    options.add_argument("--seeds", type=int, nargs="+", default=[1234, 1235], help="of the data order")
    options.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    options.add_argument("--windows", type=int, default=16, help="at most so many windows of each text are judged")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown, draw)
        return
    facts = machine()
    models = prepare_models(args.work)
    work = args.work / NAME
    texts = in_fresh_process(prepare_texts, work, models)
    substituted = {**texts, "corpus": in_fresh_process(prepare_substituted, work, models)}
    students = {name: in_fresh_process(prune_to, args.work, work / name, name) for name in TARGETS}
    judged: dict[str, list[dict]] = {}

    def judge_all(calls: list[tuple[str, tuple]]) -> None:
        """Keep what each call finds under the name before it."""
        found = in_fresh_processes([call for _, call in calls], args.jobs)
        for (name, _), of_call in zip(calls, found, strict=True):
            judged.setdefault(name, []).append(of_call)

    def folder_of(name: str, seed: int) -> Path:
        return work / f"{args.steps}_steps" / f"{re.sub('[^a-z0-9]+', '_', name.lower())}_{seed}"

    def learning(name: str, arm: Arm, keep: bool = False) -> list[tuple[str, tuple]]:
        calls = []
        for seed in args.seeds:
            starts = {**students, TEACHER: models.teacher} | {name: folder_of(name, seed) for name in CORRECTIONS}
            config = settings(models, work, arm, starts, folder_of(name, seed), seed, args.steps)
            judged_by = substituted if arm.substituted else texts
            calls.append((name, (train_and_judge, config, models.teacher, judged_by, args, keep)))
        return calls

    untrained = [
        (TEACHER, models.teacher, texts),
        *((STUDENTS[name], folder, texts) for name, folder in students.items()),
        (SUBSTITUTED + TEACHER, models.teacher, substituted),
        (SUBSTITUTED + STUDENTS["width"], students["width"], substituted),
    ]
    judge_all(
        [
            (name, (judge_once, work / name.split(",")[0], model, models.teacher, judged_by, args))
            for name, model, judged_by in untrained
        ]
    )
    judge_all([call for name, arm in CORRECTIONS.items() for call in learning(name, arm, keep=True)])
    judge_all([call for name, arm in (ARMS | SUBSTITUTED_ARMS).items() for call in learning(name, arm)])
    config = settings(models, work, ARMS["KL"], {**students, TEACHER: models.teacher}, work, 0, args.steps)
    results = {
        "machine": facts,
        "settings": {
            "steps": args.steps,
            "batch": [config.global_batch, config.data.sequence_length],
            "seeds": args.seeds,
            "targets": TARGETS,
            "lr": LR,
            "teacher_lr": TEACHER_LR,
        },
        "texts": {
            name: describe_text(path, args.windows)
            for name, path in {**texts, "substituted": substituted["corpus"]}.items()
        },
        "models": {name: {m: spread([f[m] for f in of_arm]) for m in MEASURES} for name, of_arm in judged.items()},
    }
    write_results(NAME, results)
    print_table(f"{args.steps} steps, {len(args.seeds)} seeds", COLUMNS, rows(results))
    print_table("words substituted", COLUMNS, substituted_rows(results))
    console.print(describe(facts))


def prune_to(work: Path, output: Path, name: str) -> Path:
    """A student, by the demo's scores."""
    from minitron_megatron import prune
    from minitron_megatron.config.schema import PruneConfig, TargetConfig

    target = TargetConfig(**TARGETS[name])
    return prune(PruneConfig(str(work / "teacher"), str(output), scores=str(work / "scores"), target=target))


def prepare_substituted(folder: Path, models: Models) -> Path:
    """Write the corpus with its words substituted: its training text, and the tokens of what is held out.

    Returns:
        the file of tokens.
    """
    training, heldout = split_corpus(models)
    substitute = substitution([*training, *heldout])
    write_training_text(training_text(folder, True), map(substitute, training))
    return write_tokens(folder / "substituted.pt", map(substitute, heldout), models)


def substitution(documents: list[str]) -> Callable[[str], str]:
    """What puts another word, always the same one, for every word of three letters or more.

    A language of the corpus's own grammar, punctuation and markup, whose words do not mean what a model has learned; of
    one word in a hundred that is not true.
    """
    counts = Counter(word.lower() for document in documents for word in re.findall(WORD, document))
    words = sorted(counts, key=lambda word: (-counts[word], word))
    other, order = {}, random.Random(0)
    for first in range(0, len(words), RANKS):
        near = words[first : first + RANKS]
        other |= dict(zip(near, order.sample(near, len(near)), strict=True))

    def of_word(match: re.Match) -> str:
        word = match[0]
        found = other[word.lower()]
        return found.upper() if word.isupper() else found.capitalize() if word[0].isupper() else found

    return lambda document: re.sub(WORD, of_word, document)


def training_text(folder: Path, substituted: bool) -> Path:
    return folder / ("substituted.jsonl" if substituted else "train.jsonl")


def settings(models: Models, work: Path, arm: Arm, starts: dict[str, Path], output: Path, seed: int, steps: int):
    """The settings of one run: the demo's, but for a shorter sequence, the loss, and who learns from whom."""
    from minitron_megatron.config.loss import Balance, Divergence, LayerMap, Projection

    config = copy.deepcopy(models.recipe["distilled"])
    config.student, config.output = str(starts[arm.student]), str(output)
    config.teacher = str(starts[arm.teacher]) if arm.teacher else None
    config.teacher_lr = arm.teacher_lr
    config.steps, config.validate_every, config.save_every = steps, None, None
    lr = TEACHER_LR if arm.student == TEACHER else LR
    warmup = max(1, steps // WARMUP_SHARE)
    config.optimizer = dataclasses.replace(config.optimizer, lr=lr, min_lr=lr / 10, warmup_steps=warmup)
    config.data.text, config.data.heldout_pct = [str(training_text(work, arm.substituted))], 1.0
    config.data.sequence_length = 256
    config.seed = config.data.seed = seed
    kinds = {"divergence": Divergence, "balance": Balance, "projection": Projection, "map": LayerMap}
    for path, value in arm.loss.items():
        *owners, name = path.split(".")
        owner = config.loss
        for part in owners:
            owner = getattr(owner, part)
        value = kinds.get(name, lambda value: value)(value)
        setattr(owner, name, value)
    return config


def rows(results: dict) -> list[list[str]]:
    return rows_of(results, [TEACHER, CORRECTED, *ARMS, *STUDENTS.values()])


def substituted_rows(results: dict) -> list[list[str]]:
    """The same of the text with other words, of the student that learns it."""
    others = [SUBSTITUTED + name for name in (TEACHER, CORRECTED, STUDENTS["width"])]
    return rows_of(results, [*others[:2], *SUBSTITUTED_ARMS, others[2]])


def rows_of(results: dict, names: list[str]) -> list[list[str]]:
    models = results["models"]
    return [
        [name.removeprefix(SUBSTITUTED), *(show_spread(models[name][m], 3, "mean") for m in MEASURES)] for name in names
    ]


def in_markdown(results: dict) -> str:
    texts, asked = results["texts"], results["settings"]
    tokens = ", ".join(f"{texts[name]['judged']:,} tokens of {what}" for name, what in TEXTS.items())
    batch, length = asked["batch"]
    note = (
        f"{asked['steps']} steps of {batch} x {length} tokens, peak learning rate {asked['lr']:g} (of a teacher "
        f"{asked['teacher_lr']:g}), {len(asked['seeds'])} seed(s). Loss and KL(original teacher || model) in nats per "
        f"token, over {tokens}. "
    )
    judged = texts["substituted"]["judged"]
    return "\n\n".join(
        [
            markdown_table(COLUMNS, rows(results)),
            f"With the words of the corpus substituted, by {judged:,} tokens of what is held out:",
            markdown_table(COLUMNS, substituted_rows(results)),
            note + describe(results["machine"]),
        ]
    )


def draw(results: dict, path: Path) -> None:
    """Each way's loss and divergence on the corpus, as dots on a line, beside the untrained student's way of it."""
    from minitron_megatron.plotting import CUT, KEPT, heading, new_figure, png, tidy

    names = list(ARMS)
    figure = new_figure("What a student minimises, and what it then can", 5.2)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (measure, title) in zip(
        panels, {"loss": "loss per token", "KL": "KL from the teacher"}.items(), strict=True
    ):
        for row, name in enumerate(names):
            values = results["models"][name][f"corpus {measure}"]
            colour = CUT if ARMS[name].student == "depth" else KEPT
            axes.plot([values["min"], values["max"]], [row, row], color=colour, linewidth=1)
            axes.scatter(values["mean"], row, s=34, color=colour, edgecolors="white", linewidths=0.6)
        tidy(axes, "nats", grid="x")
        heading(axes, title)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), labels=names)
    path.write_bytes(png(figure))


if __name__ == "__main__":
    main()
