"""Score how far an image is from the training images: distance to the nearest ones in the network's features."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.floating]

NEIGHBOURS = 3  # k of the k-th nearest training image
MAX_REFERENCES = 4096  # training images; fewer detect held-out classes worse (benchmarks/ood.py)
ROWS = 1024  # vectors compared with the references at a time, at 16 KB each


@dataclass(frozen=True, eq=False)
class KNNReference:
    """A sample of the training images to compare others with.

    centre: (K,) float32, mean of the training vectors. unit_features: (M, K) float16, their centred vectors, scaled to length 1.
    """

    centre: npt.NDArray[np.float32]
    unit_features: npt.NDArray[np.float16]

    def ood_score(self, vectors: Array) -> npt.NDArray[np.float64]:
        """(N,) scores of (N, K) vectors: 1 - cosine with the third most similar training image, both centred; 0 (equal) to 2.

        k-nearest-neighbour distance (Sun 2022, arXiv:2204.06507), with centred features and a sample in place of all images.
        """
        unit_features = self._columns
        nearest = min(NEIGHBOURS, unit_features.shape[1])
        scores = np.empty(len(vectors))
        for start in range(0, len(vectors), ROWS):
            cosines = _unit(vectors[start : start + ROWS] - self.centre).astype(np.float32) @ unit_features
            scores[start : start + ROWS] = 1 - np.partition(cosines, -nearest, axis=1)[:, -nearest]
        return scores

    @cached_property
    def _columns(self) -> npt.NDArray[np.float32]:
        """(K, M) `unit_features` for the product, cached: converting takes as long as a few dozen forward passes."""
        return self.unit_features.astype(np.float32).T


def sample_references(train: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Draw at most MAX_REFERENCES of the training images' indices, sorted."""
    return np.sort(np.random.default_rng(seed).permutation(train)[:MAX_REFERENCES])


def fit_reference(vectors: Array) -> KNNReference:
    """Build the reference from the (N, K) vectors of the sampled training images."""
    centre = vectors.mean(axis=0).astype(np.float32)
    return KNNReference(centre, _unit(vectors - centre).astype(np.float16))


def _unit(vectors: Array) -> Array:
    unit: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return unit
