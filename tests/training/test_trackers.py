"""Who is told of a training: TensorBoard, MLflow's local store, a real MLflow server that vanishes and comes back, or nobody."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import seewhy
from seewhy.cli.guard import run_guarded
from seewhy.cli.main import call
from seewhy.config import make_config
from seewhy.errors import ConfigError, DataError
from seewhy.training import fit as fit_module
from seewhy.training import trackers
from tests.training.test_pipeline import SMALL, interrupt_after, same_weights

pytestmark = pytest.mark.usefixtures("one_thread")
STARTS_S = 90  # most that a server may take on a busy machine
PER_EPOCH = {"train_loss", "train_accuracy", "val_loss", "val_accuracy", "lr", "seconds"}


@pytest.fixture
def folder(make_folder: Callable[..., Path], cache: Path) -> Path:
    return make_folder({"ant": 10, "bee": 10, "cow": 12})


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MLflow's store in a file, which no server is needed for; it takes seconds to make."""
    pytest.importorskip("mlflow", reason="MLflow's client is not installed: pip install mlflow-skinny")
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/mlflow.db"


@pytest.fixture
def local(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """MLflow's client on the store, which stands in the environment with an experiment for this test."""
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)  # where MLflow puts the artifacts of local stores
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", tmp_path.name)
    return MlflowClient(store)


def runs_of(client: Any, experiment: str) -> list[Any]:
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


def record_of(run: seewhy.Run) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run.path / trackers.RECORD).read_text())
    return found


def history_of(run: seewhy.Run, name: str) -> list[float]:
    lines = (run.path / "history.csv").read_text().splitlines()
    place = lines[0].split(",").index(name)
    return [float(line.split(",")[place]) for line in lines[1:]]


# ---------------------------------------------------------------- files


