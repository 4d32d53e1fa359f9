"""Images of many callers -> their answers, in batches of what waits: a thread a core, from the file's bytes to the answer."""

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

BATCH = 4  # images; larger batches are slower on a CPU, whose caches they do not fit, and make everyone wait
Answered = Future[dict[str, npt.NDArray[Any]]]
Job = tuple[bytes, bool, Answered]


class Batcher:
    """Answers of an exported file to the bytes of image files, from many threads at once.

    cores: how many batches are answered side by side, a core each; an image that is alone gets all of them. sizes: of the batches so far.
    pixels: that an image may have.

    The thread that takes an image also decodes it and answers: handing it on between threads costs more than what it would even out.
    """

    def __init__(self, file: Path | str | bytes, cores: int, pixels: int) -> None:
        self.model = load_onnx(file, threads=1)
        self._alone = load_onnx(file, threads=cores, spin=False) if cores > 1 else self.model
        self._wanted = [name for name in self.model.outputs if name not in ("logits", "network_input", "heatmaps")]
        self._maps = [name for name in self.model.outputs if name == "heatmaps"]
        self._jobs: deque[Job] = deque()
        self._wake = threading.Condition()
        self._idle, self._closed, self._pixels = 0, False, pixels
        self.sizes: deque[int] = deque(maxlen=10_000)
        self._workers = [threading.Thread(target=self._work, name=f"answer-{n}", daemon=True) for n in range(cores)]
        for worker in self._workers:
            worker.start()

    def answer(self, data: bytes, heatmaps: bool = True) -> Answered:
        """Queue the bytes of an image file for an answer.

        heatmaps: whether they are wanted. The future gives probabilities (C,), where the file has them ood_score () and heatmaps
        (C, h, w), and `size`, (width, height); it raises ImageError with the reason for what cannot be decoded.
        """
        done: Answered = Future()
        with self._wake:
            self._jobs.append((data, heatmaps, done))
            self._wake.notify()
        return done

    def _work(self) -> None:
        while batch := self._take():
            self._answer(batch)

    def _take(self) -> list[Job]:
        """This thread's share of what waits, up to a batch; waits for some, and gives none when there will be no more."""
        with self._wake:
            self._idle += 1
            while not self._jobs and not self._closed:
                self._wake.wait()
            share = min(BATCH, math.ceil(len(self._jobs) / self._idle))
            self._idle -= 1
            return [self._jobs.popleft() for _ in range(share)]

    def _answer(self, batch: Sequence[Job]) -> None:
        ready: list[tuple[Answered, tuple[int, int], npt.NDArray[np.uint8]]] = []
        for data, _, done in batch:
            if not done.set_running_or_notify_cancel():
                continue
            try:
                image = self._decode(data)
                ready.append((done, (image.shape[1], image.shape[0]), self.model.square(image)))
            except Exception as error:  # whatever it is, its caller waits for it
                done.set_exception(error)
        if not ready:
            return
        self.sizes.append(len(ready))
        # Threads that have nothing to do leave their cores to this image.
        model = self._alone if len(ready) == 1 and self._idle == len(self._workers) - 1 else self.model
        try:
            wanted = self._wanted + (self._maps if any(heatmaps for _, heatmaps, _ in batch) else [])
            found = model.ask(np.stack([square for _, _, square in ready]), wanted)
        except Exception as error:
            for done, _, _ in ready:
                done.set_exception(error)
            return
        for n, (done, size, _) in enumerate(ready):
            done.set_result({**{name: values[n] for name, values in found.items()}, "size": np.array(size)})

    def _decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        try:
            return np.asarray(decode(data, self.model.facts["min_decode_side"], self._pixels))
        except ValueError as error:
            raise ImageError(str(error)) from error

    def close(self) -> None:
        """Waits until everything that was handed in is answered."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        for worker in self._workers:
            worker.join()
