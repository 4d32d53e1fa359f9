"""Map functions over items in threads, in order, and networks over batches of images."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

BATCH = 32

T = TypeVar("T")
R = TypeVar("R")
RawImage = tuple[str, bytes | str]  # name of an image, and the content of its file or the reason why it cannot be read
Bad = list[tuple[str, str]]  # (name, reason) of unusable images


def map_ordered(work: Callable[[T], R], jobs: Iterable[T], workers: int, ahead: int = 3 * BATCH) -> Iterator[R]:
    """Yield work(job) for each job, in order, from `workers` threads that run at most `ahead` jobs ahead of the consumer."""
    pending: deque[Future[R]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for job in jobs:
                pending.append(pool.submit(work, job))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


@dataclass(frozen=True)
class Worker(Generic[R]):
    """A network or an exported file, loaded and ready for batches of images.

    prepare: content of an image file -> network input; ValueError with the reason if it is unusable.
    answer: names and inputs of a batch -> result, called by at most `max_parallel_batches` threads at a time.
    batch: images per batch.
    """

    prepare: Callable[[bytes], Any]
    answer: Callable[[list[str], list[Any]], R]
    max_parallel_batches: int = 1
    batch: int = BATCH


def map_batches(
    worker: Worker[R], images: Iterable[T], read: Callable[[T], RawImage], threads: int
) -> Iterator[tuple[list[str], R | None, Bad]]:
    """Yield for each batch, in order: names of the usable images, the result (None without usable images), and the unusable images.

    read and worker.prepare are called in `threads` threads.
    """

    def prepare(image: T) -> tuple[str, Any, str]:
        name, data = read(image)
        if isinstance(data, str):
            return name, None, data
        try:
            return name, worker.prepare(data), ""
        except ValueError as error:
            return name, None, str(error)

    def answer(batch: list[tuple[str, Any, str]]) -> tuple[list[str], R | None, Bad]:
        names = [name for name, _, reason in batch if not reason]
        result = worker.answer(names, [network_input for _, network_input, reason in batch if not reason]) if names else None
        return names, result, [(name, reason) for name, _, reason in batch if reason]

    batches = batched(map_ordered(prepare, images, threads, ahead=2 * worker.batch), worker.batch)
    return map_ordered(answer, batches, worker.max_parallel_batches, ahead=worker.max_parallel_batches)
