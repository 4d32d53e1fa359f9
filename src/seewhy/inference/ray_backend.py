"""Sources x a job -> pieces of answers, by actors of Ray Data, each with a network of its own; actors that die are replaced."""

from __future__ import annotations

import json
import logging
import signal
import tempfile
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from seewhy import errors
from seewhy.core.process_state import environment, quiet
from seewhy.core.progress import LOG, progress
from seewhy.data.remote import without_options
from seewhy.errors import ConfigError, RunError, SeewhyError, one_line, require
from seewhy.inference.batch_runner import Backend, Request, Work, asked_files, make_worker, results_of, run_local
from seewhy.inference.result_store import Chunk, ChunkResult
from seewhy.inference.work_units import FailureCounter, Source

OBJECT_STORE = 400_000_000  # bytes for what is on its way between processes; pieces are small
BLOCKS = 10_000  # pieces of work that Ray is told of, at most
DEATHS = 3  # of workers at one source, after which it is taken to be the cause: Ray Data would go on for ever
RESTARTS = 20  # of one worker, whatever it dies of: before it begins a source, for one
PLACE_S = 300  # in which some machine has to have room for a worker, other work on the cluster considered
LOOK_S = 5  # between two looks whether it has: Ctrl-C waits as long


@dataclass(frozen=True)
class Cluster:
    """Which machines work, and how.

    address: '' for a cluster of this machine's own, 'auto' or ray://... for one that runs already.
    workers: how many processes with a network each; 0: one a core, or one a GPU where there are GPUs.
    """

    address: str = ""
    workers: int = 0


class InferenceActor:
    """One actor: makes its network ready at the first source, and answers them one after another.

    What is raised travels back as a row, since Ray would try it again, or wrap it in its own words.
    """

    def __init__(self, request: Request, files: Any, cores: int, tries: Any) -> None:
        self.request, self.files, self.cores, self.tries = request, files, cores, tries
        self.work: Work | None = None
        self.survived: int | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        import ray

        for number, packed in zip(map(int, batch["number"]), batch["source"], strict=True):
            source = _source(packed)
            try:
                if (died := ray.get(self.tries.begin.remote(number, self.survived))) >= DEATHS:
                    raise RunError(
                        f"{_named(source)}: {died} workers died of it, out of memory or by an image that crashes what reads it; "
                        "leave it out, or try fewer --ray-workers"
                    )
                work = self.work = self.work or self._made()
                for outcome in results_of(work, number, source):
                    yield {**_packed(outcome), "error": [""], "text": [""]}
                self.survived = number
            except SeewhyError as error:
                yield _refusal(error)
            except Exception as error:  # in Ray's words neither the source nor the reason could be found
                reason = one_line(f"{type(error).__name__}: {error}")[:160]
                yield _refusal(RunError(f"{_named(source)}: a worker failed ({reason}); the same command goes on after what is done"))

    def _made(self) -> Work:
        import ray
        import torch

        torch.set_num_threads(self.cores)
        if not self.files:
            return make_worker(self.request, self.cores)
        with tempfile.TemporaryDirectory() as folder:  # the machine of this actor need not see the run's folder
            content = ray.get(self.files)
            for name, data in content.items():
                Path(folder, name).write_bytes(data)
            asked = folder if "run.json" in content else str(Path(folder, next(iter(content))))
            return make_worker(replace(self.request, asked=asked), self.cores)


def _source(text: str) -> Source:
    return Source(*json.loads(text))


def _text(source: Source) -> str:
    return json.dumps([source.kind, list(source.places), source.root, source.key])


def _named(source: Source) -> str:
    more = len(source.places) - 1
    return without_options(source.places[0]) + (f" and {more:,} more {'file' if more == 1 else 'files'}" if more else "")


def _refusal(error: SeewhyError) -> dict[str, list[Any]]:
    return {"facts": [""], "rows": [b""], "error": [type(error).__name__], "text": [str(error)]}


def _packed(outcome: ChunkResult) -> dict[str, list[Any]]:
    """A row of Ray Data: what it is as JSON, and its own rows in Arrow's format."""
    import pyarrow as pa

    table, sink = pa.table(outcome.piece.columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    facts = [outcome.source, outcome.number, outcome.last, outcome.piece.bad]
    return {"facts": [json.dumps(facts)], "rows": [sink.getvalue().to_pybytes()]}


def _outcome(row: dict[str, Any]) -> ChunkResult:
    import pyarrow as pa

    source, number, last, bad = json.loads(row["facts"])
    columns = pa.ipc.open_stream(row["rows"]).read_all().to_pydict()
    return ChunkResult(source, number, last, Chunk(columns, [(name, reason) for name, reason in bad]))


@contextmanager
def _joined(cluster: Cluster) -> Iterator[Any]:
    """The package ray, connected to a cluster; its environment variables, log levels and SIGTERM handler last as long."""
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or it warns of its own future default
        "MALLOC_ARENA_MAX": "2",  # or glibc keeps memory for each thread that ever was: a tenth more in each worker
    }
    with environment(**variables):
        import ray
        import ray.data

        own = not ray.is_initialized()
        on_sigterm = signal.getsignal(signal.SIGTERM)
        with quiet("ray", "ray.data", level=logging.CRITICAL):
            try:
                if own:
                    _connect(ray, cluster)
                    if threading.current_thread() is threading.main_thread():
                        signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own ends the process without a word
                yield ray
            finally:
                if own:
                    ray.shutdown()


