"""The verb `compare`: shows evaluations side by side, and how much of the first model the others recover."""

import math
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
    """

    value: float
    stderr: float | None = None
    recovery: float | None = None

    def show(self, digits: int) -> str:
        recovery = "" if self.recovery is None else f" ({self.recovery:.1f}%)"
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
    notes = differences(evaluations)
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
    """Returns every metric of every task that any of the models was evaluated on."""
    names = {(task, metric): None for e in evaluations for task in e.tasks for metric in e.tasks[task]["metrics"]}

    def value(evaluation: Evaluation, task: str, metric: str) -> Value | None:
        own, best = (_metric(e, task, metric) for e in (evaluation, teacher))
        if own is None:
            return None
        recovery = _recovery(own["value"], best["value"], own["higher_is_better"]) if best else None
        return Value(own["value"], own["stderr"], recovery)

    return [Measure(" ".join(name), [value(e, *name) for e in evaluations]) for name in names]


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
