import os
import signal
import subprocess
import sys
import time
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


def command(*arguments, **options):
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([sys.executable, "-m", "minitron_megatron.cli", *arguments], **pipes, **options)


def environment(*paths, **variables):
    """This process's environment, the package importable from any folder."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, paths), *sys.path]), **variables}


@pytest.mark.parametrize("arguments", [["score", "num_sample=3"], ["compress", "experiment=nope"]])
def test_bad_settings_write_nothing_and_show_no_traceback(arguments, tmp_path):
    process = command(*arguments, cwd=tmp_path, env=environment())
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert all(line.startswith("minitron ") for line in err.splitlines())
    assert not list(tmp_path.iterdir())


def test_settings_are_checked_without_torch():
    code = "import sys, minitron_megatron.cli, minitron_megatron as m; dir(m); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=environment()).returncode == 0


_STAND_IN = """
import logging, os, sys, time, types

def score(settings):
    from minitron_megatron.errors import CheckpointError
    rank = int(os.environ["RANK"])
    logging.getLogger("minitron_megatron.pruning").info("scoring")
    if settings.checkpoint == "all" or settings.checkpoint == "one" and rank == 1:
        raise CheckpointError(f"{settings.checkpoint} is no checkpoint")
    if settings.checkpoint == "defect" and rank == 1:
        raise ZeroDivisionError
    print("rank", rank, "of", os.environ["WORLD_SIZE"], "threads", os.environ["OMP_NUM_THREADS"], flush=True)
    if settings.checkpoint == "plugin":
        print("criterion of states", settings.axes["states"].criterion.value)
    elif settings.checkpoint != "good":
        time.sleep(120)

module = types.ModuleType("minitron_megatron.pruning.score")
module.score = score
sys.modules[module.__name__] = module
"""


_PLUGIN = """
from minitron_megatron.config.axes import Axis, register

register(Axis("states", "channels of the state.", __name__, "state", is_scored=True))
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """Runs of two real ranks whose `score` ends in different ways, by the name of the way; all at once, for speed."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "sitecustomize.py").write_text(_STAND_IN)
    (folder / "their_plugin.py").write_text(_PLUGIN)
    of_plugin = "checkpoint: plugin\noutput: o\nstates: {criterion: random}\nparallel: {tensor: 2}\n"
    (folder / "score.yaml").write_text(f"{of_plugin}plugins: [their_plugin]\n")
    env = environment(folder, OMP_NUM_THREADS="3")
    ways = {way: [f"checkpoint={way}"] for way in ("good", "all", "one", "defect", "asleep")}
    ways["plugin"] = ["checkpoint=plugin", "plugins=[their_plugin]", "states.criterion=random"]
    runs = {
        way: command("score", *own, "output=o", "parallel.tensor=2", cwd=folder, env=env) for way, own in ways.items()
    }
    runs["file"] = command("score", "--config", "score.yaml", cwd=folder, env=env)
    yield runs
    for run in runs.values():
        run.terminate()
        run.wait(timeout=60)


def test_ranks_run_and_the_first_one_logs(two_ranks):
    out, err = two_ranks["good"].communicate(timeout=120)
    assert two_ranks["good"].returncode == 0
    assert sorted(out.splitlines()) == ["rank 0 of 2 threads 3", "rank 1 of 2 threads 3"]
    assert err.count("scoring") == 1


@pytest.mark.parametrize("way", ["plugin", "file"])
def test_ranks_import_plugins_before_they_read_settings(two_ranks, way):
    out, err = two_ranks[way].communicate(timeout=120)
    assert two_ranks[way].returncode == 0, err
    assert out.splitlines().count("criterion of states random") == 2


@pytest.mark.parametrize("way", ["all", "one"])
def test_an_error_of_the_user_in_ranks_is_told_once(two_ranks, way):
    _, err = two_ranks[way].communicate(timeout=120)
    assert two_ranks[way].returncode == 2, err
    assert [line for line in err.splitlines() if "scoring" not in line] == [f"minitron score: {way} is no checkpoint"]


def test_a_defect_in_a_rank_keeps_its_traceback(two_ranks):
    _, err = two_ranks["defect"].communicate(timeout=120)
    assert two_ranks["defect"].returncode == 1
    assert "Traceback" in err and "ZeroDivisionError" in err


def test_a_signal_reaches_the_ranks(two_ranks):
    run = two_ranks["asleep"]
    for _ in range(2):
        assert run.stdout.readline().startswith("rank")
    run.send_signal(signal.SIGTERM)
    started = time.monotonic()
    assert run.wait(timeout=60) == 128 + signal.SIGTERM
    assert time.monotonic() - started < 30  # the ranks would sleep for two minutes


MINITRON = [sys.executable, "-m", "minitron_megatron.cli"]


@pytest.mark.parametrize("arguments", [["distill", "--help"], ["--help"], [*SCORE, "--cfg"], ["--version"]])
def test_a_reader_that_has_left_ends_it_quietly(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*MINITRON, *arguments], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
    os.close(writer)
    assert (done.stderr, done.returncode) == ("", 128 + signal.SIGPIPE)


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


UNGUARDED = """
import minitron_megatron
from minitron_megatron.config.schema import DistillConfig
{}minitron_megatron.distill(DistillConfig(student="s", teacher="t", output="o"))
"""
SPAWNING = """
import multiprocessing
import minitron_megatron
from minitron_megatron.config.schema import ScoreConfig
if multiprocessing.current_process().name == "MainProcess":
    multiprocessing.get_context("spawn").Process(target=print).start()
else:
    minitron_megatron.score(ScoreConfig("c", "o"))
"""


@pytest.mark.parametrize(
    "code, is_refused",
    [
        (UNGUARDED.format(""), True),
        (UNGUARDED.format("if True:\n    "), True),
        (UNGUARDED.format("if __name__ == '__main__':\n    "), False),
        (SPAWNING, True),
    ],
)
def test_a_script_without_the_main_guard_is_told_at_once(code, is_refused, tmp_path):
    (tmp_path / "script.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    said = 'call it below `if __name__ == "__main__":`'
    assert (said in done.stderr) == is_refused, done.stderr
    assert is_refused or "s does not exist" in done.stderr


def test_ranks_that_cannot_meet_are_told_at_once():
    assert "2 without MASTER_ADDR and MASTER_PORT" in meeting_problems({"WORLD_SIZE": "2"})[0]
    world = {"WORLD_SIZE": "2", "MASTER_PORT": "1"}
    assert "MASTER_ADDR = nowhere.invalid cannot be" in meeting_problems({**world, "MASTER_ADDR": "nowhere.invalid"})[0]
    assert not meeting_problems({**world, "MASTER_ADDR": "localhost"})
