"""Find near-duplicate images by equal bytes, perceptual hash and features of a network, and join them into groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from seewhy.data.image_set import ImageSet

# Limits of similarity; `seewhy audit` shows pairs at each of them.
MIN_COSINE = 0.9  # of centred features; also finds mirrored, cropped and recoloured images
# Maximum differing bits of 64 -> cosine needed to confirm them. Features depend on fine texture, which a smaller copy has lost while its
# hash is the same. Hashes of motorbikes on white agree in many bits; their features differ.
HASH_COSINE_LIMITS = {2: 0.7, 10: 0.85}
MAX_HASH_BITS = 2  # without features
PRIOR = 100  # pseudo-count of images with constant features, for the centre
BLOCK = 2048  # rows compared at a time
KINDS = ("exact", "hash", "features")  # the strictest first

Pairs = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class NearPairs:
    """P pairs of near-duplicates, each with the strictest kind that holds.

    pairs: (P, 2) int64 positions, the smaller first. kinds: (P,) 'exact', 'hash' or 'features'.
    distances: (P,) differing bits of the perceptual hashes, 0..64. cosines: (P,) of the centred features, nan without features.
    """

    pairs: Pairs
    kinds: npt.NDArray[np.str_]
    distances: npt.NDArray[np.int64]
    cosines: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.pairs)


def exact_pairs(images: ImageSet) -> Pairs:
    """(P, 2) consecutive members of each set of files with equal bytes."""
    return np.sort(link_equal(digests(images.hashes)), axis=1)


def digests(hashes: Sequence[str]) -> npt.NDArray[np.bytes_]:
    """(N,) hex texts as 32 bytes each, in the same sort order."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), dtype="S32")


def hash_pairs(phashes: npt.NDArray[np.uint64], max_bits: int = MAX_HASH_BITS) -> Pairs:
    """(P, 2) pairs whose hashes differ in at most `max_bits` bits.

    Up to BLOCK * 10 images every pair is compared. Beyond that, equal hashes are linked, and one of each is compared with those that are
    equal in at least one of `max_bits` + 1 bands: the same groups from fewer pairs.
    Images of one colour are left out: fewer than 8 bits of their hash are set, where others have 32.
    """
    textured = np.flatnonzero(np.bitwise_count(phashes) >= 8)
    hashes = phashes[textured]
    if len(textured) > 10 * BLOCK:
        unique, first = np.unique(hashes, return_index=True)
        pairs: Pairs = textured[np.sort(np.concatenate([link_equal(hashes), first[_lsh_pairs(unique, max_bits)]]), axis=1)]
        return pairs
    return textured[_pairs_where(len(textured), _within(hashes, max_bits))]


def centred(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(N, K) features minus their mean, which is shrunk towards a constant where images are few.

    Without this, all images of one kind (radiographs, say) would be near-duplicates.
    """
    count = len(features)
    centre = (PRIOR * features.mean() + count * features.mean(axis=0)) / (PRIOR + count)
    shifted: npt.NDArray[np.float32] = features - centre.astype(np.float32)
    return shifted


def feature_pairs(features: npt.NDArray[np.float32], min_cosine: float = MIN_COSINE) -> Pairs:
    """(N, K) centred features -> (P, 2) pairs with a cosine of at least `min_cosine`; O(N² K): 1 s for 10,000 images."""
    unit = _unit(features)
    return _pairs_where(len(unit), lambda a, b: unit[a] @ unit[b].T >= min_cosine)


def cosines_of(features: npt.NDArray[np.float32], pairs: Pairs) -> npt.NDArray[np.float64]:
    """(P,) cosine similarity of each pair of (N, K) vectors."""
    unit = _unit(features)
    cosines: npt.NDArray[np.float64] = np.einsum("pk,pk->p", unit[pairs[:, 0]], unit[pairs[:, 1]]).astype(np.float64)
    return cosines


def _unit(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    normalised: npt.NDArray[np.float32] = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return normalised


def near_pairs(images: ImageSet, vectors: npt.NDArray[np.float32] | None = None) -> NearPairs:
    """Find all pairs of near-duplicates by bytes, perceptual hash and, if given, (N, K) features of a network."""
    exact = exact_pairs(images)
    if vectors is None:
        by_hash, by_features = hash_pairs(images.phashes), np.empty((0, 2), dtype=np.int64)
    else:
        vectors = centred(vectors)
        by_hash, by_features = hash_pairs(images.phashes, max(HASH_COSINE_LIMITS)), feature_pairs(vectors)
        distances, cosines = _distances(images, by_hash), cosines_of(vectors, by_hash)
        by_hash = by_hash[np.any([(distances <= bits) & (cosines >= limit) for bits, limit in HASH_COSINE_LIMITS.items()], axis=0)]
    stacked = np.concatenate([exact, by_hash, by_features])
    kinds = np.repeat(np.array(KINDS), [len(exact), len(by_hash), len(by_features)])
    pairs, first = np.unique(stacked, axis=0, return_index=True)  # the first of equal ones is the strictest kind
    cosines = np.full(len(pairs), np.nan) if vectors is None else cosines_of(vectors, pairs)
    return NearPairs(pairs, kinds[first], _distances(images, pairs), cosines)


def _distances(images: ImageSet, pairs: Pairs) -> npt.NDArray[np.int64]:
    bits: npt.NDArray[np.int64] = np.bitwise_count(images.phashes[pairs[:, 0]] ^ images.phashes[pairs[:, 1]]).astype(np.int64)
    return bits


def label_groups(n: int, pairs: Pairs) -> npt.NDArray[np.int64]:
    """(N,) the smallest image of each image's group: the connected components of the graph of `pairs`."""
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, labels = connected_components(links, directed=False)
    _, first, component = np.unique(labels, return_index=True, return_inverse=True)
    return first[component].astype(np.int64)


def link_equal(entries: npt.ArrayLike) -> Pairs:
    """(P, 2) consecutive members of each set of equal entries, which join the set as a group."""
    values = np.asarray(entries)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    return np.stack([order[same], order[same + 1]], axis=1)


BlockTest = Callable[[slice, slice], npt.NDArray[np.bool_]]  # rows a, rows b -> (A, B) whether each pair is near


def _within(hashes: npt.NDArray[np.uint64], max_bits: int) -> BlockTest:
    return lambda a, b: np.bitwise_count(hashes[a, None] ^ hashes[b]) <= max_bits


def _lsh_pairs(hashes: npt.NDArray[np.uint64], max_bits: int) -> Pairs:
    """(P, 2) pairs i < j that differ in at most `max_bits` bits, compared only where one of `max_bits` + 1 bands of bits is equal."""
    pairs = [np.empty((0, 2), dtype=np.int64)]
    edges = np.linspace(0, 64, max_bits + 2).astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        band = (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(band, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
            if len(bucket) > 1:
                members = np.sort(bucket)
                pairs.append(members[_pairs_where(len(members), _within(hashes[members], max_bits))])
    return np.unique(np.concatenate(pairs), axis=0)


def _pairs_where(n: int, near: BlockTest) -> Pairs:
    """(P, 2) sorted pairs i < j for which `near` is true, tested block by block on and above the diagonal."""
    pairs = [np.empty((0, 2), dtype=np.int64)]
    for row in range(0, n, BLOCK):
        for column in range(row, n, BLOCK):
            block = np.argwhere(near(slice(row, row + BLOCK), slice(column, column + BLOCK))) + np.array([row, column])
            pairs.append(block[block[:, 0] < block[:, 1]])
    stacked = np.concatenate(pairs)
    return stacked[np.lexsort((stacked[:, 1], stacked[:, 0]))]
