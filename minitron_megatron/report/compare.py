"""The verb `compare`: shows evaluations side by side, and how much of the first model the others recover."""

import math
import statistics
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from minitron_megatron.artifacts.lease import sole_writer
from minitron_megatron.config.schema import CompareConfig
from minitron_megatron.evaluation.tasks import show
from minitron_megatron.files import write_atomically, write_json
from minitron_megatron.report.results import Evaluation

MARKDOWN, JSON = "comparison.md", "comparison.json"


@dataclass
class Value:
    """One number of one model.

    Attributes:
        value: the number.
        stderr: its standard error, if known.
        recovery: share of the teacher's number, in percent; None if neither higher nor lower is better.
        recovery_stderr: its standard error, in percent, if known.
    """

    value: float
    stderr: float | None = None
    recovery: float | None = None
    recovery_stderr: float | None = None

    def show(self, digits: int) -> str:
        recovery = "" if self.recovery is None else f" ({show(self.recovery, self.recovery_stderr, 1)}%)"
        return show(self.value, self.stderr, digits) + recovery


@dataclass
class Measure:
    """One number of every model, in order; None where it is unknown.

    Attributes:
        name: of the number.
        values: of the models.
        digits: decimals to show.
    """

    name: str
    values: list[Value | None]
    digits: int = 4

    @property
    def cells(self) -> list[str]:
        return [self.name, *("–" if value is None else value.show(self.digits) for value in self.values)]


@sole_writer
def compare(config: CompareConfig) -> None:
    """Shows earlier evaluations side by side; the first one is the teacher's.

    Raises:
        CheckpointError: a folder is not an evaluation.
    """
    folders = [Path(folder) for folder in config.evaluations]
    count = Counter(folder.name for folder in folders)
    evaluations = [
        Evaluation.read(folder, folder.name if count[folder.name] == 1 else str(folder)) for folder in folders
    ]
    measures = model_measures(evaluations) + task_measures(evaluations, evaluations[0])
    averaged = averaged_metrics(evaluations)
    notes = [f"averaged are {', '.join(map(' '.join, averaged))}"] if len(averaged) > 1 else []
    notes += differences(evaluations)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for number, column in enumerate(header(evaluations)):
        table.add_column(Text(column), justify="right" if number else "left")
    for measure in measures:
        table.add_row(*map(Text, measure.cells))
    # A file has no width, and wrapped lines cannot be searched.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    console.print(table)
    for note in notes:
        console.print(Text(note, style="yellow"))
    if config.output:
        output = Path(config.output)
        output.mkdir(parents=True, exist_ok=True)
        write_atomically(output / MARKDOWN, _markdown(header(evaluations), measures, notes))
        values = {"models": [e.name for e in evaluations], "measures": [asdict(m) for m in measures], "notes": notes}
        write_json(output / JSON, values)


def header(evaluations: list[Evaluation]) -> list[str]:
    """Returns the titles of the columns of `Measure.cells`."""
    return ["", *(evaluation.name for evaluation in evaluations)]


def model_measures(evaluations: list[Evaluation]) -> list[Measure]:
    """Returns size, held-out loss and perplexity, and speed; the first model is the teacher."""
    teacher = evaluations[0]
    speeds = [None if e.generation is None else Value(e.generation["tokens_per_s"]) for e in evaluations]
    return [
        Measure(
            "parameters", [Value(e.parameters, None, 100 * e.parameters / teacher.parameters) for e in evaluations], 0
        ),
        Measure("held-out loss", [Value(e.loss) for e in evaluations]),
        Measure(
            "held-out perplexity",
            [Value(e.perplexity, None, _recovery(e.perplexity, teacher.perplexity, False)) for e in evaluations],
            2,
        ),
        *([Measure("tokens/s", speeds, 1)] if any(speeds) else []),
    ]


def task_measures(evaluations: list[Evaluation], teacher: Evaluation | None) -> list[Measure]:
    """Returns every metric of every task that any of the models was evaluated on, and the average of the tasks."""
    names = {(task, metric): None for e in evaluations for task in e.tasks for metric in e.tasks[task]["metrics"]}
    measures = [Measure(" ".join(name), [_value(e, teacher, [name]) for e in evaluations]) for name in names]
    averaged = averaged_metrics(evaluations)
    if len(averaged) > 1:
        measures.append(
            Measure(f"average of {len(averaged)} tasks", [_value(e, teacher, averaged) for e in evaluations])
        )
    return measures


