"""Features and logits -> how little a picture looks like anything the network was trained on; SCORES, and the one that runs use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
from scipy.linalg import eigh
from scipy.special import logsumexp

Array = npt.NDArray[np.floating]
Score = npt.NDArray[np.float64]

NEIGHBOURS = 3  # the how-manieth nearest training picture
REFERENCES = 4096  # training pictures that are kept; fewer are worse at strange classes (benchmarks/unknowns.py)
ROWS = 1024  # vectors held against the references at a time
RESIDUAL_SHARE = 0.5  # of the dimensions, the ones in which training features vary least (ViM)


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of N training pictures: vectors (N, K) before the classifier, logits (N, C), labels (N,)."""

    vectors: Array
    logits: Array
    labels: npt.NDArray[np.int64]


Measure = Callable[[Array, Array], Score]  # (vectors (M, K), logits (M, C)) -> (M,)


def max_prob(known: Known) -> Measure:
    """1 - the largest probability: the baseline (Hendrycks 2017, arXiv:1610.02136)."""
    return lambda vectors, logits: 1 - np.exp(logits.max(axis=1) - logsumexp(logits.astype(np.float64), axis=1))


def max_logit(known: Known) -> Measure:
    """- the largest logit (Hendrycks 2022, arXiv:1911.11132)."""
    return lambda vectors, logits: np.asarray(-logits.max(axis=1), dtype=np.float64)


def energy(known: Known) -> Measure:
    """- log sum exp of the logits (Liu 2020, arXiv:2010.03759)."""
    return lambda vectors, logits: -logsumexp(logits.astype(np.float64), axis=1)


def mahalanobis(known: Known) -> Measure:
    """Squared Mahalanobis distance to the nearest class mean, one covariance for all classes (Lee 2018, arXiv:1807.03888).

    The covariance is shrunken (Ledoit and Wolf 2004), since features often are as many as pictures.
    """
    means, whiten = class_means(known), _whitening(known)
    centres = means @ whiten

    def measure(vectors: Array, logits: Array) -> Score:
        return nearest_squared(vectors.astype(np.float64) @ whiten, centres)

    return measure


def relative_mahalanobis(known: Known) -> Measure:
    """The same, less the squared distance to the mean of all pictures under the covariance of all (Ren 2021, arXiv:2106.09022)."""
    near = mahalanobis(known)
    centre = known.vectors.mean(axis=0)
    covariance = _covariance(known.vectors.astype(np.float64))
    values, axes = eigh(covariance)
    whiten = axes / np.sqrt(values)

    def measure(vectors: Array, logits: Array) -> Score:
        whole: Score = near(vectors, logits) - np.square((vectors - centre).astype(np.float64) @ whiten).sum(axis=1)
        return whole

    return measure


def nearest_neighbours(known: Known) -> Measure:
    """What runs use: `References.strangeness`, from a sample of the training pictures."""
    references = sample_references(known.vectors)
    return lambda vectors, logits: references.strangeness(vectors)


def virtual_logit(known: Known) -> Measure:
    """Length of the features outside the main space of the training features, scaled, less the energy (ViM, arXiv:2203.10807)."""
    centre = known.vectors.mean(axis=0)
    centred = (known.vectors - centre).astype(np.float64)
    _, axes = eigh(centred.T @ centred)  # the smallest eigenvalues first
    rest = axes[:, : max(1, round(RESIDUAL_SHARE * axes.shape[1]))]
    alpha = known.logits.max(axis=1).mean() / np.linalg.norm(centred @ rest, axis=1).mean()

    def measure(vectors: Array, logits: Array) -> Score:
        virtual: Score = alpha * np.linalg.norm((vectors - centre).astype(np.float64) @ rest, axis=1)
        return virtual - logsumexp(logits.astype(np.float64), axis=1)

    return measure


SCORES: dict[str, Callable[[Known], Measure]] = {
    "max prob": max_prob,
    "max logit": max_logit,
    "energy": energy,
    "mahalanobis": mahalanobis,
    "relative mahalanobis": relative_mahalanobis,
    "nearest neighbours": nearest_neighbours,
    "virtual logit": virtual_logit,
}


