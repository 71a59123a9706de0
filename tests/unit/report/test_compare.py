import json
import math
from statistics import fmean

import numpy as np
import pytest

from minitron_megatron.config.schema import CompareConfig, InspectConfig
from minitron_megatron.report.compare import compare, differences, task_measures
from minitron_megatron.report.html import write_report
from minitron_megatron.report.inspect import inspect
from minitron_megatron.report.results import Evaluation, read_evaluations

# By model: accuracy and its error, perplexity, and what has no better side.
SCORES = {"teacher": (0.8, 0.02, 10.0, 3.0), "pruned": (0.4, 0.03, 40.0, 3.5), "distilled": (0.7, 0.025, 12.5, 2.0)}


def tasks_of(acc, stderr, perplexity, length):
    metrics = {
        "acc": {"value": acc, "stderr": stderr, "higher_is_better": True},
        "perplexity": {"value": perplexity, "stderr": None, "higher_is_better": False},
        "length": {"value": length, "stderr": None, "higher_is_better": None},
    }
    return {"arc": {"num_fewshot": 5, "num_samples": 100, "version": 1.0, "metrics": metrics}}


def evaluation(name, **changes):
    return Evaluation(name, None, 10, 5, 1.0, 2.7, 100, None, tasks_of(*SCORES[name]), **changes)


@pytest.fixture
def run(finished_run):
    """A finished recipe whose models were given a task."""
    folder, stages = finished_run
    for name, scores in SCORES.items():
        path = folder / "evaluate" / name / "evaluation.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tasks": tasks_of(*scores)}))
    return folder, stages


def test_what_is_left_of_the_teacher():
    """Of what is better when lower it is the inverse: 10 of 12.5."""
    models = [evaluation(name) for name in SCORES]
    assert [measure.cells for measure in task_measures(models, models[0])] == [
        ["arc acc", "0.8000 ± 0.0200 (100.0%)", "0.4000 ± 0.0300 (50.0%)", "0.7000 ± 0.0250 (87.5%)"],
        ["arc perplexity", "10.0000 (100.0%)", "40.0000 (25.0%)", "12.5000 (80.0%)"],
        ["arc length", "3.0000", "3.5000", "2.0000"],
    ]


def answered(name, right, tasks):
    """An evaluation whose tasks have these right answers, by task."""
    made = evaluation(name)
    made.tasks = {
        task: {"part_of": None, "metrics": {"acc": {"value": fmean(own), "stderr": 0.1, "higher_is_better": True}}}
        for task, own in right.items()
    }
    made.questions = {task: {"acc": own} for task, own in right.items()}
    made.tasks |= tasks
    return made


def test_recovery_per_task_and_on_average_has_the_error_of_paired_answers():
    """Against a bootstrap over questions, which knows no formula; unpaired errors would be half as large again."""
    draw = np.random.default_rng(0)
    teacher = {"one": (draw.random(400) < 0.7).astype(float), "two": (draw.random(300) < 0.5).astype(float)}
    pruned = {name: np.where(draw.random(len(own)) < 0.8, own, 1 - own) for name, own in teacher.items()}
    part = {"part": {"part_of": "one", "metrics": {"acc": {"value": 0.0, "stderr": 0.1, "higher_is_better": True}}}}
    models = [
        answered(name, {task: own.tolist() for task, own in right.items()}, part)
        for name, right in (("teacher", teacher), ("pruned", pruned))
    ]
    measures = {measure.name: measure.values for measure in task_measures(models, models[0])}
    assert list(measures) == ["one acc", "two acc", "part acc", "average of 2 tasks"]

    def recovery(tasks, picks):
        means = [[right[task][picks[task]].mean() for task in tasks] for right in (pruned, teacher)]
        return 100 * sum(means[0]) / sum(means[1])

    for name, tasks in (("one acc", ["one"]), ("two acc", ["two"]), ("average of 2 tasks", ["one", "two"])):
        every = {task: np.arange(len(own)) for task, own in teacher.items()}
        drawn = [
            recovery(tasks, {task: draw.integers(len(own), size=len(own)) for task, own in teacher.items()})
            for _ in range(4000)
        ]
        of_teacher, found = measures[name]
        assert found.recovery == pytest.approx(recovery(tasks, every))
        assert found.recovery_stderr == pytest.approx(np.std(drawn), rel=0.05)
        assert of_teacher.recovery == 100 and of_teacher.recovery_stderr is None
    assert measures["average of 2 tasks"][1].stderr == pytest.approx(math.hypot(0.1, 0.1) / 2)


def test_a_task_that_some_models_were_not_given():
    teacher, pruned = evaluation("teacher"), evaluation("pruned")
    pruned.tasks["mmlu"] = pruned.tasks["arc"]
    rows = {measure.name: measure.cells[1:] for measure in task_measures([teacher, pruned], teacher)}
    assert rows["mmlu acc"] == ["–", "0.4000 ± 0.0300"]


def test_evaluations_that_are_not_comparable_are_named():
    teacher, pruned = evaluation("teacher"), evaluation("pruned")
    assert differences([teacher, pruned]) == []
    pruned.num_tokens, pruned.tasks["arc"]["num_fewshot"] = 90, 0
    tokens, examples = differences([teacher, pruned])
    assert tokens.startswith("held-out tokens differ (100 of teacher, 90 of pruned)")
    assert examples == "arc was not the same for all: examples 5 of teacher, 0 of pruned"


def test_the_verb_shows_and_writes_every_number(run, tmp_path, capsys):
    folder, _ = run
    evaluations = [str(folder / "evaluate" / name) for name in SCORES]
    compare(CompareConfig(evaluations, str(tmp_path / "out")))
    shown = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "arc acc 0.8000 ± 0.0200 (100.0%) 0.4000 ± 0.0300 (50.0%) 0.7000 ± 0.0250 (87.5%)" in shown
    assert " ".join(["held-out loss", *(f"{e.loss:.4f}" for e in read_evaluations(run[1]))]) in shown
    markdown = (tmp_path / "out" / "comparison.md").read_text().splitlines()
    assert markdown[0] == "|  | teacher | pruned | distilled |"
    assert "| arc perplexity | 10.0000 (100.0%) | 40.0000 (25.0%) | 12.5000 (80.0%) |" in markdown
    values = json.loads((tmp_path / "out" / "comparison.json").read_text())
    [acc] = [measure for measure in values["measures"] if measure["name"] == "arc acc"]
    assert acc["values"][2] == {
        "value": 0.7,
        "stderr": 0.025,
        "recovery": pytest.approx(87.5),
        "recovery_stderr": None,
    }
    assert values["models"] == list(SCORES) and values["notes"] == []


def test_the_report_and_inspect_show_tasks(run, capsys):
    folder, stages = run
    page = write_report(folder, "Title", stages).read_text()
    assert "<h2>Tasks</h2>" in page and "0.7000 ± 0.0250 (87.5%)" in page
    inspect(InspectConfig(str(folder / "evaluate" / "pruned")))
    assert "0.4000 ± 0.0300" in capsys.readouterr().out
