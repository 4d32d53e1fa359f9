"""Run a task on a Ray cluster: actors of Ray Data with a model each, restarted when they die."""

from __future__ import annotations

import json
import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from seewhy import errors
from seewhy.core.process_state import environment, quiet
from seewhy.core.progress import LOG, progress
from seewhy.data.remote import without_options
from seewhy.errors import ConfigError, RunError, SeewhyError, one_line, reason_of, require
from seewhy.inference.batch_runner import Backend, Task, TaskRunner, chunk_results, make_runner, model_files, run_local
from seewhy.inference.result_store import Chunk, ChunkResult
from seewhy.inference.work_units import FailureCounter, Source

OBJECT_STORE = 400_000_000  # bytes, enough for chunks in transit between processes
MAX_BLOCKS = 10_000  # of a Ray dataset
MAX_DEATHS = 3  # of workers at one source, after which the source counts as the cause; Ray Data would retry for ever
MAX_RESTARTS = 20  # of one worker, whatever the cause
WAIT_S = 300  # for a machine with room for a worker
POLL_S = 5  # between checks for such a machine; Ctrl-C waits as long
RESUME = "re-run the same command to resume"


class InferenceActor:
    """Load the model at the first source, then run one source after another.

    Errors are returned as rows (`_pack_error`): Ray would retry what is raised, or wrap it in a message of its own.
    """

    def __init__(self, task: Task, files: Any, cores: int, failures: Any) -> None:
        self.task, self.files, self.cores, self.failures = task, files, cores, failures
        self.runner: TaskRunner | None = None
        self.survived: int | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        import ray

        for number, packed in zip(map(int, batch["number"]), batch["source"], strict=True):
            source = Source(*json.loads(packed))
            try:
                if (deaths := ray.get(self.failures.begin.remote(number, self.survived))) >= MAX_DEATHS:
                    raise RunError(
                        f"{_describe(source)}: {deaths} workers died of it, out of memory or by an image that crashes its decoder; "
                        "leave it out, or use fewer --ray-workers"
                    )
                runner = self.runner = self.runner or self._load_runner()
                for result in chunk_results(runner, number, source):
                    yield _pack(result)
                self.survived = number
            except Exception as error:
                reason = one_line(f"{type(error).__name__}: {error}")[:160]
                failure = RunError(f"{_describe(source)}: a worker failed ({reason}); {RESUME}")
                yield _pack_error(error if isinstance(error, SeewhyError) else failure)

    def _load_runner(self) -> TaskRunner:
        import ray
        import torch

        torch.set_num_threads(self.cores)
        if not self.files:
            return make_runner(self.task, self.cores)
        with tempfile.TemporaryDirectory() as folder:  # this machine may not see the run's folder
            content = ray.get(self.files)
            for name, data in content.items():
                Path(folder, name).write_bytes(data)
            path = folder if "run.json" in content else str(Path(folder, next(iter(content))))
            return make_runner(replace(self.task, model_path=path), self.cores)


def _pack(result: ChunkResult) -> dict[str, list[Any]]:
    """Return a row of Ray Data: counts and skipped images as JSON, the columns in Arrow's format."""
    import pyarrow as pa

    table, sink = pa.table(result.chunk.columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    facts = [result.source, result.number, result.last, result.chunk.bad]
    return {"facts": [json.dumps(facts)], "columns": [sink.getvalue().to_pybytes()], "error": [""], "message": [""]}


def _pack_error(error: SeewhyError) -> dict[str, list[Any]]:
    return {"facts": [""], "columns": [b""], "error": [type(error).__name__], "message": [str(error)]}


def _unpack(row: dict[str, Any]) -> ChunkResult:
    import pyarrow as pa

    source, number, last, bad = json.loads(row["facts"])
    columns = pa.ipc.open_stream(row["columns"]).read_all().to_pydict()
    return ChunkResult(source, number, last, Chunk(columns, [(name, reason) for name, reason in bad]))


def _describe(source: Source) -> str:
    more = len(source.paths) - 1
    return without_options(source.paths[0]) + (f" and {_count(more, 'more file')}" if more else "")


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


@contextmanager
def _connected(address: str) -> Iterator[Any]:
    """Yield the package ray, connected to a cluster; restore environment variables, log levels and SIGTERM handler afterwards."""
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning about a future default
        "MALLOC_ARENA_MAX": "2",  # otherwise glibc keeps memory of every past thread: 10% more in each worker
    }
    with environment(**variables):
        import ray
        import ray.data

        connect = not ray.is_initialized()
        on_sigterm = signal.getsignal(signal.SIGTERM)
        with quiet("ray", "ray.data", level=logging.CRITICAL):
            try:
                if connect:
                    _connect(ray, address)
                    if threading.current_thread() is threading.main_thread():
                        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's handler ends the process silently
                yield ray
            finally:
                if connect:
                    ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    """Connect to the cluster at the address; '': start one here. Raises ConfigError if none answers."""
    local = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    try:
        ray.init(log_to_driver=False, configure_logging=False, **({"address": address} if address else local))
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        problem = f"--ray-address {address or 'local'}: no Ray cluster there ({_last_line(error)})"
        raise ConfigError(f"{problem}; start one with `ray start --head`") from error


