"""Controls: what of the demo's result is due to its pruned start, and what to its teacher?

The same student network learns from the same tokens for the same number of steps in three ways, once per seed of the
data order. The settings are those of the demo's `distilled` stage. Runs that are done are skipped, and one that was
interrupted goes on.
"""

import copy
import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import distribution
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

NAME = "controls"
ARMS = {
    "pruned start, KL": {},
    "random start, KL": {"random_init": True},
    "pruned start, text alone": {"teacher": None, "kd_logits_weight": 0.0, "lm_weight": 1.0},
}
PRUNED, TEACHER = "pruned, untrained", "teacher"
# One document in so many is held out, whatever the seed, so that all seeds are judged by the same text.
HELDOUT_EVERY = 20
# Licence texts in what `pip install` brings with torch and matplotlib on any machine: English prose, but legal.
OTHER_PACKAGES = ["matplotlib", "numpy", "pillow", "torch"]
# Shorter paragraphs are headings, names and addresses.
MIN_PARAGRAPH = 200
TEXTS = {"corpus": "held-out documents of the corpus", "other": "licence texts"}
MEASURES = ["corpus loss", "corpus KL", "other loss", "other KL"]
COLUMNS = ["model", "corpus: loss", "corpus: KL", "licences: loss", "licences: KL"]


@dataclass
class Run:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path


def main() -> None:
    options = parser(__doc__, threads=2)
    options.add_argument("--steps", type=int, default=None, help="of every run; the demo's own number if not given")
    options.add_argument("--seeds", type=int, nargs="+", default=[1234, 1235], help="of the data order")
    options.add_argument("--windows", type=int, default=None, help="at most so many windows of each text are judged")
    options.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process of its own")
    options.add_argument("--keep", action="store_true", help="keep the checkpoints, 1.2 GB a run, once they are judged")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown, draw)
        return
    facts = machine()
    models = prepare_models(args.work)
    texts = in_fresh_process(prepare_texts, args.work / NAME, models)
    base = settings(models, args.work / NAME, args.steps)
    runs = [
        Run(arm, seed, args.work / NAME / f"{base.steps}_steps" / f"{re.sub('[^a-z]+', '_', arm.lower())}_{seed}")
        for seed in args.seeds
        for arm in ARMS
    ]
    calls = [
        (judge_once, args.work / NAME / name.split(",")[0], model, models.teacher, texts, args)
        for name, model in ((TEACHER, models.teacher), (PRUNED, models.pruned))
    ] + [(train_and_judge, run_settings(base, run), models.teacher, texts, args, args.keep) for run in runs]
    names = [TEACHER, PRUNED, *(run.arm for run in runs)]
    judged: dict[str, list[dict]] = {}
    for name, found in zip(names, in_fresh_processes(calls, args.jobs), strict=True):
        judged.setdefault(name, []).append(found)
    results = {
        "machine": facts,
        "settings": {"steps": base.steps, "global_batch": base.global_batch, "seeds": args.seeds},
        "texts": {name: describe_text(path, args.windows) for name, path in texts.items()},
        "models": {name: {m: spread([f[m] for f in of_arm]) for m in MEASURES} for name, of_arm in judged.items()},
        "runs": judged,
    }
    write_results(NAME, results)
    print_table(f"{base.steps} steps, {len(args.seeds)} seeds: mean (least-largest)", COLUMNS, rows(results))
    console.print(describe(facts))


def settings(models: Models, folder: Path, steps: int | None):
    """The demo's distillation, on training text that leaves out the same documents for every seed."""
    config = copy.deepcopy(models.recipe["distilled"])
    config.teacher, config.student = str(models.teacher), str(models.pruned)
    config.steps = steps or config.steps
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.steps - 1)
    config.save_every, config.validate_every = 20, None
    config.data.text = [str(folder / "train.jsonl")]
    # Of the training text; the documents that count are left out of it already.
    config.data.heldout_pct = 1.0
    return config


def run_settings(base, run: Run):
    """The settings of one run."""
    config = copy.deepcopy(base)
    for name, value in ARMS[run.arm].items():
        owner = config.loss if name.endswith("_weight") else config
        setattr(owner, name, value)
    config.seed = config.data.seed = run.seed
    config.output = str(run.folder)
    return config