def test_tensorboard_holds_what_history_holds(folder: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = seewhy.train(folder, out=tmp_path / "run", tracker="tensorboard", **SMALL)
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == PER_EPOCH
    assert [event.step for event in events.Scalars("val_loss")] == [1, 2]
    assert [event.value for event in events.Scalars("val_loss")] == pytest.approx(history_of(run, "val_loss"))
    assert not (run.path / trackers.RECORD).exists()
    silent = seewhy.train(folder, out=tmp_path / "silent", **SMALL)
    assert not (silent.path / "tensorboard").exists()
    assert same_weights(run, silent)


def test_mlflow_s_local_store_has_all_of_a_run(folder: Path, tmp_path: Path, local: Any) -> None:
    before = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
    run = seewhy.train(folder, out=tmp_path / "run", tracker="mlflow", **SMALL)
    assert {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"} == before
    record = record_of(run)
    assert record["complete"]
    found = local.get_run(record["run_id"])
    assert local.get_experiment(found.info.experiment_id).name == record["experiment"] == tmp_path.name
    assert (found.info.run_name, found.info.status) == ("run", "FINISHED")
    for name in PER_EPOCH:
        metrics = sorted(local.get_metric_history(record["run_id"], name), key=lambda metric: metric.step)
        assert [metric.step for metric in metrics] == [1, 2]
        assert [metric.value for metric in metrics] == pytest.approx(history_of(run, name))
    test = run.metrics["test"]
    assert found.data.metrics["test_accuracy"] == pytest.approx(test["accuracy"])
    assert [found.data.metrics[f"test_macro_f1_{end}"] for end in ("low", "high")] == pytest.approx(test["macro_f1_ci95"])
    assert found.data.params == {name: str(value) for name, value in run.manifest["config"].items()}
    assert found.data.tags["data_sha256"] == run.manifest["data"]["hash"]
    files = {file.path: file for file in local.list_artifacts(record["run_id"])}
    assert set(files) == {*trackers.ARTIFACTS, "figures"}
    assert files["report.html"].file_size == (run.path / "report.html").stat().st_size


def test_a_resume_goes_on_in_the_same_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a store of plain files, which MLflow keeps for those who ask for it."""
    mlflow = pytest.importorskip("mlflow", reason="MLflow's client is not installed: pip install mlflow-skinny")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    with pytest.raises(ConfigError, match=r"cannot create an MLflow run .*maintenance mode"):
        seewhy.train(folder, out=tmp_path / "run", tracker="mlflow", **SMALL)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    local = mlflow.MlflowClient(f"file:{tmp_path}/mlruns")
    options = {**SMALL, "epochs": 3, "tracker": "mlflow"}
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)  # in the second epoch
        with pytest.raises(KeyboardInterrupt):
            seewhy.train(folder, out=tmp_path / "run", **options)
    run_id = json.loads((tmp_path / ".run.partial" / trackers.RECORD).read_text())["run_id"]
    assert local.get_run(run_id).info.status == "KILLED"
    run = seewhy.train(folder, out=tmp_path / "run", resume=True, **options)
    assert record_of(run)["run_id"] == run_id
    assert [run.info.run_id for run in runs_of(local, "seewhy")] == [run_id]
    assert local.get_run(run_id).info.status == "FINISHED"
    losses = {metric.step: metric.value for metric in local.get_metric_history(run_id, "val_loss")}
    assert [losses[epoch] for epoch in (1, 2, 3)] == pytest.approx(history_of(run, "val_loss"))


def test_a_training_that_fails_is_a_failed_run(tmp_path: Path, local: Any) -> None:
    config = make_config(data="x", tracker="mlflow")
    with pytest.raises(DataError, match="as it was"), trackers.tracked(config, tmp_path, tmp_path / "run"):
        raise DataError("as it was")
    (run,) = runs_of(local, tmp_path.name)
    assert (run.info.status, run.info.run_name) == ("FAILED", "run")


def test_trials_of_a_search_tell_nobody(tmp_path: Path, local: Any) -> None:
    config = make_config(data="x", tracker="mlflow")
    assert trackers.make_loggers(config, tmp_path) == []  # a folder that is no work folder of a tracked training
    with trackers.tracked(make_config(data="x", tracker="none"), tmp_path, tmp_path / "run"):
        assert trackers.make_loggers(config, tmp_path) == []


# ---------------------------------------------------------------- mistakes


def test_no_server_at_the_start_is_one_line_before_anything_is_read(
    folder: Path, tmp_path: Path, local: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    monkeypatch.setattr("seewhy.training.pipeline.open_images", lambda *_: pytest.fail("images are read"))
    began = time.monotonic()
    command = ["train", str(folder), "--tracker", "mlflow", "--out", str(tmp_path / "run"), "--backbone", "test_resnet.r160_in1k"]
    assert run_guarded(lambda: call([*command, "--weights", "none"])) == 2
    assert time.monotonic() - began < 30
    error = capsys.readouterr().err
    assert error == (
        f"seewhy: http://127.0.0.1:{port}: cannot create an MLflow run (Connection refused); start the server, change MLFLOW_TRACKING_URI, "
        "or drop --tracker mlflow\n"
    )
    assert not list(tmp_path.glob("*run*"))


def test_a_server_that_says_nothing_is_one_line_soon(tmp_path: Path, local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")  # what the user says about patience counts
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begin = trackers.tracked(make_config(data="x", tracker="mlflow"), tmp_path, tmp_path / "run")
        with pytest.raises(ConfigError, match=r"cannot create an MLflow run \(.*timed out"):
            begin.__enter__()
    assert time.monotonic() - began < 8


def test_a_resume_goes_on_without_the_server(
    tmp_path: Path, local: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(data="x", tracker="mlflow")
    (tmp_path / trackers.RECORD).write_text('{"run_id": "0123", "complete": false}')
    with socket.create_server(("127.0.0.1", 0)) as free:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free.getsockname()[1]}")
    with trackers.tracked(config, tmp_path, tmp_path / "run"):
        (logger,) = trackers.make_loggers(config, tmp_path)
        for epoch in (1, 2, 3):
            logger.log_metrics({"val_loss": 1.0}, epoch)
    lines = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING and line.name == "seewhy"]
    said = [line.partition(": MLflow ")[2] for line in lines]
    assert said == [f"{trackers.SYNC_LATER} (Connection refused)"] * 2  # at its start and in its fit


def test_a_run_that_cannot_be_begun_is_one_line(tmp_path: Path, local: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlflow.MlflowClient.create_run", lambda *_, **__: 1 / 0)
    begin = trackers.tracked(make_config(data="x", tracker="mlflow"), tmp_path, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"cannot create an MLflow run \(division by zero\); .* or drop --tracker mlflow"):
        begin.__enter__()
    assert not (tmp_path / trackers.RECORD).exists()


def test_an_unknown_tracker_is_one_line() -> None:
    with pytest.raises(ConfigError, match=r"option tracker: input should be 'tensorboard', 'mlflow' or 'none', not 'wandb'"):
        make_config(data="x", tracker="wandb")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("request to https://me:pw@host:80/api failed\nagain"), "request to https://host:80/api failed again"),
        (KeyError(), "KeyError"),
        (OSError(111, "Connection refused"), "Connection refused"),
    ],
)
def test_reasons_are_short_and_keep_secrets(error: Exception, text: str) -> None:
    assert trackers._reason(error) == text


def test_a_spoiled_record_is_as_good_as_none(tmp_path: Path) -> None:
    for content in ("", "[]", '{"run_id": 1}', "{"):
        (tmp_path / trackers.RECORD).write_text(content)
        assert trackers._read_record(tmp_path) is None
    trackers.sync_run(tmp_path)  # does nothing


# ---------------------------------------------------------------- a real server


class Server:
    """An MLflow server on a free port of this machine, of the environment that `make test` installs for it."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program, self.folder = program, folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("MLFLOW", "PYTHON"))}
        command = [self.program, "server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/store.db", "--artifacts-destination", str(self.folder / "artifacts")]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=clean | quiet, cwd=self.folder, start_new_session=True)
        end = time.monotonic() + STARTS_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.address}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.2)
        log_text = (self.folder / "log").read_text()
        self.stop()
        raise AssertionError(f"MLflow's server did not start in {STARTS_S} s: {log_text[-2000:]}")

    def stop(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # it has children
            self.process.wait()
            self.process = None

    def ask(self, method: str, **values: str) -> Any:
        """MLflow's REST API, without MLflow's client."""
        query = "&".join(f"{name}={value}" for name, value in values.items())
        with urllib.request.urlopen(f"{self.address}/api/2.0/mlflow/{method}?{query}", timeout=30) as answer:
            return json.load(answer)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    pytest.importorskip("mlflow", reason="MLflow's client is not installed: pip install mlflow-skinny")
    program = Path(os.environ.get("SEEWHY_MLFLOW_SERVER", Path(sys.prefix) / "mlflow" / "bin" / "mlflow"))
    if not program.is_file():
        pytest.skip("no MLflow server here: `make test` installs it where it can, and SEEWHY_MLFLOW_SERVER names another")
    (tmp_path / "server").mkdir()
    found = Server(program, tmp_path / "server")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", found.address)
    try:
        found.start()
        yield found
    finally:
        found.stop()


def test_a_real_server_that_vanishes_and_comes_back(
    folder: Path, tmp_path: Path, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Told of the first epoch; killed in the second; the training ends well without it; it comes back, and is sent what it lacks."""
    told = fit_module.HistoryCallback.on_train_epoch_end

    def vanish(self: fit_module.HistoryCallback, trainer: Any, module: Any) -> None:
        if trainer.current_epoch == 1:
            server.stop()
        told(self, trainer, module)

    options = {**SMALL, "epochs": 3, "tracker": "mlflow"}
    with monkeypatch.context() as patch:
        patch.setattr(fit_module.HistoryCallback, "on_train_epoch_end", vanish)
        began = time.monotonic()
        run = seewhy.train(folder, out=tmp_path / "run", **options)
        assert time.monotonic() - began < 60  # it waits for nobody
    record = record_of(run)
    assert not record["complete"]
    warnings = [line.getMessage() for line in caplog.records if line.levelno == logging.WARNING and line.name == "seewhy"]
    assert len(warnings) == 2  # not one an epoch
    assert warnings[0] == f"{server.address}: MLflow {trackers.SYNC_LATER} (Connection refused)"
    assert warnings[1].startswith(
        f"{server.address}: MLflow has only a part of {run.path}, which is complete; repeat the command with --resume"
    )

    server.start()

    def steps() -> list[int]:
        answer = server.ask("metrics/get-history", run_id=record["run_id"], metric_key="val_loss")
        return [int(metric.get("step", 0)) for metric in answer["metrics"]]

    assert steps() == [1]
    assert server.ask("runs/get", run_id=record["run_id"])["run"]["info"]["status"] == "RUNNING"
    again = seewhy.train(folder, out=tmp_path / "run", resume=True, **options)
    assert record_of(again) == {**record, "complete": True}
    assert sorted(steps()) == [1, 2, 3]
    found = server.ask("runs/get", run_id=record["run_id"])["run"]
    assert found["info"]["status"] == "FINISHED"
    metrics = {metric["key"]: metric["value"] for metric in found["data"]["metrics"]}
    low, high = run.metrics["test"]["accuracy_ci95"]
    assert [metrics[f"test_accuracy{end}"] for end in ("", "_low", "_high")] == pytest.approx([run.metrics["test"]["accuracy"], low, high])
    params = {param["key"]: param["value"] for param in found["data"]["params"]}
    assert params == {name: str(value) for name, value in run.manifest["config"].items()}
    files = server.ask("artifacts/list", run_id=record["run_id"])["files"]
    assert {file["path"] for file in files} == {*trackers.ARTIFACTS, "figures"}
    stored = server.folder / "artifacts" / "1" / record["run_id"] / "artifacts" / "run.json"
    assert stored.read_bytes() == (run.path / "run.json").read_bytes()
    # Told once: a third time asks nobody, and the server may be away.
    server.stop()
    caplog.clear()
    seewhy.train(folder, out=tmp_path / "run", resume=True, **options)
    assert [line for line in caplog.records if line.levelno == logging.WARNING] == []
