"""What training gives back to a 2:4 sparse student, by each loss, beside a dense student that learns the same.

SmolLM2-135M is sparsified in one shot, by the default method. Then it learns with every loss: the same start, the same
batches in the same order, as many steps and tokens as the demo has. The dense control learns the same text, for text
alone would make a dense model better too. All are judged alike, by their cross-entropy and their KL from the teacher on
held-out documents and on text of another kind. Runs that are done are skipped, and one that was interrupted goes on.
"""

import copy
import re
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
from controls import MEASURES, TEXTS, describe_text, judge_once, prepare_texts, train_and_judge

NAME = "sparse_training"
TEACHER, START, CONTROL = "teacher", "2:4, untrained", "dense, CE"
CE = {"kd_logits_weight": 0.0, "lm_weight": 1.0}
# Theirs is a sum over the layers, ours a mean.
SQUAREHEAD = {"hidden.loss": "squarehead", "hidden.weight": 30.0}
ARMS = {
    "2:4, CE": CE,
    "2:4, KL": {},
    "2:4, KL + SquareHead": SQUAREHEAD,
    "2:4, CE + SquareHead": {**CE, **SQUAREHEAD},
    CONTROL: CE,
}
LR = 3e-4
COLUMNS = ["model", "corpus: loss", "corpus: KL", "licences: loss", "licences: KL"]


def main() -> None:
    options = parser(__doc__, threads=2)
    options.add_argument("--steps", type=int, default=None, help="of every run; the demo's own number if not given")
    options.add_argument("--seeds", type=int, nargs="+", default=[1234], help="of the data order")
    options.add_argument("--windows", type=int, default=32, help="at most so many windows of each text are judged")
    args = options.parse_args()
    if args.docs:
        write_docs(NAME, in_markdown)
        return
    facts = machine()
    models, work = prepare_models(args.work), args.work / NAME
    texts = in_fresh_process(prepare_texts, work, models)
    start = in_fresh_process(sparsify_teacher, models, work, args.threads)
    asked = [
        (TEACHER, (judge_once, work / TEACHER, models.teacher, models.teacher, texts, args)),
        (START, (judge_once, work / "start", start, models.teacher, texts, args)),
    ]
    for name in ARMS:
        for seed in args.seeds:
            config = settings(models, work, name, start, seed, args.steps)
            asked.append((name, (train_and_judge, config, models.teacher, texts, args, False)))
    judged: dict[str, list[dict]] = {}
    for (name, _), found in zip(asked, in_fresh_processes([call for _, call in asked], 1), strict=True):
        judged.setdefault(name, []).append(found)
    results = {
        "machine": facts,
        "settings": {
            "steps": config.steps,
            "batch": [config.global_batch, config.data.sequence_length],
            "seeds": args.seeds,
            "lr": LR,
        },
        "texts": {name: describe_text(path, args.windows) for name, path in texts.items()},
        "models": {name: {m: spread([f[m] for f in of_arm]) for m in MEASURES} for name, of_arm in judged.items()},
    }
    write_results(NAME, results)
    print_table(f"{config.steps} steps, {len(args.seeds)} seed(s)", COLUMNS, rows(results))
    console.print(describe(facts))


def sparsify_teacher(models: Models, work: Path, threads: int) -> Path:
    """The start of every sparse student: 2:4 by the default method, calibrated on the text that is learned."""
    import torch

    from minitron_megatron.config.schema import DType
    from minitron_megatron.config.sparsify import SparsifyConfig
    from minitron_megatron.sparsity.sparsify import sparsify

    torch.set_num_threads(threads)
    data = copy.deepcopy(models.recipe["distilled"].data)
    data.text, data.heldout_pct = [str(work / "train.jsonl")], 1.0
    config = SparsifyConfig(str(models.teacher), str(work / "sparse"), num_samples=64, dtype=DType.FP32, data=data)
    return sparsify(config)


def settings(models: Models, work: Path, name: str, start: Path, seed: int, steps: int | None):
    """The settings of one run: the demo's, but for who learns, the loss and the learning rate."""
    from minitron_megatron.config.loss import HiddenLoss

    config = copy.deepcopy(models.recipe["distilled"])
    config.student = str(models.teacher if name == CONTROL else start)
    config.teacher = str(models.teacher) if ARMS[name] != CE else None
    config.teacher_dtype = config.teacher_dtype if config.teacher else None
    config.output = str(work / f"{re.sub('[^a-z0-9]+', '_', name.lower())}_{seed}")
    config.steps, config.validate_every = steps or config.steps, None
    config.optimizer.lr, config.optimizer.min_lr = LR, LR / 10
    config.optimizer.warmup_steps = min(config.optimizer.warmup_steps, config.steps - 1)
    config.data.text, config.data.heldout_pct = [str(work / "train.jsonl")], 1.0
    config.seed = config.data.seed = seed
    for path, value in ARMS[name].items():
        *owners, field = path.split(".")
        owner = config.loss
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, field, HiddenLoss(value) if field == "loss" else value)
    return config


def rows(results: dict) -> list[list[str]]:
    models = results["models"]
    return [[name, *(show_spread(models[name][m], 3, "mean") for m in MEASURES)] for name in (TEACHER, START, *ARMS)]


def in_markdown(results: dict) -> str:
    texts, asked = results["texts"], results["settings"]
    tokens = ", ".join(f"{texts[name]['judged']:,} tokens of {what}" for name, what in TEXTS.items())
    batch, length = asked["batch"]
    note = (
        f"{asked['steps']} steps of {batch} x {length} tokens, peak learning rate {asked['lr']:g}, "
        f"{len(asked['seeds'])} seed(s). Loss and KL(teacher || model) in nats per token, over {tokens}. "
    )
    return f"{markdown_table(COLUMNS, rows(results))}\n\n{note}{describe(results['machine'])}"


if __name__ == "__main__":
    main()