def train_and_judge(config, teacher: Path, texts: dict[str, Path], args, keep: bool) -> dict[str, float]:
    """Train by these settings, or go on, and judge what came of it; of a run that is done, what was found."""
    import torch

    from minitron_megatron import distill

    torch.set_num_threads(args.threads)
    folder = Path(config.output)
    distill(config)
    found = judge_once(folder, folder, teacher, texts, args)
    if not keep:
        # The run's manifest stays, by which it is known to be done.
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return found


def prepare_texts(folder: Path, models: Models) -> dict[str, Path]:
    """Write the training text, and the tokens of the two texts to judge by.

    Returns:
        files of tokens, by the names of `TEXTS`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    training, heldout = split_corpus(models)
    write_training_text(folder / "train.jsonl", training)
    return {
        name: write_tokens(folder / f"{name}.pt", text, models)
        for name, text in (("corpus", heldout), ("other", ["\n\n".join(licence_paragraphs())]))
    }


def split_corpus(models: Models) -> tuple[list[str], list[str]]:
    """The documents of the demo's corpus to train on, and those that are held out."""
    from minitron_megatron.data.corpus import documents

    of_corpus = [document.text for document in documents(models.recipe["distilled"].data.text)]
    first = HELDOUT_EVERY // 2
    return [d for i, d in enumerate(of_corpus) if i % HELDOUT_EVERY != first], of_corpus[first::HELDOUT_EVERY]


def write_training_text(path: Path, documents: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))


