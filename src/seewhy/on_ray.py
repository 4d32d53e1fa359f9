"""Sources x a job -> pieces of answers, by actors of Ray Data, each with a network of its own; actors that die are replaced."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from seewhy import errors
from seewhy.errors import ConfigError, RunError, SeewhyError, one_line
from seewhy.jobs import Piece, Request, Work, asked_files, make_work
from seewhy.progress import LOG
from seewhy.scale import Engine, Outcome, outcomes_here, outcomes_of
from seewhy.sources import Source

INSTALL = "pip install -c constraints.txt -e '.[ray]' in seewhy's folder"
OBJECT_STORE = 400_000_000  # bytes for what is on its way between processes; pieces are small
BLOCKS = 10_000  # pieces of work that Ray is told of, at most


@dataclass(frozen=True)
class Cluster:
    """Which machines work, and how.

    address: '' for a cluster of this machine's own, 'auto' or ray://... for one that runs already.
    workers: how many processes with a network each; 0: one a core, or one a GPU where there are GPUs.
    """

    address: str = ""
    workers: int = 0


class Answerer:
    """One actor: makes its network ready at the first source, and answers them one after another.

    What seewhy raises on purpose travels back as a row, since Ray would try it again, or wrap it in its own.
    """

    def __init__(self, request: Request, files: Any, cores: int) -> None:
        self.request, self.files, self.cores = request, files, cores
        self.work: Work | None = None

    def __call__(self, batch: dict[str, Any]) -> Iterator[dict[str, list[Any]]]:
        for number, packed in zip(batch["number"], batch["source"], strict=True):
            try:
                work = self.work = self.work or self._made()
                for outcome in outcomes_of(work, int(number), _source(packed)):
                    yield {**_packed(outcome), "error": [""], "text": [""]}
            except SeewhyError as error:
                yield {"facts": [""], "rows": [b""], "error": [type(error).__name__], "text": [str(error)]}

    def _made(self) -> Work:
        import ray
        import torch

        torch.set_num_threads(self.cores)
        if not self.files:
            return make_work(self.request, self.cores)
        with tempfile.TemporaryDirectory() as folder:  # the machine of this actor need not see the run's folder
            content = ray.get(self.files)
            for name, data in content.items():
                Path(folder, name).write_bytes(data)
            asked = folder if "run.json" in content else str(Path(folder, next(iter(content))))
            return make_work(replace(self.request, asked=asked), self.cores)


def _source(text: str) -> Source:
    facts = json.loads(text)
    return Source(**{**facts, "places": tuple(facts["places"])})


def _packed(outcome: Outcome) -> dict[str, list[Any]]:
    """A row of Ray Data: what it is as JSON, and its own rows in Arrow's format."""
    import pyarrow as pa

    table, sink = pa.table(outcome.piece.columns), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    facts = [outcome.source, outcome.number, outcome.last, outcome.piece.bad]
    return {"facts": [json.dumps(facts)], "rows": [sink.getvalue().to_pybytes()]}


def _outcome(row: dict[str, Any]) -> Outcome:
    import pyarrow as pa

    source, number, last, bad = json.loads(row["facts"])
    columns = pa.ipc.open_stream(row["rows"]).read_all().to_pydict()
    return Outcome(source, number, last, Piece(columns, [(name, reason) for name, reason in bad]))