def _connect(ray: Any, cluster: Cluster) -> None:
    """ConfigError where no cluster answers at the address."""
    here = {"address": "local", "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    try:
        ray.init(log_to_driver=False, configure_logging=False, **({"address": cluster.address} if cluster.address else here))
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        where = cluster.address or "this machine"
        raise ConfigError(f"--ray-address {where}: no Ray cluster there ({_short(error)}); start one with `ray start --head`") from error


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1] if lines else type(error).__name__)[:160]


def shares(nodes: Sequence[dict[str, float]], workers: int, sources: int) -> tuple[int, int, int]:
    """What each machine has (CPU, GPU), workers asked for (0: one a GPU or else one a core), sources -> workers, cores and GPUs of each.

    A worker lies on one machine: there are as many of them as asked for or as fit, each with the most cores with which they do.
    """
    have = [(int(node.get("CPU", 0)), int(node.get("GPU", 0))) for node in nodes]
    most, with_gpu = sum(cores for cores, _ in have), sum(min(pair) for pair in have)
    count = min(workers or with_gpu or most or 1, max(1, sources))
    gpus = 1 if count <= with_gpu else 0
    count = min(count, most) if most else count  # a cluster that is to grow first may have no core yet
    cores = max((own for own, _ in have), default=1)
    while cores > 1 and sum(min(own // cores, own_gpus if gpus else own) for own, own_gpus in have) < count:
        cores -= 1
    return count, max(1, cores), gpus


def _await_place(ray: Any, cores: int, gpus: int) -> None:
    """Returns when some machine has room for a worker; Ray Data itself would wait for ever, and say nothing."""
    room = f"{cores} free {'core' if cores == 1 else 'cores'}" + (" and a free GPU" if gpus else "")
    group = ray.util.placement_group([{"CPU": cores, **({"GPU": gpus} if gpus else {})}])
    try:
        if group.wait(LOOK_S):
            return
        LOG.info(f"waiting for a machine of the cluster with {room}, {PLACE_S} s at most")
        if not any(group.wait(LOOK_S) for _ in range(PLACE_S // LOOK_S)):
            raise RunError(f"no machine of the Ray cluster had {room} for {PLACE_S} s; wait for its other work, or ask more --ray-workers")
    finally:
        ray.util.remove_placement_group(group)


def run_on_ray(cluster: Cluster, request: Request, sources: Sequence[Source]) -> Iterator[ChunkResult]:
    """Pieces of all sources, in the order in which they are done; a source whose actor died begins again, and gives its pieces twice.

    Raises ConfigError without Ray or a cluster, RunError where the cluster ends, and what workers raise.
    """
    with _joined(cluster) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count, cores, gpus = shares(nodes, cluster.workers, len(sources))
        fewer = f" (no more of {cluster.workers} fit)" if count < min(cluster.workers, len(sources)) else ""
        LOG.info(f"{count} workers on Ray{fewer}, {cores} {'core' if cores == 1 else 'cores'} each")
        _await_place(ray, cores, gpus)
        tries = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(FailureCounter).remote()
        asked = Path(request.asked)
        files = ray.put({file.name: file.read_bytes() for file in asked_files(asked)}) if request.asked else None
        items = [{"number": number, "source": _text(source)} for number, source in enumerate(sources)]
        with warnings.catch_warnings():  # Ray 2.60 says of max_restarts that 2.64 will not take it, and has nothing in its place
            warnings.simplefilter("ignore", DeprecationWarning)
            data = ray.data.from_items(items, override_num_blocks=min(len(items), BLOCKS)).map_batches(
                InferenceActor,
                fn_constructor_args=(request, files, cores, tries),
                batch_size=1,
                batch_format="numpy",
                concurrency=count,
                num_cpus=cores,
                num_gpus=gpus,
                max_restarts=RESTARTS,
                max_task_retries=RESTARTS,
            )
        data.context.enable_progress_bars = data.context.print_on_execution_start = False
        try:
            with progress(f"{request.job}, shards and blocks", len(sources)) as advance:
                for row in data.iter_rows():
                    if row["error"]:
                        raise getattr(errors, row["error"])(row["text"])
                    outcome = _outcome(row)
                    yield outcome
                    if outcome.last:
                        advance(1)
        except ray.exceptions.RayError as error:
            cause = next((each for each in _causes(error) if isinstance(each, SeewhyError)), None)
            raise cause or RunError(f"the Ray cluster gave up ({_short(error)}); the same command goes on after what is done") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def get_backend(name: str | None, address: str = "", workers: int = 0) -> Backend:
    """An backend of `scale.run_batch`: 'local' (or None) is this process, 'ray' a cluster; ConfigError for others."""
    if name == "ray":
        require("ray", "--backend ray", "ray")
        return partial(run_on_ray, Cluster(address, workers))
    if name not in (None, "local"):
        raise ConfigError(f"--backend {name!r}: no such backend; use local or ray")
    if address or workers:
        raise ConfigError("--ray-address and --ray-workers are for --backend ray; add it, or leave them out")
    return run_local
