"""Whether a folder holds another run than the one that is launched into it."""

from dataclasses import replace

import pytest
import yaml

from minitron_megatron.config.cluster import ClusterConfig
from minitron_megatron.config.schema import EvaluateConfig, InferenceParallelConfig
from minitron_megatron.launch.jobs import jobs_of
from minitron_megatron.launch.run_folder import FOLDER, other_run_problems, write_settings


@pytest.fixture
def run(tmp_path):
    """A run with a stage that has made something, and the settings of that stage."""
    settings = EvaluateConfig("m", str(tmp_path / "made"), tasks=["arc_easy"])
    stages = {"measured": ("evaluate", settings)}
    write_settings(tmp_path / "run", jobs_of(stages, ClusterConfig(), False), stages, None)
    (tmp_path / "made").mkdir()
    return tmp_path / "run", settings


def problems(folder, settings):
    stages = {"measured": ("evaluate", settings)}
    return other_run_problems(folder, jobs_of(stages, ClusterConfig(), False), stages)


def test_settings_that_change_no_result_may_be_others(run):
    folder, settings = run
    assert problems(folder, settings) == []
    assert problems(folder, replace(settings, micro_batch=1, parallel=InferenceParallelConfig(2))) == []


def test_settings_that_change_a_result_are_named(run):
    folder, settings = run
    [problem] = problems(folder, replace(settings, limit=3, tasks=[]))
    assert "evaluate.tasks was ['arc_easy'] and is []; evaluate.limit was null and is 3. Choose" in problem


def test_settings_of_an_earlier_version_are_the_same_where_they_say_the_same(run):
    folder, settings = run
    [file] = (folder / FOLDER).glob("*.yaml")
    before = yaml.safe_load(file.read_text())
    before["parallel"] |= {"sequence": True, "virtual_pipeline": None}  # which it had then
    del before["plugins"], before["limit"], before["chat_template"]
    file.write_text(yaml.safe_dump(before))
    assert problems(folder, settings) == []


def test_a_stage_that_has_made_nothing_may_be_another_one(run, tmp_path):
    folder, settings = run
    (tmp_path / "made").rmdir()
    assert problems(folder, replace(settings, limit=3)) == []