@contextmanager
def _joined(cluster: Cluster) -> Iterator[Any]:
    """The package ray, connected; what it does to logs and signals is taken back."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # or it warns of its own future default
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # or glibc keeps memory for each thread that ever was: a tenth more in each worker
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ConfigError(f"--engine ray needs {error.name or 'ray'}, which is not installed: {INSTALL}") from error
    own = not ray.is_initialized()
    with _native_silence() if own else nullcontext():
        yield from _connected(ray, cluster, own)  # with the `finally` that ends the cluster


@contextmanager
def _native_silence() -> Iterator[None]:
    """Ray's C++ writes warnings straight to descriptor 2: for a while that leads nowhere, and Python's stderr keeps the way out."""
    kept = sys.stderr
    try:
        direct = kept.fileno() == 2
    except (OSError, ValueError, AttributeError):  # somebody's own object, as notebooks have
        direct = False
    if not direct:
        yield
        return
    kept.flush()
    out = os.dup(2)
    with open(os.devnull, "w") as nowhere, open(os.dup(out), "w", buffering=1, encoding=kept.encoding, errors=kept.errors) as ours:
        os.dup2(nowhere.fileno(), 2)
        sys.stderr = ours
        try:
            yield
        finally:
            ours.flush()
            sys.stderr = kept
            os.dup2(out, 2)
            os.close(out)


def _connected(ray: Any, cluster: Cluster, own: bool) -> Iterator[Any]:
    handlers = [(each, signal.getsignal(each)) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        if own:
            options: dict[str, Any] = {"address": cluster.address} if cluster.address else {"address": "local", "include_dashboard": False}
            if not cluster.address:
                options["object_store_memory"] = OBJECT_STORE
            try:
                ray.init(log_to_driver=False, logging_level=logging.CRITICAL, configure_logging=True, **options)
            except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
                where = cluster.address or "this machine"
                raise ConfigError(
                    f"--address {where}: no Ray cluster there ({_short(error)}); start one with `ray start --head`"
                ) from error
            if threading.current_thread() is threading.main_thread():
                for each, handler in handlers:
                    signal.signal(each, handler)
        with _quiet(ray):
            yield ray
    finally:
        if own:
            ray.shutdown()


@contextmanager
def _quiet(ray: Any) -> Iterator[None]:
    """No bars and lines of Ray Data's own."""
    context = ray.data.DataContext.get_current()
    wanted = {"enable_progress_bars": False, "print_on_execution_start": False, "enable_rich_progress_bars": False}
    before = {name: getattr(context, name) for name in wanted if hasattr(context, name)}
    loggers = [(logging.getLogger(name), logging.getLogger(name).level) for name in ("ray", "ray.data")]
    for name in before:
        setattr(context, name, wanted[name])
    for logger, _ in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for logger, level in loggers:
            logger.setLevel(level)


def _short(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return one_line(lines[-1] if lines else type(error).__name__)[:160]


def shares(cluster: dict[str, float], workers: int, sources: int) -> tuple[int, int, int]:
    """What a cluster has (CPU, GPU), workers asked for (0: its choice), sources -> workers, cores and GPUs of each."""
    cores, gpus = max(1, int(cluster.get("CPU", 1))), int(cluster.get("GPU", 0))
    count = min(workers or gpus or cores, max(1, sources))
    return count, max(1, cores // count), 1 if gpus >= count else 0


def outcomes_on_ray(cluster: Cluster, request: Request, sources: Sequence[Source]) -> Iterator[Outcome]:
    """Pieces of all sources, in the order in which they are done; a source whose actor died begins again, and gives its pieces twice.

    Raises ConfigError without Ray or a cluster, RunError where the cluster ends, and what workers raise.
    """
    with _joined(cluster) as ray:
        count, cores, gpus = shares(ray.cluster_resources(), cluster.workers, len(sources))
        LOG.info(f"{count} workers on Ray, {cores} {'core' if cores == 1 else 'cores'} each")
        asked = Path(request.asked)
        files = ray.put({file.name: file.read_bytes() for file in asked_files(asked)}) if request.asked else None
        items = [{"number": number, "source": json.dumps(asdict(source))} for number, source in enumerate(sources)]
        data = ray.data.from_items(items, override_num_blocks=min(len(items), BLOCKS)).map_batches(
            Answerer,
            fn_constructor_args=(request, files, cores),
            batch_size=1,
            batch_format="numpy",
            concurrency=count,
            num_cpus=cores,
            num_gpus=gpus,
        )  # Ray Data starts actors that died again, and gives them their work again, as often as it takes
        try:
            for row in data.iter_rows():
                if row["error"]:
                    raise getattr(errors, row["error"])(row["text"])
                yield _outcome(row)
        except ray.exceptions.RayError as error:
            cause = next((each for each in _causes(error) if isinstance(each, SeewhyError)), None)
            raise cause or RunError(f"the Ray cluster gave up ({_short(error)}); the same command goes on after what is done") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__


def engine_named(name: str | None, address: str = "", workers: int = 0) -> Engine:
    """An engine of `scale.answer_sources`: 'local' (or None) is this process, 'ray' a cluster; ConfigError for others."""
    if name == "ray":
        if find_spec("ray") is None:
            raise ConfigError(f"--engine ray needs ray, which is not installed: {INSTALL}")
        return partial(outcomes_on_ray, Cluster(address, workers))
    if name not in (None, "local"):
        raise ConfigError(f"--engine {name!r}: no such engine; use local or ray")
    if address or workers:
        raise ConfigError("--address and --ray-workers are for --engine ray; add it, or leave them out")
    return outcomes_here