def averaged_metrics(evaluations: list[Evaluation]) -> list[tuple[str, str]]:
    """Returns task and metric of what is averaged: the share of right answers of every task that all models were given.

    That is `acc_norm` where there is one, and else the first metric of which more is better. A group counts once.
    """

    def is_share(task: str, metric: str) -> bool:
        scores = [_metric(e, task, metric) for e in evaluations]
        return all(score and score["higher_is_better"] and 0 <= score["value"] <= 1 for score in scores)

    chosen = []
    for task, own in (evaluations[0].tasks if evaluations else {}).items():
        metrics = [metric for metric in own["metrics"] if is_share(task, metric)]
        if metrics and not own.get("part_of"):
            chosen.append((task, "acc_norm" if "acc_norm" in metrics else metrics[0]))
    return chosen


def _value(evaluation: Evaluation, teacher: Evaluation | None, names: list[tuple[str, str]]) -> Value | None:
    """Returns the mean of metrics of a model, and what it recovers of the teacher's; None if it lacks one.

    A recovery is the quotient of both models' means. Both answer the same questions, so its standard error is that of
    the differences between their answers, of tasks that are independent of each other (the delta method).
    """
    own, best = ([score for name in names if (score := _metric(e, *name))] for e in (evaluation, teacher))
    if len(own) < len(names):
        return None
    value = statistics.fmean(score["value"] for score in own)
    errors = [score["stderr"] for score in own]
    found = Value(value, None if None in errors else math.hypot(*errors) / len(errors))
    if teacher is None or len(best) < len(names):
        return found
    whole, is_higher = statistics.fmean(score["value"] for score in best), own[0]["higher_is_better"]
    found.recovery = _recovery(value, whole, is_higher)
    if found.recovery is not None and evaluation is not teacher:
        part, other = (evaluation, teacher) if is_higher else (teacher, evaluation)
        variances = [_variance(part, other, name, found.recovery / 100) for name in names]
        known = [variance for variance in variances if variance is not None]
        if len(known) == len(names):
            found.recovery_stderr = 100 * math.sqrt(sum(known)) / (len(names) * (whole if is_higher else value))
    return found


def _variance(part: Evaluation, whole: Evaluation, name: tuple[str, str], ratio: float) -> float | None:
    """Returns the variance of the mean of `part - ratio * whole` over a task's questions; None if not known."""
    task, metric = name
    own, other = (e.questions.get(task, {}).get(metric, []) for e in (part, whole))
    if len(own) < 2 or len(own) != len(other):
        return None
    return statistics.variance(a - ratio * b for a, b in zip(own, other, strict=True)) / len(own)


def differences(evaluations: list[Evaluation]) -> list[str]:
    """Returns what makes the numbers of the models not comparable, one sentence each."""
    notes = []
    if len({e.num_tokens for e in evaluations}) > 1:
        numbers = ", ".join(f"{e.num_tokens:,} of {e.name}" for e in evaluations)
        notes.append(f"held-out tokens differ ({numbers}): loss and perplexity are of other text, or another tokenizer")
    for task in {task: None for e in evaluations for task in e.tasks}:
        having = [e for e in evaluations if task in e.tasks]
        for key, what in (("num_fewshot", "examples"), ("num_samples", "questions"), ("version", "version")):
            if len({e.tasks[task][key] for e in having}) > 1:
                values = ", ".join(f"{e.tasks[task][key]} of {e.name}" for e in having)
                notes.append(f"{task} was not the same for all: {what} {values}")
    return notes


def _metric(evaluation: Evaluation | None, task: str, metric: str) -> dict | None:
    return evaluation.tasks.get(task, {}).get("metrics", {}).get(metric) if evaluation else None


def _recovery(value: float, teacher: float, higher_is_better: bool | None) -> float | None:
    """Returns a model's share of its teacher's number, in percent; the inverse if lower is better."""
    part, whole = (value, teacher) if higher_is_better else (teacher, value)
    is_share = higher_is_better is not None and 0 < whole < math.inf and math.isfinite(part)
    return 100 * part / whole if is_share else None


def _markdown(header: list[str], measures: list[Measure], notes: list[str]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *(measure.cells for measure in measures)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + "".join(f"\n{note}\n" for note in notes)
