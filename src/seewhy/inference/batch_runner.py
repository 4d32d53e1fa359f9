"""Sources x a request -> answers, by this process or by many, into one table or a folder; what is finished is not done again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seewhy.core.parallel import RawImage, Worker, map_batches
from seewhy.core.progress import LOG, progress
from seewhy.inference.onnx_model import is_exported, load_onnx, worker_of
from seewhy.inference.predictions import Columns, as_columns
from seewhy.inference.result_store import Chunk, ChunkResult, Store, gathered, keys_of, open_store, write_results
from seewhy.inference.work_units import Source, read_source
from seewhy.version import __version__

SHARD_HOLDS = 1_000_000  # images, as far as is known before it is read: many


@dataclass(frozen=True)
class Request:
    """What is asked of every image. job: its name in jobs.JOBS. asked: run folder or exported file, '' for none. options: of the job."""

    job: str
    asked: str
    options: dict[str, Any]


Backend = Callable[[Request, Sequence[Source]], Iterator[ChunkResult]]


@dataclass(frozen=True)
class Work:
    """A worker and the number of cores that it may use."""

    worker: Worker[Columns]
    cores: int

    def __call__(self, images: Iterator[RawImage]) -> Iterator[Chunk]:
        max_parallel_batches = self.worker.max_parallel_batches
        with _numpy_threads(self.cores // max_parallel_batches) if max_parallel_batches > 1 else nullcontext():
            batches = map_batches(self.worker, images, lambda image: image, self.cores)
            yield from gathered(Chunk(columns or {}, bad) for _, columns, bad in batches)


def _numpy_threads(count: int) -> Any:
    """Lanes whose products NumPy makes on all cores each would wait for each other."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(max(1, count), "blas")


def make_worker(request: Request, cores: int, images: int = SHARD_HOLDS) -> Work:
    """Load what is asked and make ready to answer on so many cores; 0: on all. images: how many will be asked about, roughly."""
    asked = Path(request.asked)
    if request.job == "predict" and is_exported(asked):  # without torch
        return Work(as_columns(worker_of(load_onnx(asked)), request.options), cores or os.cpu_count() or 1)
    import torch

    from seewhy.inference.tasks import JOBS

    return Work(JOBS[request.job](asked, request.options, images), cores or torch.get_num_threads())


def run_local(request: Request, sources: Sequence[Source]) -> Iterator[ChunkResult]:
    """All pieces of all sources, one after the other, by this process."""
    count = sum(len(source.places) if source.kind == "files" else SHARD_HOLDS for source in sources)
    work = make_worker(request, 0, count)
    known = all(source.kind == "files" for source in sources)
    label = f"{request.job}, images" if known else f"{request.job}, shards and blocks"
    with progress(label, count if known else len(sources)) as advance:

        def counted(images: Iterator[RawImage]) -> Iterator[RawImage]:
            for image in images:
                yield image
                if known:
                    advance(1)

        for number, source in enumerate(sources):
            yield from results_of(lambda images: work(counted(images)), number, source)
            if not known:
                advance(1)


def results_of(work: Callable[[Iterator[RawImage]], Iterator[Chunk]], number: int, source: Source) -> Iterator[ChunkResult]:
    """The pieces of one source, the last one marked; an empty one where it holds no images."""
    held, count = Chunk(), 0
    for count, piece in enumerate(work(read_source(source))):
        if count:
            yield ChunkResult(number, count - 1, False, held)
        held = piece
    yield ChunkResult(number, count, True, held)


def run_batch(
    request: Request, types: dict[str, type], sources: Sequence[Source], out: str, backend: Backend, skip_bad: bool = False
) -> tuple[int, int]:
    """Answers of all sources into `out`, in order; how many rows it has, and how many images were left out.

    types: of the table's columns. Images that cannot be used stand, with the reasons, in a table beside it.
    Whatever stops this, finished sources are kept, and the same request goes on, with another `skip_bad` too.
    Raises OutputError for a place that cannot be written or holds something else, ImageError where images cannot be used
    (with `skip_bad`: none).
    """
    record = {"seewhy": __version__, "asked": model_hash(Path(request.asked)), "job": request.job, "options": request.options}
    with open_store(out, record, types) as store:
        keys = keys_of([source.key for source in sources])
        fill_store(store, keys, request, sources, backend)
        return write_results(store, keys, out, skip_bad)


def fill_store(store: Store, keys: Sequence[str], request: Request, sources: Sequence[Source], backend: Backend) -> None:
    """The pieces of all sources whose key is not finished into the store."""
    left = [number for number, key in enumerate(keys) if key not in store.finished]
    if len(left) < len(sources):
        LOG.info(f"going on: {len(sources) - len(left):,} of {len(sources):,} shards and blocks of files are done")
    if not left:
        return
    finished = False
    try:
        for outcome in backend(request, [sources[number] for number in left]):
            store.add(keys[left[outcome.source]], outcome)
        finished = True
    finally:
        done = sum(key in store.finished for key in keys)
        if not finished and done:
            LOG.info(f"{done:,} of {len(sources):,} shards and blocks of files are done and kept; the same command goes on after them")


def columns_of(job: str, options: dict[str, Any], classes: int) -> dict[str, type]:
    """Names and types of the columns of a job's table."""
    if job == "explain":
        return {"path": str, "class": str, "prob": float, "predicted": str, "heatmap": bytes}
    top = {f"{name}_{k + 1}": kind for k in range(min(options["top_k"], classes)) for name, kind in (("class", str), ("prob", float))}
    return {"path": str, **top, "ood": bool, **({"decision": str} if options["min_confidence"] is not None else {})}


def model_hash(asked: Path) -> str:
    """sha256 over what decides a run's or an exported file's answers."""
    found = hashlib.sha256()
    for file in asked_files(asked):
        found.update(f"{file.name}\n".encode())
        with file.open("rb") as opened:
            for block in iter(lambda: opened.read(1 << 20), b""):
                found.update(block)
    return found.hexdigest()


def asked_files(asked: Path) -> list[Path]:
    """What has to travel to another machine, so that it can answer."""
    if not asked.is_dir():
        return [asked]
    return [file for name in ("run.json", "model.safetensors", "ood_reference.safetensors") if (file := asked / name).is_file()]