def write_tokens(path: Path, documents: Iterable[str], models: Models) -> Path:
    """Save the documents' tokens, an end of text behind each, one after another."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.teacher_hf)
    tokens = [token for document in documents for token in [*tokenizer(document).input_ids, tokenizer.eos_token_id]]
    torch.save(torch.tensor(tokens), path)
    return path


def licence_paragraphs() -> list[str]:
    """The paragraphs of all licence files of `OTHER_PACKAGES`, each paragraph once: licences quote each other."""
    paragraphs = {}
    for package in OTHER_PACKAGES:
        for file in sorted(distribution(package).files, key=str):
            if ".dist-info" in file.parts[0] and re.match(r"(?i)licen[cs]e|copying|notice", file.name):
                text = file.locate().read_text(encoding="utf-8", errors="replace")
                paragraphs.update(dict.fromkeys(" ".join(p.split()) for p in re.split(r"\n\s*\n", text)))
    return [paragraph for paragraph in paragraphs if len(paragraph) >= MIN_PARAGRAPH]


def describe_text(path: Path, windows: int | None) -> dict:
    """How much text there is, how much of it is judged, and a hash that tells whether it is the same elsewhere."""
    import torch

    tokens = torch.load(path)
    used = min(len(tokens) - 1, (windows or len(tokens)) * 512)
    return {"tokens": len(tokens), "judged": used, "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest()}


def judge_once(folder: Path, model: Path, teacher: Path, texts: dict[str, Path], args) -> dict[str, float]:
    """`judge`, or what it found before: kept in `judged.json` of `folder`."""
    path = folder / "judged.json"
    asked = {"texts": {name: describe_text(file, args.windows) for name, file in texts.items()}}
    if path.exists():
        known = json.loads(path.read_text())
        if known["texts"] == asked["texts"]:
            return known["found"]
        if not (model / "checkpoints").is_dir() and model == folder:
            raise SystemExit(
                f"{folder} was judged by other text, and its checkpoint is gone: remove it, to train again"
            )
    found = judge(model, teacher, texts, args.windows, args.threads)
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**asked, "found": found}, indent=2) + "\n")
    return found


def judge(model: Path, teacher: Path, texts: dict[str, Path], windows: int | None, threads: int) -> dict[str, float]:
    """Cross-entropy and KL(teacher || model) per token on each text, in nats."""
    import torch

    from minitron_megatron.checkpoint.dist_reader import Checkpoint
    from minitron_megatron.checkpoint.load import load_weights
    from minitron_megatron.config.loss import LossConfig
    from minitron_megatron.config.schema import DType, ParallelConfig
    from minitron_megatron.data.samples import rank_batches
    from minitron_megatron.distillation.entries import loss_entries
    from minitron_megatron.distillation.live_teacher import LiveTeacher
    from minitron_megatron.distillation.result import combine
    from minitron_megatron.distillation.step import DistillationStep
    from minitron_megatron.model.build import build_model
    from minitron_megatron.parallel.context import parallel_context
    from minitron_megatron.parallel.schedule import to_device

    torch.set_num_threads(threads)
    found = {}
    with parallel_context(ParallelConfig()) as ctx:
        model_chunks = {}
        for role, folder in (("model", model), ("teacher", teacher)):
            checkpoint = Checkpoint(folder)
            model_chunks[role] = build_model(checkpoint.network, ctx, DType.BF16)
            load_weights(model_chunks[role], checkpoint, ctx)
        loss = LossConfig(kd_logits_weight=1.0, lm_weight=1.0)
        vocab = checkpoint.network.vocab_size
        entries = loss_entries(loss, LiveTeacher(model_chunks["teacher"], ctx, vocab))
        step = DistillationStep(model_chunks["model"], entries, ctx, vocab)
        for name, path in texts.items():
            samples = as_samples(torch.load(path), windows)
            batches = to_device(rank_batches(samples, 0, len(samples), 4, 0, 1), ctx.device)
            losses = combine([step.evaluate([batch]) for batch in batches]).losses
            found |= {f"{name} loss": losses["lm"], f"{name} KL": losses["kd_logits"]}
    return found


def as_samples(tokens, windows: int | None, length: int = 512) -> list[dict]:
    """Windows in which every token but the first is predicted once; the last one is padded."""
    import torch

    starts = range(0, len(tokens) - 1, length)[:windows]
    samples = []
    for start in starts:
        window = tokens[start : start + length + 1]
        mask = (torch.arange(length) < len(window) - 1).float()
        window = torch.nn.functional.pad(window, (0, length + 1 - len(window)))
        positions = torch.arange(length)
        samples.append({"tokens": window[:-1], "labels": window[1:], "loss_mask": mask, "position_ids": positions})
    return samples


def rows(results: dict) -> list[list[str]]:
    found = []
    for name in (TEACHER, *ARMS, PRUNED):
        of_model = results["models"][name]
        cells = [
            f"{of_model[m]['mean']:.3f}" if name in (TEACHER, PRUNED) else show_spread(of_model[m], 3, "mean")
            for m in MEASURES
        ]
        found.append([name, *cells])
    return found


def in_markdown(results: dict) -> str:
    texts, asked = results["texts"], results["settings"]
    tokens = ", ".join(f"{texts[name]['judged']:,} tokens of {what}" for name, what in TEXTS.items())
    note = (
        f"{asked['steps']} steps of {asked['global_batch']} x 512 tokens, {len(asked['seeds'])} seeds: mean "
        f"(least-largest). Loss and KL(teacher || model) in nats per token, over {tokens}. "
    )
    return f"{markdown_table(COLUMNS, rows(results))}\n\n{note}{describe(results['machine'])}"


def draw(results: dict, path: Path) -> None:
    """The losses and divergences of every model: a dot per seed, the teacher's loss as a line."""
    from minitron_megatron.plotting import CUT, KEPT, MUTED, heading, label, new_figure, png, tidy

    names = [PRUNED, *ARMS]
    figure = new_figure("A pruned start and a teacher: what each is worth", 3.4)
    panels = figure.subplots(1, 2, sharey=True)
    titles = {"loss": "loss per token", "KL": "KL(teacher || model) per token"}
    colours = {"corpus": KEPT, "other": CUT}
    for axes, (measure, title) in zip(panels, titles.items(), strict=True):
        for text, shift in (("corpus", -0.1), ("other", 0.1)):
            key, colour = f"{text} {measure}", colours[text]
            for row, name in enumerate(names):
                values = [found[key] for found in results["runs"][name]]
                axes.scatter(
                    values, [row + shift] * len(values), s=34, color=colour, edgecolors="white", linewidths=0.6
                )
            if measure == "loss":
                [teacher] = results["runs"][TEACHER]
                axes.axvline(teacher[key], color=colour, linewidth=1, linestyle=":")
        tidy(axes, "nats", grid="x")
        heading(axes, title)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_yticks(range(len(names)), labels=names)
    legend = {"corpus": "corpus, held out", "other": "licence texts"}
    for i, (text, colour) in enumerate(colours.items()):
        label(panels[1], legend[text], (1, 1), (0, 16 - 12 * i), ha="right", color=colour, xycoords="axes fraction")
    label(panels[0], "dotted: the teacher", (1, 1), (0, 4), ha="right", color=MUTED, xycoords="axes fraction")
    path.write_bytes(png(figure))


if __name__ == "__main__":
    main()
