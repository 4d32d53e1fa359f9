"""Experiment trackers: epochs, test metrics and files of a training as TensorBoard's files or as a run of MLflow."""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from seewhy.config import TrainConfig, dump_config
from seewhy.core.files import atomic_write
from seewhy.core.progress import LOG
from seewhy.errors import ConfigError, require
from seewhy.evaluation.metrics import HEADLINE
from seewhy.version import __version__

RECORD = "mlflow.json"  # run_id: which run of MLflow this is; complete: whether all of it was uploaded
EXPERIMENT = "seewhy"  # unless $MLFLOW_EXPERIMENT_NAME says another
ARTIFACTS = ("run.json", "metrics.json", "split.json", "history.csv", "README.md", "report.html", "log.txt")  # and figures/; no weights
MISSED = "misses a part, which is sent at the end of the training"

# MLflow waits for minutes where a server is gone, reports its use, and prints on stdout. The user's own settings win.
SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # s
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def check_tracker(config: TrainConfig) -> None:
    """Raise ConfigError where the tracker's package is not installed."""
    if config.tracker != "none":
        require(config.tracker, f"--tracker {config.tracker}", config.tracker)


def make_loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    """Lightning's loggers of a fit in `folder`; for MLflow where it has a run (the trials of a search have none)."""
    if config.tracker == "tensorboard":
        return [TensorBoardLogger(str(folder), name=None, version="tensorboard")]
    record = _read_record(folder) if config.tracker == "mlflow" else None
    loggers: list[Logger] = []
    if record is not None:
        _attempt(MISSED, lambda: loggers.append(EpochLogger(record["run_id"])))
    for logger in loggers:
        logger.log_hyperparams(dump_config(config))
    return loggers


@contextmanager
def tracked(config: TrainConfig, work: Path, target: Path) -> Iterator[None]:
    """Keep a run of MLflow for a training in `work`, the same after a resume; mark it where it fails, else upload `target`.

    Raises ConfigError where no run can be created; what fails later is a warning.
    """
    if config.tracker != "mlflow":
        yield
        return
    run_id = _begin(work, target.name)
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        _attempt("still shows the training as running", lambda: _client().set_terminated(run_id, status))
        raise
    upload_run(target)


def upload_run(folder: Path) -> None:
    """Send MLflow what it lacks of a finished run: missed epochs, test metrics, ARTIFACTS. A run that was not tracked is left alone."""
    record = _read_record(folder)
    if record is None or record["complete"]:
        return

    def upload() -> None:
        run_id, logger = record["run_id"], EpochLogger(record["run_id"])
        client, manifest = logger.experiment, json.loads((folder / "run.json").read_text(encoding="utf-8"))
        client.update_run(run_id, status="RUNNING")
        MLFlowLogger.log_hyperparams(logger, manifest["config"])
        known = {metric.step for metric in client.get_metric_history(run_id, "seconds")}
        with (folder / "history.csv").open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if (epoch := int(float(row.pop("epoch")))) not in known:
                    MLFlowLogger.log_metrics(logger, {name: float(value) for name, value in row.items()}, epoch)
        MLFlowLogger.log_metrics(logger, final_metrics(manifest), int(manifest["best_epoch"]))
        for name in ("data", "split"):
            client.set_tag(run_id, f"{name}_sha256", manifest[name]["hash"])
        for name in ARTIFACTS:
            if (folder / name).is_file():
                client.log_artifact(run_id, str(folder / name))
        if (folder / "figures").is_dir():
            client.log_artifacts(run_id, str(folder / "figures"), "figures")
        client.set_terminated(run_id, "FINISHED")
        _write_record(folder, {**record, "complete": True})

    _attempt(f"lacks a part of {folder}, which is whole; the same command with --resume sends it again", upload)


def final_metrics(manifest: dict[str, Any]) -> dict[str, float]:
    """What MLflow shows of a finished run: test_accuracy, test_accuracy_low and _high (the ends of the 95% interval), ..., seconds_..."""
    test = manifest["metrics"]["test"]
    names = [name for name in HEADLINE if name in test]  # no top-5 of five classes or fewer
    found = {f"test_{name}": test[name] for name in (*names, "expected_calibration_error")}
    found |= {f"test_{name}_{end}": test[f"{name}_ci95"][i] for name in names for i, end in enumerate(("low", "high"))}
    found |= {"test_images": test["n"], "temperature": manifest["calibration"]["temperature"], "best_epoch": manifest["best_epoch"]}
    found |= {f"seconds_{name}": value for name, value in manifest["seconds"].items()}
    return {name: float(value) for name, value in found.items() if value is not None}


class EpochLogger(MLFlowLogger):
    """Lightning's logger on a run that exists; silent after the first call that fails, since `upload_run` sends the rest."""

    def __init__(self, run_id: str) -> None:
        super().__init__(tracking_uri=_uri(), run_id=run_id)
        self.lost = False

    @property
    def experiment(self) -> Any:
        """MLflow's client; Lightning's own property would change the tracking URI of the whole process."""
        return self._mlflow_client

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.lost = self.lost or not _attempt(MISSED, lambda: MLFlowLogger.log_metrics(self, metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        self.lost = self.lost or not _attempt(MISSED, lambda: MLFlowLogger.log_hyperparams(self, params))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Leave the run open: the fit is not its end."""


def _begin(work: Path, name: str) -> str:
    """The run's id: of the record in `work`, else of a new run."""
    if (record := _read_record(work)) is not None:
        _attempt(MISSED, lambda: _client().update_run(record["run_id"], status="RUNNING"))
        return str(record["run_id"])
    try:
        with _settings():
            client, experiment = _client(), os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
            known = client.get_experiment_by_name(experiment)
            number = known.experiment_id if known is not None else client.create_experiment(experiment)
            tags = {"mlflow.source.name": "seewhy", "seewhy_version": __version__}
            run_id = str(client.create_run(number, run_name=name, tags=tags).info.run_id)
    except Exception as error:  # a dozen types, by kind of store
        raise ConfigError(
            f"{_without_password(_uri())}: MLflow begins no run ({_reason(error)}); start its server, set MLFLOW_TRACKING_URI to another "
            "place, or leave --tracker mlflow out"
        ) from error
    _write_record(work, {"experiment": experiment, "run_id": run_id, "complete": False})
    return run_id


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {**record, "run_id": str(record["run_id"]), "complete": bool(record["complete"])}
    except (OSError, ValueError, KeyError, TypeError):  # a spoiled one is as good as none
        return None


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with atomic_write(folder / RECORD, "free some space") as work:
        work.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _attempt(consequence: str, call: Callable[[], Any]) -> bool:
    """Call MLflow; whether it worked, with one warning where not: no failure of a tracker is worth a training."""
    try:
        with _settings():
            call()
    except Exception as error:
        LOG.warning(f"{_without_password(_uri())}: MLflow {consequence} ({_reason(error)})")
        return False
    return True


@contextmanager
def _settings() -> Iterator[None]:
    """Set what SETTINGS has and the environment has not; MLflow reads it at each call."""
    ours = {name: value for name, value in SETTINGS.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _uri() -> str:
    import mlflow

    return str(mlflow.get_tracking_uri())


def _client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(_uri())


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def _reason(error: BaseException) -> str:
    """The operating system's reason where there is one, else the error's first 200 characters."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    first = next((each for each in reversed(chain) if isinstance(each, OSError) and str(each)), error)
    return getattr(first, "strerror", None) or _without_password(" ".join(str(first).split()))[:200] or type(first).__name__
