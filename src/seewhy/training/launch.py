"""Launch several processes that train one run, on one or several machines, with PyTorch's elastic launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from seewhy.config import TrainConfig, dump_config, make_config, read_config
from seewhy.core.distributed import is_peer_failure
from seewhy.core.process_state import environment, quiet
from seewhy.core.signals import stop_on_signals
from seewhy.errors import ConfigError, RunError, SeewhyError, one_line

EXIT_PEER_LOST = 75  # exit status of a process that has lost its peers
MESSAGE_KEY = "seewhy"  # of the message for the user in an error file


def launch(
    config: TrainConfig, out: Path | None, resume: bool = False, devices: int = 1, nodes: int = 1, rendezvous: str | None = None
) -> Path:
    """Train with `devices` processes on this machine, and as many on each other of `nodes` machines. Returns the run's folder.

    rendezvous: host:port of one of the machines, the same on all. Raises the error of the process that failed first, after stopping the
    others; `resume` continues from the last checkpoint.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from seewhy.training.run_dirs import resolve_run_dir

    if nodes > 1 and (rendezvous is None or out is None):
        raise ConfigError("--nodes needs --rendezvous HOST:PORT of one of the machines, and --out on a shared disk")
    target = resolve_run_dir(config.resolved(), out, resume).final
    threads = str(max(1, _usable_cores() // devices))
    launcher_log = quiet("torch.distributed.elastic", level=logging.CRITICAL)
    with tempfile.TemporaryDirectory() as folder, launcher_log, environment(OMP_NUM_THREADS=threads):
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


def _usable_cores() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _failure_priority(failure: Any) -> tuple[bool, bool, int]:
    """Sort key: failures with a message, then killed processes, then lost peers; by time within each."""
    return MESSAGE_KEY not in failure.error_file_data, failure.exitcode in (EXIT_PEER_LOST, -signal.SIGTERM), failure.timestamp


def _to_error(rank: int, size: int, failure: Any, target: Path) -> SeewhyError:
    """The exception for a failed process: its own message, or its exit status."""
    message = failure.error_file_data.get(MESSAGE_KEY)
    if message:
        return RunError(f"{message} (process {rank} of {size}; the others were stopped)")
    cause = f"was killed by {failure.signal_name()}" if failure.exitcode < 0 else f"exited with status {failure.exitcode}"
    hint = " (out of memory?)" if failure.exitcode == -9 else ""
    return RunError(f"{target}: process {rank} of {size} {cause}{hint}; the others were stopped; repeat the command with --resume")


def _write_error_file(text: str) -> None:
    """Write a message for the parent process to the error file of PyTorch's launcher."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        content = {MESSAGE_KEY: one_line(text), "message": {"message": one_line(text), "extraInfo": {"timestamp": str(int(time.time()))}}}
        Path(path).write_text(json.dumps(content), encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Entry point of a process of `launch`. arguments: config file, run folder, and optionally --resume."""
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
    for number in (signal.SIGINT, signal.SIGTERM):  # from here on, without a traceback
        signal.signal(number, signal.SIG_DFL)
    sys.exit(status)
