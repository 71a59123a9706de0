import json
import logging
import multiprocessing
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minitron_megatron.artifacts.manifest import Manifest, Parent
from minitron_megatron.config.schema import Tracker, TrackingConfig
from minitron_megatron.errors import CheckpointError, ConfigError
from minitron_megatron.tracking.metrics import Metrics, read_metrics
from minitron_megatron.tracking.trackers import TENSORBOARD, WANDB_ID
from tests.offline_wandb import artifacts, history, rows, sessions
from tests.wandb_server import Server

KEY = "0123456789abcdef" * 2 + "01234567"
WANDB, BOTH = [Tracker.WANDB], [Tracker.WANDB, Tracker.TENSORBOARD]


@pytest.fixture(autouse=True)
def quiet(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """Set which server W&B finds, a stand-in unless another is named, and with which key."""
    servers = []

    def choose(url=None, key=KEY, status=200):
        servers.append(Server(status))
        wandb.teardown()  # the environment is read once per session
        monkeypatch.setenv("WANDB_BASE_URL", url or servers[-1].url)
        monkeypatch.setenv("NETRC", str(tmp_path / "no_netrc"))
        if key:
            monkeypatch.setenv("WANDB_API_KEY", key)
        else:
            monkeypatch.delenv("WANDB_API_KEY", raising=False)
        return servers[-1]

    yield choose
    wandb.teardown()
    for started in servers:
        started.close()


def files_with_key(folder):
    return [file for file in folder.rglob("*") if file.is_file() and KEY.encode() in file.read_bytes()]


def start(folder, trackers=(), mode="offline", manifest=None, **settings):
    return Metrics(folder, TrackingConfig(list(trackers), mode=mode, **settings), manifest or Manifest("run"))


def log_steps(folder, first, last, *arguments, **settings):
    with start(folder, *arguments, **settings) as metrics:
        metrics.resume(first - 1)
        log(metrics, first, last)


def log(metrics, first, last, scale=1.0):
    for step in range(first, last + 1):
        metrics.log({"progress/step": step, "loss/total": scale / step, "optim/grad_norm": float("inf")})


def tensorboard(folder):
    """The curves, by name, as steps and values."""
    events = EventAccumulator(str(folder / TENSORBOARD)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_lines_are_on_disk_as_soon_as_they_are_logged(tmp_path):
    with start(tmp_path) as metrics:
        metrics.resume(0)
        metrics.log({"progress/step": 1, "loss/total": 2.5})
        assert read_metrics(tmp_path) == [{"progress/step": 1, "loss/total": 2.5}]


def test_going_on_drops_what_came_after_the_checkpoint(tmp_path):
    log_steps(tmp_path, 1, 5)
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"progress/step": 6, "loss/to')  # the run was killed here
    log_steps(tmp_path, 4, 6)
    assert [line["progress/step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


def killed(folder):
    """Log seven steps, as if the last checkpoint were at the fifth, and be killed: what is in memory is lost."""
    metrics = start(folder, BOTH)
    metrics.resume(0)
    log(metrics, 1, 7, scale=9.0)
    signal.raise_signal(signal.SIGKILL)


def test_the_trackers_know_what_the_file_knows_after_a_kill(tmp_path):
    process = multiprocessing.get_context("forkserver").Process(target=killed, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(read_metrics(tmp_path)) == 7
    time.sleep(1)  # TensorBoard reads files in the order of their seconds
    for first, last in ((6, 9), (8, 10)):  # of which the first is not killed, so that all it logged is there
        with start(tmp_path, BOTH) as metrics:
            metrics.resume(first - 1)
            log(metrics, first, last)
        lines = read_metrics(tmp_path)
        assert [line["progress/step"] for line in lines] == list(range(1, last + 1))
        ids, found = history(tmp_path)
        assert len(ids) == 1 and found == lines
        # The newest folder has everything by itself, whatever became of the others.
        assert len(rows(sessions(tmp_path)[-1])) == last
        curves = tensorboard(tmp_path)
        assert curves.keys() == lines[0].keys()
        for name, curve in curves.items():
            assert curve == [(line["progress/step"], pytest.approx(line[name], rel=1e-6)) for line in lines]
    assert len(sessions(tmp_path)) == 3


def test_online_sends_what_the_server_lacks(tmp_path, server):
    found = server()
    log_steps(tmp_path, 1, 7, WANDB, mode="online")
    assert found.history() == read_metrics(tmp_path)
    # From a checkpoint at the fifth step.
    with start(tmp_path, WANDB, mode="online") as metrics:
        metrics.resume(5)
        log(metrics, 6, 8, scale=9.0)
    assert len(found.lines) == 7 + 3 and found.history() == read_metrics(tmp_path)
    # The last two were still in memory when the run was killed.
    for _ in range(2):
        found.lines.popitem()
    found.summary["progress/step"] = 6
    log_steps(tmp_path, 9, 10, WANDB, mode="online")
    assert len(found.lines) == 8 + 2 + 2 and found.history() == read_metrics(tmp_path)
    assert found.ids == {(tmp_path / WANDB_ID).read_text()}
    assert not files_with_key(tmp_path)


def test_the_newest_offline_folder_is_enough_to_sync(tmp_path, server):
    log_steps(tmp_path, 1, 7, WANDB)
    log_steps(tmp_path, 6, 8, WANDB)
    found = server()
    sync = [sys.executable, "-m", "wandb", "sync", str(tmp_path / "wandb/latest-run")]
    subprocess.run(sync, check=True, capture_output=True, cwd=tmp_path)  # where it leaves a log
    assert found.history() == read_metrics(tmp_path) and len(found.lines) == 8
    assert found.ids == {(tmp_path / WANDB_ID).read_text()}


def test_a_connection_that_breaks_later_stops_nothing(tmp_path, server):
    found = server()
    with start(tmp_path, WANDB, mode="online", timeout_s=1.0) as metrics:
        metrics.resume(0)
        log(metrics, 1, 1)
        found.close()
        log(metrics, 2, 5)
    assert len(read_metrics(tmp_path)) == 5


def test_the_trackers_are_told_what_the_run_is(tmp_path):
    manifest = Manifest("run", config={"optimizer": {"lr": 0.5}})
    log_steps(tmp_path, 1, 1, BOTH, manifest=manifest)
    [session] = sessions(tmp_path)
    [run] = [r.run for r in session if r.WhichOneof("record_type") == "run" and r.run.config.update][:1]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["optimizer"] == {"lr": 0.5}
    assert run.display_name == tmp_path.name and run.resume
    events = EventAccumulator(str(tmp_path / TENSORBOARD)).Reload()
    texts = {tag: events.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in events.Tags()["tensors"]}
    assert '"lr": 0.5' in texts["config/text_summary"]
    made_with = config["made_with"]
    assert json.loads(texts["made_with/text_summary"]) == made_with
    assert {"torch", "megatron-core", "minitron-megatron", "python"} <= made_with["versions"].keys()
    root = Path(__file__).parents[3]
    if (root / ".git").exists():
        commit = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
        assert made_with["git_revision"].removesuffix("-dirty") == commit.stdout.strip()


def result(folder, kind, **parents):
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(folder.name.encode() * 10_000)
    Manifest(kind, parents=[Parent.of(role, path) for role, path in parents.items()]).write(folder)
    return folder


def test_lineage_is_artifacts_by_reference(tmp_path):
    teacher = result(tmp_path / "teacher", "checkpoint")
    scores = result(tmp_path / "scores", "scores", checkpoint=teacher)
    pruned = result(tmp_path / "pruned", "checkpoint", checkpoint=teacher, scores=scores)
    output = result(tmp_path / "distilled/checkpoints", "checkpoint", student=pruned, teacher=teacher)
    manifest = Manifest("run", parents=[Parent.of("student", pruned), Parent.of("teacher", teacher)])
    with start(tmp_path / "distilled", WANDB, manifest=manifest) as metrics:
        metrics.resume(0)
        log(metrics, 1, 1)
        metrics.log_output("distilled", output)
    [session] = sessions(tmp_path / "distilled")
    found = {a.name.rpartition("-")[0]: a for a in artifacts(session)}
    assert list(found) == ["teacher", "scores", "pruned", "distilled"]  # each after what it was made from
    assert {name for name, a in found.items() if a.use_after_commit} == {"pruned", "teacher", "scores"}
    metadata = {name: json.loads(a.metadata) for name, a in found.items()}
    ours = {name: values["fingerprint"] for name, values in metadata.items()}
    assert (
        ours["teacher"] == Parent.of("", teacher).fingerprint and ours["distilled"] == Parent.of("", output).fingerprint
    )
    assert metadata["pruned"]["parents"] == {"checkpoint": ours["teacher"], "scores": ours["scores"]}
    assert metadata["distilled"]["parents"] == {"student": ours["pruned"], "teacher": ours["teacher"]}
    assert {name: a.type for name, a in found.items()}["scores"] == "scores"
    for artifact in found.values():
        assert artifact.manifest.contents
        assert all(entry.ref.startswith("file://") and not entry.local_path for entry in artifact.manifest.contents)
    # Another run that sees the same result knows it by the same name.
    assert found["teacher"].name.endswith(ours["teacher"][:12])


def test_figures_are_images(tmp_path):
    figure = Figure(figsize=(2, 1))
    figure.savefig(tmp_path / "loss.png", dpi=50)
    with start(tmp_path, BOTH) as metrics:
        metrics.resume(0)
        log(metrics, 1, 2)
        metrics.log_figures([tmp_path / "loss.png"])
    [session] = sessions(tmp_path)
    image = rows(session)[-1]
    assert (image["figures/loss/width"], image["figures/loss/height"]) == (100, 50)
    [file] = tmp_path.glob("wandb/offline-run-*/files/media/images/figures/loss*.png")
    assert file.read_bytes() == (tmp_path / "loss.png").read_bytes()
    assert history(tmp_path)[1] == read_metrics(tmp_path)
    [image] = EventAccumulator(str(tmp_path / TENSORBOARD)).Reload().Images("figures/loss")
    assert (image.width, image.height) == (100, 50)


def test_results_are_numbers_by_model_and_a_table(tmp_path):
    results = {"teacher": {"heldout/loss": 2.5, "arc/acc": 0.5}, "distilled": {"heldout/loss": 2.75}}
    with start(tmp_path, BOTH) as metrics:
        metrics.resume(0)
        log(metrics, 1, 2)
        metrics.log_results(results)
    [session] = sessions(tmp_path)
    found = {name: value for name, value in rows(session)[-1].items() if name.startswith("evaluate/")}
    expected = {f"evaluate/{model}/{name}": value for model, part in results.items() for name, value in part.items()}
    assert found == expected
    [file] = tmp_path.glob("wandb/offline-run-*/files/media/table/evaluations*.json")
    assert json.loads(file.read_text())["data"][1] == ["teacher", "arc/acc", 0.5]
    assert history(tmp_path)[1] == read_metrics(tmp_path)
    drawn = EventAccumulator(str(tmp_path / TENSORBOARD)).Reload()
    assert {name: drawn.Scalars(name)[0].value for name in expected} == expected


def test_a_disabled_tracker_writes_nothing_but_the_file(tmp_path):
    log_steps(tmp_path, 1, 2, WANDB, mode="disabled")
    assert [line["loss/total"] for line in read_metrics(tmp_path)] == pytest.approx([1, 0.5])
    assert not list(tmp_path.rglob("*.wandb"))


def test_a_tracker_that_fails_later_is_said_once_and_stops_nothing(tmp_path, monkeypatch, caplog):
    def fails(*arguments, **settings):
        raise ConnectionError("no route to host")

    for name in ("log", "finish", "_log_artifact"):
        monkeypatch.setattr(wandb.Run, name, fails)
    with caplog.at_level(logging.WARNING):
        log_steps(tmp_path, 1, 5, BOTH)
    assert len(read_metrics(tmp_path)) == 5
    assert len(tensorboard(tmp_path)["loss/total"]) == 5
    [message] = [r.message for r in caplog.records if r.name.startswith("minitron_megatron")]
    assert "Wandb fails" in message and "no route to host" in message


@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_refused(tmp_path, server, status):
    server(status=status)
    message = rf"tracking.trackers = \[wandb\] with tracking.mode = online: wandb does not start.*{status}.*wandb login"
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, WANDB, mode="online")
    assert not files_with_key(tmp_path)


def test_a_key_that_is_none(tmp_path, server):
    server("http://127.0.0.1:9", key="short")
    with pytest.raises(ConfigError, match="wandb does not start") as error:
        start(tmp_path, WANDB, mode="online")
    assert "short" not in str(error.value).replace("too short", "")


def test_no_key(tmp_path, server):
    server("http://127.0.0.1:9", key=None)
    with pytest.raises(ConfigError, match="tracking.mode = online: wandb does not start.*set tracking.mode=offline"):
        start(tmp_path, WANDB, mode="online")


def test_a_server_that_does_not_answer(tmp_path, server):
    server("http://127.0.0.1:9")
    with pytest.raises(ConfigError, match="wandb does not start.*within tracking.timeout_s = 1"):
        start(tmp_path, WANDB, mode="online", timeout_s=1.0)


@pytest.mark.parametrize("tracker, module", [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_package_that_is_missing(tmp_path, monkeypatch, tracker, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = rf"tracking.trackers = \[{tracker}\].*: {tracker} does not start.*pip install {tracker}"
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, [Tracker(tracker)])


def test_a_tracker_that_started_is_ended_when_the_next_one_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="tensorboard does not start"):
        start(tmp_path, BOTH)
    [session] = sessions(tmp_path)
    [end] = [record.exit for record in session if record.WhichOneof("record_type") == "exit"]
    assert end.exit_code == 1


@pytest.mark.parametrize("damage", ["{\n", "not json\n", "[1]\n", "null\n", '{"loss/total": 1}\n', "[" * 10**5 + "\n"])
def test_a_damaged_line_is_named(tmp_path, damage):
    (tmp_path / "metrics.jsonl").write_text('{"progress/step": 1}\n' + damage + '{"progress/step": 3}\n')
    with pytest.raises(CheckpointError, match=r"metrics.jsonl, line 2 (is damaged|has no progress/step)"):
        read_metrics(tmp_path)
