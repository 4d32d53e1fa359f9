"""Jobs -> their results in order, from threads; items -> batches; images -> answers about batches of them."""

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
RawImage = tuple[str, bytes | str]  # name of an image, and its file's content or the reason why there is none
Bad = list[tuple[str, str]]  # name, reason


def map_ordered(work: Callable[[T], R], jobs: Iterable[T], workers: int, ahead: int = 3 * BATCH) -> Iterator[R]:
    """work(job) for each job, in order, in `workers` threads, at most `ahead` jobs before who takes them."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(max(1, workers)) as pool:
        try:
            for job in jobs:
                waiting.append(pool.submit(work, job))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch


@dataclass(frozen=True)
class Worker(Generic[R]):
    """A network or an exported file that is ready to be asked about images.

    prepare: content of an image file -> its input; ValueError with the reason where it cannot be used.
    answer: names and inputs of a batch -> result; at most `lanes` threads call it at a time. batch: images in one.
    """

    prepare: Callable[[bytes], Any]
    answer: Callable[[list[str], list[Any]], R]
    max_parallel_batches: int = 1
    batch: int = BATCH


def answered(
    worker: Worker[R], images: Iterable[T], read: Callable[[T], RawImage], threads: int
) -> Iterator[tuple[list[str], R | None, Bad]]:
    """Batches in order: names of the usable images, the result (None where there are none), and what cannot be used.

    read, worker.prepare: called in `threads` threads.
    """

    def prepared(image: T) -> tuple[str, Any, str]:
        name, data = read(image)
        if isinstance(data, str):
            return name, None, data
        try:
            return name, worker.prepare(data), ""
        except ValueError as error:
            return name, None, str(error)

    def answer(batch: list[tuple[str, Any, str]]) -> tuple[list[str], R | None, Bad]:
        names = [name for name, _, reason in batch if not reason]
        result = worker.answer(names, [ready for _, ready, reason in batch if not reason]) if names else None
        return names, result, [(name, reason) for name, _, reason in batch if reason]

    batches = batched(map_ordered(prepared, images, threads, ahead=2 * worker.batch), worker.batch)
    return map_ordered(answer, batches, worker.max_parallel_batches, ahead=worker.max_parallel_batches)
