"""Run a task on many sources of images, in this process or on a backend, and write one table; finished sources are not repeated."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from seewhy.core.parallel import RawImage, Worker, map_batches
from seewhy.core.progress import LOG, progress
from seewhy.inference.onnx_model import is_exported, load_onnx, make_worker
from seewhy.inference.predictions import Columns, to_columns
from seewhy.inference.result_store import Chunk, ChunkResult, ResultStore, merge_chunks, open_store, unique_keys, write_results
from seewhy.inference.work_units import ASSUMED_IMAGES, Source, read_source
from seewhy.version import __version__


@dataclass(frozen=True)
class Task:
    """What to compute for every image. name: in tasks.TASKS. model_path: run folder or exported file, '' for none. options: of the task."""

    name: str
    model_path: str
    options: dict[str, Any]


Backend = Callable[[Task, Sequence[Source]], Iterator[ChunkResult]]


@dataclass(frozen=True)
class TaskRunner:
    """Run a worker on a stream of images, on a number of cores."""

    worker: Worker[Columns]
    cores: int

    def __call__(self, images: Iterator[RawImage]) -> Iterator[Chunk]:
        parallel = self.worker.max_parallel_batches
        limit: AbstractContextManager[Any] = nullcontext()
        if parallel > 1:  # batches that each multiply on all cores would wait for each other
            from threadpoolctl import threadpool_limits

            limit = threadpool_limits(max(1, self.cores // parallel), "blas")
        with limit:
            batches = map_batches(self.worker, images, lambda image: image, self.cores)
            yield from merge_chunks(Chunk(columns or {}, bad) for _, columns, bad in batches)


def make_runner(task: Task, cores: int, images: int = ASSUMED_IMAGES) -> TaskRunner:
    """Load the task's model. cores: to use; 0 for all. images: roughly how many will come."""
    path = Path(task.model_path)
    if task.name == "predict" and is_exported(path):  # without torch
        return TaskRunner(to_columns(make_worker(load_onnx(path)), task.options), cores or os.cpu_count() or 1)
    import torch

    from seewhy.inference.tasks import TASKS

    return TaskRunner(TASKS[task.name](path, task.options, images), cores or torch.get_num_threads())


def run_local(task: Task, sources: Sequence[Source]) -> Iterator[ChunkResult]:
    """Run all sources in this process, one after the other."""
    count = sum(len(source.paths) if source.kind == "files" else ASSUMED_IMAGES for source in sources)
    runner = make_runner(task, 0, count)
    only_files = all(source.kind == "files" for source in sources)
    unit, total = ("images", count) if only_files else ("shards and blocks", len(sources))
    with progress(f"{task.name}, {unit}", total) as advance:
        for number, source in enumerate(sources):
            yield from chunk_results(lambda images: runner(_counted(images, advance) if only_files else images), number, source)
            if not only_files:
                advance(1)


def _counted(images: Iterator[RawImage], advance: Callable[[int], None]) -> Iterator[RawImage]:
    for image in images:
        yield image
        advance(1)


def chunk_results(runner: Callable[[Iterator[RawImage]], Iterator[Chunk]], number: int, source: Source) -> Iterator[ChunkResult]:
    """Yield the chunks of one source, the last one marked; an empty one if it holds no images."""
    pending, count = Chunk(), 0
    for count, chunk in enumerate(runner(read_source(source))):
        if count:
            yield ChunkResult(number, count - 1, False, pending)
        pending = chunk
    yield ChunkResult(number, count, True, pending)


def run_batch(
    task: Task, types: dict[str, type], sources: Sequence[Source], out: str, backend: Backend, skip_bad: bool = False
) -> tuple[int, int]:
    """Write the results of all sources to `out`, in order; return the numbers of rows and of unreadable images.

    types: of the table's columns. Unreadable images are listed with reasons in a table beside `out`.
    If interrupted, finished sources are kept and the same task resumes after them, also with another `skip_bad`.
    Raises OutputError if `out` cannot be written or holds something else, ImageError if images are unreadable
    (with `skip_bad`: if all are).
    """
    manifest = {"seewhy": __version__, "asked": model_hash(Path(task.model_path)), "job": task.name, "options": task.options}
    with open_store(out, manifest, types) as store:
        keys = unique_keys([source.key for source in sources])
        process_pending(store, keys, task, sources, backend)
        return write_results(store, keys, out, skip_bad)


def process_pending(store: ResultStore, keys: Sequence[str], task: Task, sources: Sequence[Source], backend: Backend) -> None:
    """Run the sources whose key is not finished, and store their chunks."""
    pending = [number for number, key in enumerate(keys) if key not in store.finished]
    if len(pending) < len(sources):
        LOG.info(f"resuming after {len(sources) - len(pending):,} of {len(sources):,} shards and blocks of files")
    if not pending:
        return
    completed = False
    try:
        for result in backend(task, [sources[number] for number in pending]):
            store.add(keys[pending[result.source]], result)
        completed = True
    finally:
        done = sum(key in store.finished for key in keys)
        if not completed and done:
            LOG.info(f"kept the results of {done:,} of {len(sources):,} shards and blocks of files; re-run the same command to resume")


def column_types(task: str, options: dict[str, Any], classes: int) -> dict[str, type]:
    """Return names and types of the columns of a task's table."""
    if task == "explain":
        return {"path": str, "class": str, "prob": float, "predicted": str, "heatmap": bytes}
    top = {f"{name}_{k + 1}": kind for k in range(min(options["top_k"], classes)) for name, kind in (("class", str), ("prob", float))}
    return {"path": str, **top, "ood": bool, **({"decision": str} if options["min_confidence"] is not None else {})}


def model_hash(path: Path) -> str:
    """Return the sha256 of the files of a run or of an exported file that decide its results."""
    digest = hashlib.sha256()
    for file in model_files(path):
        digest.update(f"{file.name}\n".encode())
        with file.open("rb") as opened:
            hashlib.file_digest(opened, lambda: digest)  # updates it
    return digest.hexdigest()


def model_files(path: Path) -> list[Path]:
    """Return the files that another machine needs to run the model."""
    if not path.is_dir():
        return [path]
    return [file for name in ("run.json", "model.safetensors", "ood_reference.safetensors") if (file := path / name).is_file()]