# ---------------------------------------------------------------- what runs use


@dataclass(frozen=True, eq=False)
class References:
    """A sample of the training pictures to hold others against.

    centre: (K,) float32, mean of the training vectors. directions: (M, K) float16, their centred vectors at length 1.
    """

    centre: npt.NDArray[np.float32]
    directions: npt.NDArray[np.float16]

    def strangeness(self, vectors: Array) -> Score:
        """(N, K) vectors -> (N,): 1 - cosine with the third most alike training picture, of centred vectors. 0 (the same) to 2.

        Nearest neighbours of features (Sun 2022, arXiv:2204.06507), with centred features and a sample in place of all pictures.
        """
        directions = self._columns
        nearest = min(NEIGHBOURS, directions.shape[1])
        found = np.empty(len(vectors))
        for start in range(0, len(vectors), ROWS):  # all at once they would take 16 KB a picture
            alike = _unit(vectors[start : start + ROWS] - self.centre).astype(np.float32) @ directions
            found[start : start + ROWS] = 1 - np.partition(alike, -nearest, axis=1)[:, -nearest]
        return found

    @cached_property
    def _columns(self) -> npt.NDArray[np.float32]:
        """(K, M) directions as they are multiplied: made once, since that takes as long as a few dozen pictures' network."""
        return self.directions.astype(np.float32).T


def in_rows(blocks: Iterator[Array], counts: Iterable[int]) -> Iterator[Array]:
    """(B, K) blocks of any sizes, one after another -> the same rows in blocks of these sizes; where there are fewer, in fewer blocks."""
    left = next(blocks)
    for count in counts:
        while len(left) < count and len(more := next(blocks, left[:0])):
            left = np.concatenate([left, more])
        if len(left):
            yield left[:count]
        left = left[count:]


def sample_references(vectors: Array, seed: int = 0) -> References:
    """(N, K) vectors of the training pictures -> at most REFERENCES of them, drawn at random."""
    drawn = np.sort(np.random.default_rng(seed).permutation(len(vectors))[:REFERENCES])
    centre = vectors.mean(axis=0).astype(np.float32)
    return References(centre, _unit(vectors[drawn] - centre).astype(np.float16))


# ---------------------------------------------------------------- steps of the above


def class_means(known: Known) -> npt.NDArray[np.float64]:
    """(C, K) mean vector of each class that has pictures."""
    return np.stack([known.vectors[known.labels == c].mean(axis=0) for c in np.unique(known.labels)]).astype(np.float64)


def _whitening(known: Known) -> npt.NDArray[np.float64]:
    """(K, K) W with W W^T the inverse of the covariance within classes: distances after `@ W` are Mahalanobis distances."""
    means = class_means(known)
    _, places = np.unique(known.labels, return_inverse=True)
    covariance = _covariance(known.vectors - means[places], assume_centered=True)
    values, axes = eigh(covariance)
    whiten: npt.NDArray[np.float64] = axes / np.sqrt(values)
    return whiten


def _covariance(vectors: Array, assume_centered: bool = False) -> npt.NDArray[np.float64]:
    """(N, K) -> (K, K), shrunken."""
    from sklearn.covariance import ledoit_wolf  # not at the top: answering does without, and it takes 0.5 s and 20 MB of each worker

    covariance: npt.NDArray[np.float64] = ledoit_wolf(vectors, assume_centered=assume_centered)[0]
    return covariance


def nearest_squared(vectors: Array, centres: Array) -> Score:
    """(M, K), (C, K) -> (M,) least squared distance to a centre."""
    squares = np.square(vectors).sum(axis=1)[:, None] - 2 * vectors @ centres.T + np.square(centres).sum(axis=1)
    return np.asarray(squares.min(axis=1), dtype=np.float64)


def _unit(vectors: Array) -> Array:
    scaled: Array = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    return scaled
