"""TrainConfig x a number of processes -> a run that they train together, on this machine or on several, by PyTorch's elastic launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from seewhy.config import TrainConfig, dump_config
from seewhy.core.distributed import is_peer_failure
from seewhy.core.signals import stop_on_signals
from seewhy.errors import ConfigError, RunError, SeewhyError, one_line

EXIT_PEER_LOST = 75  # exit status of a process whose peers no longer answer
MESSAGE_KEY = "seewhy"  # of an error file: the line for the user


def launch(
    config: TrainConfig, out: Path | None, resume: bool = False, devices: int = 1, nodes: int = 1, rendezvous: str | None = None
) -> Path:
    """Starts `devices` processes here that train one run together, with those of the other machines where there are several.

    rendezvous: host:port of one of the machines, the same on all of them. Returns the run's folder.
    Raises the error of the process that failed first, after the others have been ended; what is finished is kept for `resume`.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from seewhy.training.run_dirs import resolve_run_dir

    if nodes > 1 and (rendezvous is None or out is None):
        raise ConfigError("--nodes needs --rendezvous HOST:PORT of one of the machines, and --out on a disk that all of them share")
    target = resolve_run_dir(config.resolved(), out, resume).target
    with tempfile.TemporaryDirectory() as folder, _silence_launcher_log(), _omp_threads(max(1, len(_usable_cores()) // devices)):
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(dump_config(config)), encoding="utf-8")
        command = ["-m", "seewhy.training.launch", str(file), str(target), *(["--resume"] if resume else [])]
        settings = LaunchConfig(
            min_nodes=nodes,
            max_nodes=nodes,
            nproc_per_node=devices,
            run_id="seewhy",
            rdzv_backend="c10d",
            rdzv_endpoint=rendezvous or "localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=str(Path(folder) / "logs")),
        )
        try:
            elastic_launch(settings, sys.executable)(*command)
        except ChildFailedError as error:
            rank, failure = min(error.failures.items(), key=lambda item: _failure_priority(item[1]))
            raise _to_error(rank, devices * nodes, failure, target) from error
        except SignalException as error:
            raise KeyboardInterrupt from error
    return target


@contextmanager
def _silence_launcher_log() -> Iterator[None]:
    """Silence the launcher's own log: one line at the end says what happened."""
    log = logging.getLogger("torch.distributed.elastic")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


@contextmanager
def _omp_threads(count: int) -> Iterator[None]:
    """Set OMP_NUM_THREADS for child processes, unless the user has set it."""
    if "OMP_NUM_THREADS" in os.environ:
        yield
        return
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        del os.environ["OMP_NUM_THREADS"]


def _usable_cores() -> set[int]:
    """CPU cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _failure_priority(failure: Any) -> tuple[bool, bool, int]:
    """Sort key: failures with a message, then killed processes, then those that only lost their peers; the earlier first."""
    return MESSAGE_KEY not in failure.error_file_data, failure.exitcode in (EXIT_PEER_LOST, -signal.SIGTERM), failure.timestamp


def _to_error(rank: int, size: int, failure: Any, target: Path) -> SeewhyError:
    """The exception for a failed process: its own message, or how it ended."""
    message = failure.error_file_data.get(MESSAGE_KEY)
    if message:
        return RunError(f"{message} (process {rank} of {size}; the others were ended)")
    how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with status {failure.exitcode}"
    more = " (out of memory?)" if failure.exitcode == -9 else ""
    return RunError(f"{target}: process {rank} of {size} {how}{more}; the others were ended, and the same command with --resume goes on")


def _write_error_file(text: str) -> None:
    """Leave a message for the parent process in the error file of PyTorch's launcher."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {MESSAGE_KEY: one_line(text), "message": {"message": one_line(text), "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """One of the processes: `launch` calls it with a config's file and the run's folder."""
    from seewhy.config import make_config, read_config
    from seewhy.core.progress import show_log_lines
    from seewhy.training.pipeline import train_run

    file, target, *options = arguments
    show_log_lines()
    try:
        train_run(make_config(**read_config(Path(file))), Path(target), "--resume" in options)
    except SeewhyError as error:
        _write_error_file(str(error))
        return 2
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        if not is_peer_failure(error):
            raise
        return EXIT_PEER_LOST
    return 0


if __name__ == "__main__":
    stop_on_signals()
    status = main(sys.argv[1:])
    for each in (signal.SIGINT, signal.SIGTERM):  # what comes now ends this process without a word
        signal.signal(each, signal.SIG_DFL)
    sys.exit(status)
