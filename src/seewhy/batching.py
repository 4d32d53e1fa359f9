"""Pictures of many callers -> their answers, in batches as large as the queue: a thread a core, a bounded number under way."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from seewhy.decoding import decode
from seewhy.errors import ImageError
from seewhy.runtime import load_onnx

BATCH = 4  # pictures; larger batches are slower on a CPU, whose caches they do not fit, and make everyone wait
Job = tuple[npt.NDArray[np.uint8], "Future[dict[str, npt.NDArray[Any]]]"]


class Batcher:
    """Answers of an exported file to the bytes of picture files, from many threads at once.

    cores: how many batches are answered side by side, a core each; a picture that is alone gets all of them. sizes: of the batches so far.
    pixels: that a picture may have.
    """

    def __init__(self, file: Path | str | bytes, cores: int, pixels: int) -> None:
        self.model = load_onnx(file, threads=1)
        self._alone = load_onnx(file, threads=cores) if cores > 1 else self.model
        self._wanted = [name for name in self.model.outputs if name not in ("logits", "squares")]
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._busy, self._pixels = 0, pixels
        self._lock = threading.Lock()
        self.sizes: list[int] = []
        self._decoders = ThreadPoolExecutor(cores, thread_name_prefix="decode")
        self._workers = [threading.Thread(target=self._work, name=f"answer-{n}", daemon=True) for n in range(cores)]
        for worker in self._workers:
            worker.start()

    def answer(self, data: bytes) -> Future[dict[str, npt.NDArray[Any]]]:
        """The bytes of a picture file -> probabilities (C,), where the file has them strangeness () and heatmaps (C, h, w), and its

        `size`, (width, height). The future raises ImageError with the reason for what cannot be decoded.
        """
        done: Future[dict[str, npt.NDArray[Any]]] = Future()
        self._decoders.submit(self._prepare, data, done)
        return done

    def _prepare(self, data: bytes, done: Future[dict[str, npt.NDArray[Any]]]) -> None:
        if not done.set_running_or_notify_cancel():
            return
        try:
            picture = self._decode(data)
            square = self.model.square(picture)
            answered: Future[dict[str, npt.NDArray[Any]]] = Future()
            answered.add_done_callback(lambda found: _hand_on(found, done, (picture.shape[1], picture.shape[0])))
            self._jobs.put((square, answered))
        except Exception as error:  # whatever it is, its caller waits for it
            done.set_exception(error)

    def _decode(self, data: bytes) -> npt.NDArray[np.uint8]:
        try:
            return np.asarray(decode(data, self.model.facts["enough"], self._pixels))
        except ValueError as error:
            raise ImageError(str(error)) from error

    def _work(self) -> None:
        """Takes what waits, up to a batch of it, until None comes."""
        while (first := self._jobs.get()) is not None:
            batch = [first]
            while len(batch) < BATCH:
                try:
                    more = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if more is None:
                    self._jobs.put(None)  # for the round after this one
                    break
                batch.append(more)
            with self._lock:
                self._busy += 1
                model = self._alone if self._busy == 1 and len(batch) == 1 else self.model
                self.sizes.append(len(batch))
                del self.sizes[:-10_000]
            self._answer(model, batch)
            with self._lock:
                self._busy -= 1

    def _answer(self, model: Any, batch: Sequence[Job]) -> None:
        try:
            found = model.ask(np.stack([square for square, _ in batch]), self._wanted)
        except Exception as error:
            for _, done in batch:
                done.set_exception(error)
            return
        for n, (_, done) in enumerate(batch):
            done.set_result({name: values[n] for name, values in found.items()})

    def close(self) -> None:
        """Waits until everything that was handed in is answered."""
        self._decoders.shutdown(wait=True)
        for _ in self._workers:
            self._jobs.put(None)
        for worker in self._workers:
            worker.join()


def _hand_on(found: Future[dict[str, Any]], done: Future[dict[str, Any]], size: tuple[int, int]) -> None:
    """A square's answer, with the picture's (width, height), to who asked about the picture."""
    error = found.exception()
    if error is not None:
        done.set_exception(error)
    else:
        done.set_result({**found.result(), "size": np.array(size)})
