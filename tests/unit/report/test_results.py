import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from minitron_megatron.errors import CheckpointError
from minitron_megatron.report.results import (
    Evaluation,
    Stage,
    find_result,
    find_teacher,
    find_worst_pruned,
    read_evaluation,
    read_evaluations,
    recoveries,
    stage_of,
)
from minitron_megatron.report.table import COLUMNS, cells, summary_table

TEACHER = Evaluation("teacher", "import", 2000, 1500, 2.5, 12.1825, 100, {"tokens_per_s": 31.25})
PRUNED = Evaluation("pruned", "prune", 1000, 700, 5.5, 244.69, 100)
DISTILLED = Evaluation("distilled", "distill", 1000, 700, 3.5, 33.115, 100)


def test_evaluations_know_which_stage_made_the_model(shared_run):
    _, stages = shared_run
    evaluations = read_evaluations(stages)
    assert [e.name for e in evaluations] == ["teacher", "pruned", "distilled"]
    assert [e.made_by for e in evaluations] == ["import", "prune", "distill"]
    assert evaluations[1].parameters == 4321987 and evaluations[1].parameters_without_embeddings == 3219876
    assert evaluations[2].loss == 3.5 and evaluations[2].num_tokens == 23456


def test_a_model_inside_a_stage_is_that_stages(tmp_path):
    """A run's model lies in `checkpoints/`; a folder whose name only begins like the run's is another."""
    stages = [Stage("run", "distill", tmp_path / "run")]
    assert stage_of(tmp_path / "run" / "checkpoints", stages).name == "run"
    assert stage_of(tmp_path / "run2", stages) is None


def test_relative_and_absolute_paths_are_the_same_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert stage_of(tmp_path / "run", [Stage("run", "distill", Path("run"))]).name == "run"


def test_the_share_of_the_gap_that_is_closed():
    assert recoveries([TEACHER, PRUNED, DISTILLED]) == [None, None, pytest.approx(2 / 3)]


def test_the_gap_is_that_of_the_worst_pruned_model():
    better = replace(PRUNED, loss=4.0)
    assert recoveries([TEACHER, PRUNED, better, DISTILLED])[3] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "models",
    [
        [TEACHER, DISTILLED],
        [PRUNED, DISTILLED],
        [DISTILLED, TEACHER, PRUNED],
        [TEACHER, replace(PRUNED, loss=2.5), DISTILLED],
        [TEACHER],
        [],
    ],
    ids=["no pruned", "no teacher", "both come after", "no gap", "teacher alone", "nothing"],
)
def test_without_a_gap_nothing_is_closed(models):
    assert recoveries(models) == [None] * len(models)


def test_a_model_worse_than_the_pruned_one_closes_less_than_nothing():
    assert recoveries([TEACHER, PRUNED, replace(DISTILLED, loss=6.5)])[2] == pytest.approx(-1 / 3)


def test_roles():
    smaller = replace(DISTILLED, name="second", parameters=500, loss=4.0)
    control = replace(DISTILLED, name="control", loss=4.5)
    models = [TEACHER, PRUNED, DISTILLED, control]
    assert find_teacher(models) is TEACHER and find_worst_pruned(models) is PRUNED
    assert find_result(models) is DISTILLED  # not the control, which comes later
    assert find_result([*models, smaller]) is smaller  # of an iterated recipe, the last cut
    assert find_teacher([replace(TEACHER, made_by=None)]).name == "teacher"
    assert find_teacher([PRUNED]) is find_worst_pruned([TEACHER]) is find_result([TEACHER]) is None


@pytest.mark.parametrize(
    "text, message", [('{"model": "m"', "not JSON"), ('{"model": "m"}', "lacks generation, heldout, parameters")]
)
def test_a_broken_evaluation_is_named(tmp_path, text, message):
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        read_evaluation(tmp_path)


def test_the_table_has_every_number():
    assert cells([TEACHER, PRUNED, DISTILLED]) == [
        ["teacher", "2,000", "1,500", "2.5000", "12.18", "31.2", "–"],
        ["pruned", "1,000", "700", "5.5000", "244.69", "–", "–"],
        ["distilled", "1,000", "700", "3.5000", "33.12", "–", "66.7%"],
    ]


def test_the_table_on_a_terminal():
    """Names in brackets are text, and not rich's markup."""
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(summary_table([TEACHER, replace(PRUNED, name="[bold]p")]))
    text = console.export_text()
    assert all(column in text for column in COLUMNS) and "[bold]p" in text and "244.69" in text


def test_generation_may_be_missing(finished_run):
    _, stages = finished_run
    path = stages[-1].output / "evaluation.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "generation": None}))
    assert cells(read_evaluations(stages))[2][5] == "–"
