"""TrainConfig x run folder -> who is told of the training as it goes: TensorBoard's files in the folder, a run of MLflow, or nobody."""

from __future__ import annotations

import csv
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from seewhy import __version__
from seewhy.config import TrainConfig, dump_config
from seewhy.errors import ConfigError
from seewhy.progress import LOG
from seewhy.writing import whole_file

RECORD = "mlflow.json"  # which run of MLflow this is, and whether it has everything
EXPERIMENT = "seewhy"  # unless $MLFLOW_EXPERIMENT_NAME says another
RETRY_S = 60.0  # from a call that failed until the next one during a fit
ARTIFACTS = ("run.json", "metrics.json", "split.json", "history.csv", "README.md", "report.html", "log.txt")  # and figures/; no weights
LATER = "is told at the end if it answers then; training goes on"
HEADLINES = ("accuracy", "top5_accuracy", "mean_per_class_accuracy", "macro_f1")

# MLflow's own patience is minutes a call, which a training would wait for; it reports on its use, and prints on stdout. What the user
# has set counts.
MANNERS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",  # s
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


# ---------------------------------------------------------------- the whole of a training


def check_tracker(config: TrainConfig, resume: bool = False) -> None:
    """The mistakes that can be seen before any picture is read. Raises ConfigError where MLflow is not installed or does not answer;

    a training that goes on does so without it, and is told at its end.
    """
    if config.tracker != "mlflow":
        return
    if find_spec("mlflow") is None:
        raise ConfigError("--tracker mlflow needs MLflow's client: pip install mlflow-skinny (or seewhy's extra [mlflow])")
    place = "MLflow"
    try:
        with _manners():
            place = _place()
            _client().search_experiments(max_results=1)
    except Exception as error:  # a dozen types, by kind of place
        if not resume:
            raise ConfigError(
                f"{place}: MLflow cannot be reached ({_reason(error)}); start it, set MLFLOW_TRACKING_URI to another place, "
                "or leave --tracker mlflow out"
            ) from error
        LOG.warning(f"{place}: MLflow cannot be reached ({_reason(error)}); it {LATER}")


@contextmanager
def tracked(config: TrainConfig, work: Path, target: Path) -> Iterator[None]:
    """A training in `work` that stands in `target` when it is done: MLflow hears of its start, its failure or its end.

    The same run of MLflow is gone on with where `work` says which one. Raises ConfigError where none can be begun.
    """
    if config.tracker != "mlflow":
        yield
        return
    _begin(work, target.name)
    try:
        yield
    except BaseException as error:
        status = "KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED"
        _try("is not told that the training has ended", lambda: _end(work, status))
        raise
    tell_of_run(target)


def make_loggers(config: TrainConfig, folder: Path) -> list[Logger]:
    """Who hears of each epoch; MLflow where `folder` says which run (the trials of a search have none)."""
    if config.tracker == "tensorboard":
        return [TensorBoardLogger(str(folder), name=None, version="tensorboard")]
    record = _read_record(folder) if config.tracker == "mlflow" else None
    if record is None:
        return []
    loggers: list[Logger] = []
    _try(LATER, lambda: loggers.append(EpochsToMLflow(record["run_id"])))
    for logger in loggers:
        logger.log_hyperparams(dump_config(config))
    return loggers


def tell_of_run(folder: Path) -> None:
    """Sends MLflow what it lacks of a finished run: missed epochs, the numbers with their intervals, small files. Warns, raises nothing.

    Does nothing for runs that were not tracked, and for those that were told of already.
    """
    record = _read_record(folder)
    if record is None or record["told"]:
        return

    def tell() -> None:
        run_id, logger = record["run_id"], EpochsToMLflow(record["run_id"])
        manifest = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        client = logger.experiment
        client.update_run(run_id, status="RUNNING")  # also: does it answer at all
        MLFlowLogger.log_hyperparams(logger, manifest["config"])
        for row in _missing(client, run_id, folder / "history.csv"):
            MLFlowLogger.log_metrics(logger, {name: value for name, value in row.items() if name != "epoch"}, int(row["epoch"]))
        MLFlowLogger.log_metrics(logger, final_metrics(manifest), int(manifest["best_epoch"]))
        for name, value in _tags(manifest).items():
            client.set_tag(run_id, name, value)
        for name in ARTIFACTS:
            if (folder / name).is_file():
                client.log_artifact(run_id, str(folder / name))
        if (folder / "figures").is_dir():
            client.log_artifacts(run_id, str(folder / "figures"), "figures")
        client.set_terminated(run_id, "FINISHED")
        _write_record(folder, {**record, "told": True})

    _try(f"lacks a part of {folder}, which is whole; the same command with --resume sends it again", tell)


