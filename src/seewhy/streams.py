"""Jobs -> their results in order, from threads; items -> batches."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

BATCH = 32

T = TypeVar("T")
R = TypeVar("R")


def in_order(work: Callable[[T], R], jobs: Iterable[T], workers: int, ahead: int = 3 * BATCH) -> Iterator[R]:
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


def in_batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of `size` items, the last one shorter."""
    left = iter(items)
    while batch := list(itertools.islice(left, size)):
        yield batch
