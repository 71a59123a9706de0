"""The command line within one process: what reaches a verb, and what is said where nothing does."""

import os
import sys
from types import ModuleType

import pytest
import yaml

import minitron_megatron
from minitron_megatron import cli
from minitron_megatron.config.schema import SCHEMAS
from minitron_megatron.config.verbs import VERBS
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.process import meeting_problems

SCORE = ["score", "checkpoint=c", "output=o"]

MEET = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def ran(monkeypatch):
    """Settings that reached a verb's function. No verb does any work."""
    calls = []
    for place in VERBS.values():
        name = place.split(":")[0]
        module = ModuleType(name)
        for other in (entry.split(":") for entry in VERBS.values()):
            if other[0] == name:
                setattr(module, other[1], calls.append)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(cli, "set_up_logging", lambda is_first: None)
    monkeypatch.setattr(os, "environ", {"PATH": os.environ["PATH"]})
    return calls


def test_every_verb_has_settings_and_a_function():
    assert [*VERBS, "launch"] == list(SCHEMAS)  # which starts the others and is none of them
    names = [place.split(":")[1] for place in VERBS.values()]
    assert len(set(names)) == len(VERBS)
    assert set(names) <= set(minitron_megatron.__all__)


def test_the_functions_are_found_in_the_package_when_asked_for(ran):
    settings = [SCHEMAS["score"]("c", "o"), SCHEMAS["inspect"]("p"), SCHEMAS["import"]("s", "o")]
    minitron_megatron.score(settings[0])
    minitron_megatron.inspect(settings[1])
    minitron_megatron.import_checkpoint(settings[2])
    assert ran == settings
    with pytest.raises(AttributeError, match="no attribute 'scores'"):
        _ = minitron_megatron.scores


def test_the_functions_check_their_settings_as_the_command_line_does(ran):
    with pytest.raises(ConfigError) as raised:
        minitron_megatron.score(SCHEMAS["score"](output="", num_samples=0))
    assert raised.value.problems == [
        "checkpoint is missing: give checkpoint=VALUE",
        "output is missing: give output=VALUE",
        "num_samples = 0: must be at least 1",
    ]
    assert not ran


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_without_a_verb_all_are_listed(arguments, capsys):
    assert cli.main(arguments) == 0
    listed = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert listed[: len(SCHEMAS)] == list(SCHEMAS)


@pytest.mark.oldest
def test_help_of_a_verb_lists_its_settings_and_runs_nothing(capsys, ran):
    assert cli.main(["distill", "--help"]) == 0
    out = capsys.readouterr().out
    assert "optimizer.warmup_steps=40" in out and "steps of linear warm-up" in out
    assert not ran


def test_cfg_prints_the_settings_and_runs_nothing(capsys, ran):
    assert cli.main([*SCORE, "--cfg", "parallel.tensor=2"]) == 0
    shown = yaml.safe_load(capsys.readouterr().out)
    assert (shown["checkpoint"], shown["dtype"], shown["parallel"]["tensor"]) == ("c", "bf16", 2)
    assert not ran


def test_cfg_of_a_recipe_prints_its_stages_as_they_would_be_used(capsys, ran):
    recipe = ["compress", "run_dir=r", "source=s", "target.ffn=8", "data.seed=7", "stages.exported=null"]
    assert cli.main([*recipe, "--cfg"]) == 0
    stages = yaml.safe_load(capsys.readouterr().out)["stages"]
    assert (stages["distilled"]["verb"], stages["distilled"]["steps"], stages["distilled"]["data"]["seed"]) == (
        "distill",
        400,
        7,
    )
    assert "exported" not in stages and not ran


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"{minitron_megatron.__version__}\n"


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["distil"], "minitron distil: unknown command 'distil': did you mean distill?\n"),
        (["score", "--cgf"], "minitron score: unknown option --cgf: did you mean --cfg?\n"),
        (
            ["score", "num_samples=0"],
            "minitron score: checkpoint is missing: give checkpoint=VALUE\n"
            "minitron score: output is missing: give output=VALUE\n"
            "minitron score: num_samples = 0: must be at least 1\n",
        ),
    ],
)
def test_what_the_user_got_wrong_is_told_in_plain_words(arguments, expected, capsys, ran):
    assert cli.main(arguments) == 2
    assert capsys.readouterr() == ("", expected)
    assert not ran


def test_a_verb_gets_its_settings(ran):
    assert cli.main([*SCORE, "num_samples=7"]) == 0
    [settings] = ran
    assert type(settings) is SCHEMAS["score"] and settings.num_samples == 7


@pytest.mark.parametrize("error, status", [(CheckpointError("no checkpoint"), 2), (KeyboardInterrupt(), 130)])
def test_exit_status_of_a_verb_that_stops(error, status, ran, monkeypatch, capsys):
    def stop(settings):
        raise error

    monkeypatch.setattr(sys.modules["minitron_megatron.pruning.score"], "score", stop)
    assert cli.main(SCORE) == status
    assert capsys.readouterr().err == ("minitron score: no checkpoint\n" if status == 2 else "")