def final_metrics(manifest: dict[str, Any]) -> dict[str, float]:
    """What MLflow shows of a finished run: test_accuracy, test_accuracy_low and _high (the ends of the 95% interval), ..., seconds_..."""
    found: dict[str, float] = {}
    test = manifest["metrics"]["test"]
    for name in filter(test.__contains__, HEADLINES):
        low, high = test[f"{name}_ci95"]
        found |= {f"test_{name}": test[name], f"test_{name}_low": low, f"test_{name}_high": high}
    found |= {"test_pictures": test["n"], "test_expected_calibration_error": test["expected_calibration_error"]}
    found["temperature"] = manifest["calibration"]["temperature"]
    found["best_epoch"] = manifest["best_epoch"]
    found |= {f"seconds_{name}": value for name, value in manifest["seconds"].items()}
    return {name: float(value) for name, value in found.items() if value is not None}


def _tags(manifest: dict[str, Any]) -> dict[str, str]:
    return {
        "backbone": manifest["backbone"]["timm"],
        "data": manifest["data"]["name"],
        "data_sha256": manifest["data"]["hash"],
        "split_sha256": manifest["split"]["hash"],
    }


def _missing(client: Any, run_id: str, history: Path) -> list[dict[str, float]]:
    """Rows of the history whose epoch MLflow has not got."""
    known = {metric.step for metric in client.get_metric_history(run_id, "seconds")}
    with history.open(newline="", encoding="utf-8") as lines:
        rows = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(lines)]
    return [row for row in rows if int(row["epoch"]) not in known]


# ---------------------------------------------------------------- MLflow


class EpochsToMLflow(MLFlowLogger):
    """Lightning's logger on a run that exists. A server that does not answer costs a warning and a try every RETRY_S, no training."""

    def __init__(self, run_id: str) -> None:
        super().__init__(tracking_uri=_uri(), run_id=run_id)
        self.silent_until = 0.0  # on time.monotonic's clock

    @property
    def experiment(self) -> Any:
        """MLflow's client; Lightning's own property would change the tracking URI of the whole process."""
        return self._mlflow_client

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._told(lambda: MLFlowLogger.log_metrics(self, metrics, step))

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        self._told(lambda: MLFlowLogger.log_hyperparams(self, params))

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Nothing: the fit is not the end of the run."""

    def _told(self, tell: Callable[[], None]) -> None:
        if time.monotonic() >= self.silent_until and not _try(LATER, tell):
            self.silent_until = time.monotonic() + RETRY_S


def _begin(work: Path, name: str) -> None:
    record = _read_record(work)
    if record is not None:
        _try(LATER, lambda: _client().update_run(record["run_id"], status="RUNNING"))
        return
    try:
        with _manners():
            client, experiment = _client(), os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
            found = client.get_experiment_by_name(experiment)
            number = found.experiment_id if found is not None else client.create_experiment(experiment)
            tags = {"mlflow.source.name": "seewhy", "seewhy_version": __version__}
            run_id = client.create_run(number, run_name=name, tags=tags).info.run_id
    except Exception as error:
        raise ConfigError(f"{_place()}: MLflow begins no run ({_reason(error)}); mend that, or leave --tracker mlflow out") from error
    _write_record(work, {"server": _place(), "experiment": experiment, "run_id": run_id, "told": False})


def _end(work: Path, status: str) -> None:
    record = _read_record(work)
    if record is not None:
        _client().set_terminated(record["run_id"], status)


def _read_record(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        return {**record, "run_id": str(record["run_id"]), "told": bool(record["told"])}
    except (OSError, ValueError, KeyError, TypeError):  # a spoiled one is as good as none
        return None


def _write_record(folder: Path, record: dict[str, Any]) -> None:
    with whole_file(folder / RECORD, "free some space") as work:
        work.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@contextmanager
def _manners() -> Iterator[None]:
    """MANNERS in the environment, where MLflow looks for them at each call."""
    ours = {name: value for name, value in MANNERS.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


def _try(consequence: str, tell: Callable[[], Any]) -> bool:
    """Whether MLflow took it; one warning where not."""
    try:
        with _manners():
            tell()
    except Exception as error:  # of the network, of the server, of a full disk of its: none is worth a training
        LOG.warning(f"{_place()}: MLflow {consequence} ({_reason(error)})")
        return False
    return True


def _uri() -> str:
    import mlflow

    return str(mlflow.get_tracking_uri())


def _client() -> Any:
    from mlflow import MlflowClient

    return MlflowClient(_uri())


def _place() -> str:
    """Where MLflow is, without the name and password that an address may hold."""
    try:
        return _without_secrets(_uri())
    except ImportError:
        return "MLflow"


def _without_secrets(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def _reason(error: BaseException) -> str:
    """The first cause, in few words."""
    chain, cause = [error], error.__cause__ or error.__context__
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    system = next((e.strerror for e in reversed(chain) if isinstance(e, OSError) and e.errno and e.strerror), None)
    if system is None and any(isinstance(e, TimeoutError) for e in chain):
        system = "no answer in time"
    return system or _without_secrets(" ".join(str(error).split()))[:200] or type(error).__name__