def _last_line(error: BaseException) -> str:
    return reason_of(str(error).strip().rpartition("\n")[2] or type(error).__name__)


def plan_workers(nodes: Sequence[dict[str, float]], workers: int, sources: int) -> tuple[int, int, int]:
    """Return the number of workers, and the cores and GPUs of each.

    nodes: CPU and GPU counts of each machine. workers: wanted; 0: one per GPU, or one per core without GPUs.
    A worker runs on one machine; each gets as many cores as let the wanted number, or as many as possible, run at once.
    """
    resources = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    all_cores, with_gpu = sum(cores for cores, _ in resources), sum(min(pair) for pair in resources)
    count = min(workers or with_gpu or all_cores or 1, max(1, sources))
    gpus = 1 if count <= with_gpu else 0
    count = min(count, all_cores) if all_cores else count  # an autoscaling cluster may have no cores yet
    cores = max((node_cores for node_cores, _ in resources), default=1)
    while cores > 1 and sum(min(node_cores // cores, node_gpus if gpus else node_cores) for node_cores, node_gpus in resources) < count:
        cores -= 1
    return count, max(1, cores), gpus


def _wait_for_room(ray: Any, cores: int, gpus: int) -> None:
    """Wait until a machine has room for a worker; Ray Data itself would wait silently for ever."""
    room = f"{_count(cores, 'free core')}" + (" and a free GPU" if gpus else "")
    group = ray.util.placement_group([{"CPU": cores, **({"GPU": gpus} if gpus else {})}])
    try:
        if group.wait(POLL_S):
            return
        LOG.info(f"waiting up to {WAIT_S} s for a machine of the cluster with {room}")
        if not any(group.wait(POLL_S) for _ in range(WAIT_S // POLL_S)):
            raise RunError(f"no machine of the Ray cluster had {room} within {WAIT_S} s; wait, or set more --ray-workers")
    finally:
        ray.util.remove_placement_group(group)


def run_on_ray(task: Task, sources: Sequence[Source], address: str = "", workers: int = 0) -> Iterator[ChunkResult]:
    """Yield the chunks of all sources in order of completion; a source whose actor died restarts, and yields its chunks twice.

    address: '' to start Ray on this machine, 'auto' or ray://... for a running cluster. workers: as for `plan_workers`.
    Raises ConfigError without Ray or a cluster, RunError if the cluster fails, and the errors of the workers.
    """
    with _connected(address) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count, cores, gpus = plan_workers(nodes, workers, len(sources))
        fewer = f" (no more of {workers} fit)" if count < min(workers, len(sources)) else ""
        LOG.info(f"{_count(count, 'worker')} on Ray{fewer}, {_count(cores, 'core')} each")
        _wait_for_room(ray, cores, gpus)
        failures = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(FailureCounter).remote()
        files = ray.put({file.name: file.read_bytes() for file in model_files(Path(task.model_path))}) if task.model_path else None
        items = [
            {"number": number, "source": json.dumps([source.kind, list(source.paths), source.root, source.key])}
            for number, source in enumerate(sources)
        ]
        with warnings.catch_warnings():  # Ray 2.60 deprecates max_restarts for 2.64 without a replacement
            warnings.simplefilter("ignore", DeprecationWarning)
            data = ray.data.from_items(items, override_num_blocks=min(len(items), MAX_BLOCKS)).map_batches(
                InferenceActor,
                fn_constructor_args=(task, files, cores, failures),
                batch_size=1,
                batch_format="numpy",
                concurrency=count,
                num_cpus=cores,
                num_gpus=gpus,
                max_restarts=MAX_RESTARTS,
                max_task_retries=MAX_RESTARTS,
            )
        data.context.enable_progress_bars = data.context.print_on_execution_start = False
        try:
            with progress(f"{task.name}, shards and blocks", len(sources)) as advance:
                for row in data.iter_rows():
                    if row["error"]:
                        raise getattr(errors, row["error"])(row["message"])
                    yield (result := _unpack(row))
                    if result.last:
                        advance(1)
        except ray.exceptions.RayError as error:
            raise RunError(f"the Ray cluster failed ({_last_line(error)}); {RESUME}") from error


def get_backend(name: str | None, address: str = "", workers: int = 0) -> Backend:
    """Return a backend of `run_batch`: 'local' (or None) is this process, 'ray' a cluster; ConfigError for others."""
    if name == "ray":
        require("ray", "--backend ray", "ray")
        return partial(run_on_ray, address=address, workers=workers)
    if name not in (None, "local"):
        raise ConfigError(f"--backend {name!r}: no such backend; use local or ray")
    if address or workers:
        raise ConfigError("--ray-address and --ray-workers need --backend ray; add it, or drop them")
    return run_local
