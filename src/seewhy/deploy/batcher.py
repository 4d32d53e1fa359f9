"""Dynamic batching: requests of many clients predicted in small batches, one thread a core, from the file's bytes to the outputs."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from seewhy.data.decode import decode
from seewhy.errors import ImageError
from seewhy.inference.onnx_model import load_onnx

BATCH = 4  # images; larger batches do not fit a CPU's caches, are slower and raise the latency
OutputsFuture = Future[dict[str, npt.NDArray[Any]]]
Job = tuple[bytes, bool, OutputsFuture]  # content of an image file, whether heatmaps are wanted, its future


class Batcher:
    """Predict encoded images with an exported file; safe to call from many threads.

    cores: batches predicted in parallel, one core each; a single image in an idle server gets all of them. sizes: of the last 10,000
    batches. max_pixels: of an image.

    The thread that takes an image also decodes and predicts it: a queue between threads costs more than it balances.
    """

    def __init__(self, file: Path | str | bytes, cores: int, max_pixels: int) -> None:
        self.model = load_onnx(file, threads=1)
        self._all_cores_model = load_onnx(file, threads=cores, spin=False) if cores > 1 else self.model
        self._outputs = [name for name in self.model.outputs if name not in ("logits", "network_input", "heatmaps")]
        self._jobs: deque[Job] = deque()
        self._wake = threading.Condition()
        self._idle, self._closed, self._max_pixels = 0, False, max_pixels
        self.sizes: deque[int] = deque(maxlen=10_000)
        self._workers = [threading.Thread(target=self._work, name=f"predict-{n}", daemon=True) for n in range(cores)]
        for worker in self._workers:
            worker.start()

    def submit(self, data: bytes, heatmaps: bool = True) -> OutputsFuture:
        """Queue the content of an image file and return a future of its outputs.

        The future holds probabilities (C,), `size` (width, height) and, where the file has them, ood_score () and heatmaps (C, h, w)
        (left out unless `heatmaps`). It raises ImageError if the image cannot be decoded.
        """
        future: OutputsFuture = Future()
        with self._wake:
            self._jobs.append((data, heatmaps, future))
            self._wake.notify()
        return future

    def _work(self) -> None:
        while batch := self._next_batch():
            self._predict(batch)

    def _next_batch(self) -> list[Job]:
        """Wait for jobs and take an idle thread's share of them, at most BATCH; empty once the batcher is closed and the queue is empty."""
        with self._wake:
            self._idle += 1
            while not self._jobs and not self._closed:
                self._wake.wait()
            share = min(BATCH, math.ceil(len(self._jobs) / self._idle))
            self._idle -= 1
            return [self._jobs.popleft() for _ in range(share)]

    def _predict(self, batch: Sequence[Job]) -> None:
        decoded: list[tuple[OutputsFuture, tuple[int, int], npt.NDArray[np.uint8]]] = []
        for data, _, future in batch:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                image = self._decode(data)
                decoded.append((future, (image.shape[1], image.shape[0]), self.model.preprocess(image)))
            except Exception as error:  # of any kind: the caller waits for it
                future.set_exception(error)
        if not decoded:
            return
        self.sizes.append(len(decoded))
        model = self._all_cores_model if len(decoded) == 1 and self._idle == len(self._workers) - 1 else self.model
        try:
            with_maps = "heatmaps" in self.model.outputs and any(heatmaps for _, heatmaps, _ in batch)
            outputs = model.run(np.stack([pixels for _, _, pixels in decoded]), [*self._outputs, *(["heatmaps"] if with_maps else [])])
        except Exception as error:
            for future, _, _ in decoded:
                future.set_exception(error)
            return
        for n, (future, size, _) in enumerate(decoded):
            future.set_result({**{name: values[n] for name, values in outputs.items()}, "size": np.array(size)})

    def _decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        try:
            return np.asarray(decode(data, self.model.metadata["min_decode_side"], self._max_pixels))
        except ValueError as error:
            raise ImageError(str(error)) from error

    def close(self) -> None:
        """Finish all queued jobs and end the threads."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for worker in self._workers:
            worker.join()
