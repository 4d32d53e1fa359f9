"""Log a training to an experiment tracker: TensorBoard files or an MLflow run."""

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
from seewhy.core.files import atomic_write, write_json
from seewhy.core.process_state import environment
from seewhy.core.progress import LOG
from seewhy.errors import ConfigError
from seewhy.evaluation.metrics import HEADLINE
from seewhy.version import __version__

RECORD = "mlflow.json"  # experiment, run_id, and complete: whether everything was uploaded
EXPERIMENT = "seewhy"  # default of $MLFLOW_EXPERIMENT_NAME
ARTIFACTS = ("run.json", "metrics.json", "split.json", "history.csv", "README.md", "report.html", "log.txt")  # and figures/
SYNC_LATER = "missed an update; it is sent again at the end of the training"

# By default MLflow waits for minutes for a server, sends telemetry, and prints to stdout. The user's own settings win.
MLFLOW_ENV = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # s
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


def make_loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    """Make Lightning's loggers for a fit in `folder`; the trials of a search have no MLflow run and no logger."""
    if config.tracker == "tensorboard":
        return [TensorBoardLogger(str(folder), name=None, version="tensorboard")]
    record = _read_record(folder) if config.tracker == "mlflow" else None
    loggers: list[Logger] = []
    if record is not None:
        _attempt(SYNC_LATER, lambda: loggers.append(EpochLogger(record["run_id"])))
    for logger in loggers:
        logger.log_hyperparams(dump_config(config))
    return loggers


@contextmanager
def tracked(config: TrainConfig, work: Path, target: Path) -> Iterator[None]:
    """Create the MLflow run of a training in `work`, or reopen it after a resume; at the end upload `target`, or mark the run as failed.

    Raises ConfigError if no run can be created; later failures are warnings.
    """
    if config.tracker != "mlflow":
        yield
        return
    run_id = _open_run(work, target.name)
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        _attempt("still shows the training as running", lambda: _client().set_terminated(run_id, status))
        raise
    sync_run(target)


def sync_run(folder: Path) -> None:
    """Upload the missing epochs, the test metrics and ARTIFACTS of a finished run to MLflow, unless it is complete or not tracked."""
    record = _read_record(folder)
    if record is None or record["complete"]:
        return

    def upload() -> None:
        run_id, logger = record["run_id"], EpochLogger(record["run_id"])
        client, manifest = logger.experiment, json.loads((folder / "run.json").read_text(encoding="utf-8"))
        client.update_run(run_id, status="RUNNING")
        MLFlowLogger.log_hyperparams(logger, manifest["config"])
        logged = {metric.step for metric in client.get_metric_history(run_id, "seconds")}
        with (folder / "history.csv").open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                if (epoch := int(float(row.pop("epoch")))) not in logged:
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

    _attempt(f"has only a part of {folder}, which is complete; repeat the command with --resume to upload the rest", upload)


def final_metrics(manifest: dict[str, Any]) -> dict[str, float]:
    """Metrics for MLflow: test_accuracy, its 95% interval test_accuracy_low and test_accuracy_high, ..., seconds_total, ..."""
    test = manifest["metrics"]["test"]
    names = [name for name in HEADLINE if name in test]  # five classes or fewer have no top-5
    metrics = {f"test_{name}": test[name] for name in (*names, "expected_calibration_error")}
    metrics |= {f"test_{name}_{end}": test[f"{name}_ci95"][i] for name in names for i, end in enumerate(("low", "high"))}
    metrics |= {"test_images": test["n"], "temperature": manifest["calibration"]["temperature"], "best_epoch": manifest["best_epoch"]}
    metrics |= {f"seconds_{name}": value for name, value in manifest["seconds"].items()}
    return {name: float(value) for name, value in metrics.items() if value is not None}


class EpochLogger(MLFlowLogger):
    """Lightning's logger for an existing MLflow run; stops after the first failed call, since `sync_run` uploads the rest."""

    def __init__(self, run_id: str) -> None:
        super().__init__(tracking_uri=_uri(), run_id=run_id)
        self.failed = False

    @property
    def experiment(self) -> Any:
        """MLflow's client; Lightning's own property would change the tracking URI of the whole process."""
        return self._mlflow_client

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.failed = self.failed or not _attempt(SYNC_LATER, lambda: MLFlowLogger.log_metrics(self, metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        self.failed = self.failed or not _attempt(SYNC_LATER, lambda: MLFlowLogger.log_hyperparams(self, params))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Keep the run open after the fit."""


def _open_run(work: Path, name: str) -> str:
    """Reopen the run recorded in `work`, or create one. Returns its id."""
    if (record := _read_record(work)) is not None:
        _attempt(SYNC_LATER, lambda: _client().update_run(record["run_id"], status="RUNNING"))
        return str(record["run_id"])
    try:
        with environment(**MLFLOW_ENV):
            client, experiment = _client(), os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
            existing = client.get_experiment_by_name(experiment)
            experiment_id = existing.experiment_id if existing is not None else client.create_experiment(experiment)
            tags = {"mlflow.source.name": "seewhy", "seewhy_version": __version__}
            run_id = str(client.create_run(experiment_id, run_name=name, tags=tags).info.run_id)
    except Exception as error:  # a dozen types, depending on the store
        raise ConfigError(
            f"{_without_password(_uri())}: cannot create an MLflow run ({_reason(error)}); start the server, change MLFLOW_TRACKING_URI, "
            "or drop --tracker mlflow"
        ) from error
    _write_record(work, {"experiment": experiment, "run_id": run_id, "complete": False})
    return run_id


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {**record, "run_id": str(record["run_id"]), "complete": bool(record["complete"])}
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        return None


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with atomic_write(folder / RECORD, "free some space") as work:
        write_json(work, record)


def _attempt(consequence: str, call: Callable[[], Any]) -> bool:
    """Call MLflow and return whether it worked; log a failure as a warning, which must not end the training."""
    try:
        with environment(**MLFLOW_ENV):
            call()
    except Exception as error:
        LOG.warning(f"{_without_password(_uri())}: MLflow {consequence} ({_reason(error)})")
        return False
    return True


def _uri() -> str:
    import mlflow

    return str(mlflow.get_tracking_uri())


def _client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(_uri())


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def _reason(error: BaseException) -> str:
    """The operating system's reason if there is one, else the first 200 characters of the error."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    first = next((each for each in reversed(chain) if isinstance(each, OSError) and str(each)), error)
    return getattr(first, "strerror", None) or _without_password(" ".join(str(first).split()))[:200] or type(first).__name__