def test_a_defect_keeps_its_traceback(ran, monkeypatch):
    monkeypatch.setattr(sys.modules["minitron_megatron.pruning.score"], "score", lambda settings: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(SCORE)


def test_ranks_are_started_when_the_layout_needs_them(ran, monkeypatch):
    started = []
    monkeypatch.setattr(cli, "run_ranks", lambda *call: started.append(call) or 2)
    arguments = [*SCORE, "parallel.tensor=2", "parallel.data=3"]
    assert cli.main(arguments) == 2  # the status of the ranks
    assert started == [(6, arguments)] and not ran
    # A cut for that layout runs in as many processes as are asked for.
    prune = ["prune", "checkpoint=c", "scores=s", "output=o", "target.ffn=8", "parallel.tensor=2"]
    assert cli.main(prune) == 0
    assert len(started) == len(ran) == 1
    assert cli.main([*prune, "workers=3"]) == 2
    assert started[1:] == [(3, [*prune, "workers=3"])] and len(ran) == 1


def test_ranks_that_exist_are_joined(ran):
    os.environ.update(RANK="1", WORLD_SIZE="4", **MEET)
    assert cli.main([*SCORE, "parallel.tensor=2"]) == 0
    assert len(ran) == 1


@pytest.mark.parametrize("verb", ["import source=c", "prune checkpoint=c scores=s target.ffn=8"])
def test_any_number_of_ranks_shares_the_work_of_some_verbs(verb, ran):
    os.environ.update(RANK="1", WORLD_SIZE="3", **MEET)
    assert cli.main([*verb.split(), "output=o", "workers=2"]) == 0
    assert len(ran) == 1


def test_tasks_of_srun_are_joined(ran):
    os.environ.update(SLURM_PROCID="1", SLURM_LOCALID="1", SLURM_STEP_NUM_TASKS="2")
    os.environ.update(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="gpu[3-4]")
    assert cli.main([*SCORE, "parallel.tensor=2"]) == 0
    assert len(ran) == 1
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("1", "2", "gpu3")


@pytest.mark.parametrize(
    "arguments, numbers",
    [
        ([*SCORE, "parallel.tensor=2"], "2 x 1 x 1 = 2 ranks, but the world has 3"),
        ([*SCORE, "parallel.tensor=2", "parallel.data=2"], "2 x 1 x 2 = 4 ranks, but the world has 3"),
        (["inspect", "path=p"], "inspect runs in one process, and here are 3"),
    ],
)
def test_a_world_of_the_wrong_size_is_refused(arguments, numbers, ran, capsys):
    os.environ.update(RANK="0", WORLD_SIZE="3", **MEET)
    assert cli.main(arguments) == 2
    assert numbers in capsys.readouterr().err
    assert not ran


def test_only_the_first_rank_speaks_under_a_launcher_that_keeps_errors(ran, tmp_path, capsys, monkeypatch):
    def stop(settings):
        raise CheckpointError("no checkpoint")

    monkeypatch.setattr(sys.modules["minitron_megatron.pruning.score"], "score", stop)
    for rank, expected in (("0", "minitron score: no checkpoint\n"), ("1", "")):
        file = tmp_path / rank
        os.environ.update(RANK=rank, WORLD_SIZE="2", ROLE_NAME="default", TORCHELASTIC_ERROR_FILE=str(file), **MEET)
        assert cli.main([*SCORE, "parallel.tensor=2"]) == 2
        assert capsys.readouterr().err == expected
        assert "no checkpoint" in file.read_text()


@pytest.mark.parametrize(
    "arguments, setting",
    [
        (["score", "checkpoint=${oc.env:NOWHERE}", "output=o"], "checkpoint"),
        ([*SCORE, "data.text=[a,${oc.env:NOWHERE}]"], "data.text"),
        ([*SCORE, "parallel.tensor=${oc.env:NOWHERE}"], "parallel.tensor"),
        (["compress", "run_dir=r", "target.ffn=8", "source=${oc.env:NOWHERE}"], "source"),
        (["compress", "run_dir=r", "target.ffn=8", "source=s", "stages.distilled.steps=${oc.env:NOWHERE}"], "steps"),
        (["launch", "score", "checkpoint=c", "output=o", "cluster.account=${oc.env:NOWHERE}"], "cluster.account"),
    ],
)
def test_an_unset_environment_variable_is_one_sentence(arguments, setting, capsys, ran):
    assert cli.main(arguments) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert f"{setting} reads the environment variable NOWHERE, which is not set: set it, or give" in line


@pytest.mark.parametrize(
    "environment, said",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 is set and RANK is not"),
        ({"RANK": "0"}, "RANK = 0 is set and WORLD_SIZE is not"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "ranks go from 0"),
        ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK = 'one': must be a whole number"),
    ],
)
def test_a_world_that_cannot_meet_is_one_line_at_once(environment, said, capsys, ran, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    assert cli.main([*SCORE, "parallel.data=2"]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line and not ran


@pytest.mark.parametrize("environment", [{}, {"WORLD_SIZE": "1"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_a_world_of_one_needs_no_address(environment, ran, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    assert cli.main(SCORE) == 0 and ran


def test_ranks_that_cannot_meet_are_told_at_once():
    assert "2 without MASTER_ADDR and MASTER_PORT" in meeting_problems({"WORLD_SIZE": "2"})[0]
    world = {"WORLD_SIZE": "2", "MASTER_PORT": "1"}
    assert "MASTER_ADDR = nowhere.invalid cannot be" in meeting_problems({**world, "MASTER_ADDR": "nowhere.invalid"})[0]
    assert not meeting_problems({**world, "MASTER_ADDR": "localhost"})
