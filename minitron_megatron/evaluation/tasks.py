"""Loads and runs tasks of EleutherAI's lm-eval harness, and formats their results."""

from __future__ import annotations

import difflib
import importlib.util
import math
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from minitron_megatron.config.schema import EvaluateConfig
from minitron_megatron.data.encoding import load_tokenizer
from minitron_megatron.errors import ConfigError, DataError, raise_if_any

if TYPE_CHECKING:
    from lm_eval.api.model import LM


def task_problems(config: EvaluateConfig) -> list[str]:
    """Returns why tasks cannot be run here, one sentence each."""
    if not config.tasks:
        return []
    problems = []
    if importlib.util.find_spec("lm_eval") is None:
        problems.append(f"tasks = {config.tasks} need lm-eval, which is not installed: pip install -e '.[eval]'")
    if config.task_dir and not Path(config.task_dir).is_dir():
        problems.append(f"task_dir = {config.task_dir} is not a folder: name one with the YAML files of tasks")
    return problems


class Tasks:
    """The tasks that the settings name, with their data.

    Args:
        config: names the tasks.
        folder: of the model's tokenizer.

    Raises:
        ConfigError: a task does not exist, or the tokenizer has no chat template.
        DataError: a task's data is missing, or its YAML file is wrong.
    """

    def __init__(self, config: EvaluateConfig, folder: Path):
        from lm_eval.tasks import TaskManager

        self.config = config
        if config.chat_template and not load_tokenizer(folder).chat_template:
            raise ConfigError([f"chat_template = true, and the tokenizer in {folder} has none: set it to false"])
        # Indexing the thousands of files of lm-eval itself takes seconds.
        manager = TaskManager(include_path=config.task_dir, include_defaults=False) if config.task_dir else None
        if manager is None or set(config.tasks) - set(manager.all_tasks):
            manager = TaskManager(include_path=config.task_dir)
        raise_if_any([_unknown(name, manager.all_tasks) for name in config.tasks if name not in manager.all_tasks])
        try:
            loaded = manager.load(list(config.tasks))
        except (OSError, ValueError) as error:
            raise DataError(
                f"tasks = {config.tasks} cannot be loaded: {error}. Without a network, a task's data must be local "
                f"files, or lie in the cache of Hugging Face's datasets"
            ) from error
        # A group runs its own tasks and groups.
        children = {child for group in loaded["groups"].values() for child in group.child_names}
        self.manager = manager
        self.roots = [one for name, one in {**loaded["groups"], **loaded["tasks"]}.items() if name not in children]

    def run(self, lm: LM) -> dict[str, dict]:
        """Evaluates a language model of lm-eval.

        Returns:
            for each task and group, `num_fewshot`, `num_samples` (questions), `version`, `part_of` (the group that
            has it) and `metrics`: by name, `value`, `stderr` (None where lm-eval has no formula) and `higher_is_better`
            (None where unknown); `questions` has the number of every question, for metrics that are their mean.
        """
        from lm_eval import simple_evaluate

        with _infinite_perplexity():
            results = simple_evaluate(
                lm,
                tasks=self.roots,
                task_manager=self.manager,
                num_fewshot=self.config.num_fewshot,
                limit=self.config.limit,
                apply_chat_template=self.config.chat_template,
            )
        children = results["group_subtasks"]
        groups = {child: group for group, names in children.items() for child in names}

        def answers(name: str) -> list[dict]:
            own = results["samples"].get(name, [])
            return own or [answer for child in children.get(name, []) for answer in answers(child)]

        measured = {}
        for name, values in results["results"].items():
            metrics = _metrics(values, results["higher_is_better"].get(name, {}))
            measured[name] = {
                "num_fewshot": results["n-shot"].get(name),
                "num_samples": values.get("sample_len"),
                "version": results["versions"].get(name),
                "part_of": groups.get(name),
                "metrics": metrics,
                "questions": _questions(metrics, answers(name)),
            }
        return measured


def exp(exponent: float) -> float:
    """Returns e to a power; infinity where that is beyond the largest number."""
    try:
        return math.exp(exponent)
    except OverflowError:
        return math.inf


class _Math:
    """The module `math` with an `exp` that does not overflow."""

    exp = staticmethod(exp)

    def __getattr__(self, name: str) -> Any:
        return getattr(math, name)


@contextmanager
def _infinite_perplexity() -> Iterator[None]:
    """Lets lm-eval report an infinite perplexity, where it would end with OverflowError when all the work is done."""
    from lm_eval.api import metrics

    metrics.math = _Math()
    try:
        yield
    finally:
        metrics.math = math


def _unknown(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(close)}?" if close else "`lm-eval ls tasks` lists those of lm-eval"
    return f"tasks has {name!r}, which is not a task: {hint}"


def _metrics(values: dict[str, Any], higher_is_better: dict[str, bool | None]) -> dict[str, dict]:
    """Collects lm-eval's `METRIC,FILTER` and `METRIC_stderr,FILTER`; the filter `none` is left out of the name."""
    metrics = {}
    for key, value in values.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = values.get(f"{metric}_stderr,{filtered}")
            metrics[metric if filtered == "none" else key] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
                "higher_is_better": higher_is_better.get(metric),
            }
    return metrics


def _questions(metrics: dict[str, dict], answers: list[dict]) -> dict[str, list[float]]:
    """Returns the number of every question, for metrics that are the mean of them."""
    questions = {}
    for name, measured in metrics.items():
        metric, _, filtered = name.partition(",")
        own = [answer.get(metric) for answer in answers if answer["filter"] == (filtered or "none")]
        numbers = [float(value) for value in own if isinstance(value, int | float)]
        is_mean = numbers and math.isclose(statistics.fmean(numbers), measured["value"], abs_tol=1e-9)
        if is_mean and len(numbers) == len(own):
            questions[name] = numbers
    return questions


def show(value: float, stderr: float | None, digits: int = 4) -> str:
    """Formats a number and its standard error. The perplexity per word of a bad model has a hundred digits."""
    texts = [f"{x:,.{digits}f}" if abs(x) < 1e12 else f"{x:.3e}" for x in (value, stderr) if x is not None]
    return " ± ".join(texts)


def task_table(tasks: dict[str, dict]) -> Table:
    """Formats the results of `Tasks.run` for a terminal."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("task", "metric", "value", "few-shot", "questions"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    for name, task in tasks.items():
        counts = ["–" if task[key] is None else str(task[key]) for key in ("num_fewshot", "num_samples")]
        for metric, measured in task["metrics"].items():
            table.add_row(*map(Text, (name, metric, show(measured["value"], measured["stderr"]), *counts)))
    return table
