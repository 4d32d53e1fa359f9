"""Sources x a request -> answers, by this process or by many, into one table or a folder; what is finished is not done again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seewhy.predictions import Columns, as_columns
from seewhy.progress import LOG, progress
from seewhy.result_store import Outcome, Piece, Store, gathered, keys_of, open_store, write_results
from seewhy.runtime import is_exported, load_onnx, worker_of
from seewhy.sources import Source, read_source
from seewhy.streams import Picture, Worker, answered
from seewhy.version import __version__

SHARD_HOLDS = 1_000_000  # images, as far as is known before it is read: many


@dataclass(frozen=True)
class Request:
    """What is asked of every picture. job: its name in jobs.JOBS. asked: run folder or exported file, '' for none. options: of the job."""

    job: str
    asked: str
    options: dict[str, Any]


Engine = Callable[[Request, Sequence[Source]], Iterator[Outcome]]


@dataclass(frozen=True)
class Work:
    """A worker and the number of cores that it may use."""

    worker: Worker[Columns]
    cores: int

    def __call__(self, images: Iterator[Picture]) -> Iterator[Piece]:
        lanes = self.worker.lanes
        with _numpy_threads(self.cores // lanes) if lanes > 1 else nullcontext():
            batches = answered(self.worker, images, lambda image: image, self.cores)
            yield from gathered(Piece(columns or {}, bad) for _, columns, bad in batches)


def _numpy_threads(count: int) -> Any:
    """Lanes whose products NumPy makes on all cores each would wait for each other."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(max(1, count), "blas")


def make_work(request: Request, cores: int, pictures: int = SHARD_HOLDS) -> Work:
    """Load what is asked and make ready to answer on so many cores; 0: on all. pictures: how many will be asked about, roughly."""
    asked = Path(request.asked)
    if request.job == "predict" and is_exported(asked):  # without torch
        return Work(as_columns(worker_of(load_onnx(asked)), request.options), cores or os.cpu_count() or 1)
    import torch

    from seewhy.jobs import JOBS

    return Work(JOBS[request.job](asked, request.options, pictures), cores or torch.get_num_threads())


def outcomes_here(request: Request, sources: Sequence[Source]) -> Iterator[Outcome]:
    """All pieces of all sources, one after the other, by this process."""
    pictures = sum(len(source.places) if source.kind == "files" else SHARD_HOLDS for source in sources)
    work = make_work(request, 0, pictures)
    known = all(source.kind == "files" for source in sources)
    label = f"{request.job}, pictures" if known else f"{request.job}, shards and blocks"
    with progress(label, pictures if known else len(sources)) as advance:

        def counted(images: Iterator[Picture]) -> Iterator[Picture]:
            for image in images:
                yield image
                if known:
                    advance(1)

        for number, source in enumerate(sources):
            yield from outcomes_of(lambda images: work(counted(images)), number, source)
            if not known:
                advance(1)


def outcomes_of(work: Callable[[Iterator[Picture]], Iterator[Piece]], number: int, source: Source) -> Iterator[Outcome]:
    """The pieces of one source, the last one marked; an empty one where it holds no pictures."""
    held, count = Piece(), 0
    for count, piece in enumerate(work(read_source(source))):
        if count:
            yield Outcome(number, count - 1, False, held)
        held = piece
    yield Outcome(number, count, True, held)


def answer_sources(
    request: Request, types: dict[str, type], sources: Sequence[Source], out: str, engine: Engine, skip_bad: bool = False
) -> tuple[int, int]:
    """Answers of all sources into `out`, in order; how many rows it has, and how many pictures were left out.

    types: of the table's columns. Pictures that cannot be used stand, with the reasons, in a table beside it.
    Whatever stops this, finished sources are kept, and the same request goes on, with another `skip_bad` too.
    Raises OutputError for a place that cannot be written or holds something else, ImageError where pictures cannot be used
    (with `skip_bad`: none).
    """
    record = {"seewhy": __version__, "asked": asked_hash(Path(request.asked)), "job": request.job, "options": request.options}
    with open_store(out, record, types) as store:
        keys = keys_of([source.key for source in sources])
        fill_store(store, keys, request, sources, engine)
        return write_results(store, keys, out, skip_bad)


def fill_store(store: Store, keys: Sequence[str], request: Request, sources: Sequence[Source], engine: Engine) -> None:
    """The pieces of all sources whose key is not finished into the store."""
    left = [number for number, key in enumerate(keys) if key not in store.finished]
    if len(left) < len(sources):
        LOG.info(f"going on: {len(sources) - len(left):,} of {len(sources):,} shards and blocks of files are done")
    if not left:
        return
    finished = False
    try:
        for outcome in engine(request, [sources[number] for number in left]):
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
    return {"path": str, **top, "unknown": bool, **({"answer": str} if options["least"] is not None else {})}


def asked_hash(asked: Path) -> str:
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
    return [file for name in ("run.json", "model.safetensors", "unknowns.safetensors") if (file := asked / name).is_file()]
