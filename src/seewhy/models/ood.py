"""Features -> how little an image looks like anything the network was trained on: the distance to its nearest training images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]
Score = npt.NDArray[np.float64]

NEIGHBOURS = 3  # k of the k-th nearest training image
REFERENCES = 4096  # training images that are kept; fewer are worse at strange classes (benchmarks/ood.py)
ROWS = 1024  # vectors held against the references at a time


@dataclass(frozen=True, eq=False)
class KNNReference:
    """A sample of the training images to hold others against.

    centre: (K,) float32, mean of the training vectors. unit_features: (M, K) float16, their centred vectors at length 1.
    """

    centre: npt.NDArray[np.float32]
    unit_features: npt.NDArray[np.float16]

    def ood_score(self, vectors: Array) -> Score:
        """(N, K) vectors -> (N,): 1 - cosine with the third most alike training image, of centred vectors. 0 (the same) to 2.

        Nearest neighbours of features (Sun 2022, arXiv:2204.06507), with centred features and a sample in place of all images.
        """
        unit_features = self._columns
        nearest = min(NEIGHBOURS, unit_features.shape[1])
        found = np.empty(len(vectors))
        for start in range(0, len(vectors), ROWS):  # all at once they would take 16 KB an image
            alike = _unit(vectors[start : start + ROWS] - self.centre).astype(np.float32) @ unit_features
            found[start : start + ROWS] = 1 - np.partition(alike, -nearest, axis=1)[:, -nearest]
        return found

    @cached_property
    def _columns(self) -> npt.NDArray[np.float32]:
        """(K, M) `unit_features` as they are multiplied: made once, since that takes as long as a few dozen images' network."""
        return self.unit_features.astype(np.float32).T


def in_rows(blocks: Iterator[Array], counts: Iterable[int]) -> Iterator[Array]:
    """(B, K) blocks of any sizes, one after another -> the same rows in blocks of these sizes; where there are fewer, in fewer blocks."""
    left = next(blocks)
    for count in counts:
        while len(left) < count and len(more := next(blocks, left[:0])):
            left = np.concatenate([left, more])
        if len(left):
            yield left[:count]
        left = left[count:]


def fit_reference(vectors: Array, seed: int = 0) -> KNNReference:
    """(N, K) vectors of the training images -> at most REFERENCES of them, drawn at random."""
    drawn = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:REFERENCES])
    centre = vectors.mean(axis=0).astype(np.float32)
    return KNNReference(centre, _unit(vectors[drawn] - centre).astype(np.float16))


def _unit(vectors: Array) -> Array:
    scaled: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled
