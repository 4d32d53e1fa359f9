"""Images -> groups that show the same thing: equal bytes, near perceptual hashes, or near features of a network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from seewhy.data.image_set import ImageSet

# How near is a near-duplicate? `seewhy audit` shows pairs at each limit.
COSINE_ALONE = 0.9  # of centred features: also mirrored, cropped and recoloured images
# Bits of 64 in which perceptual hashes differ at most -> cosine that confirms them. Features change with the grain of an image, which
# a smaller copy has lost; its hash stays. DigestColumn of motorbikes on white agree in many bits; their features tell them apart.
HASH_COSINE_LIMITS = {2: 0.7, 10: 0.85}
HASH_ALONE = 2  # bits, where there are no features
PRIOR = 100  # images that the centre of features is worth before any is seen
BLOCK = 2048  # rows compared at a time
KINDS = ("exact", "hash", "features")  # the nearest first

Pairs = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class NearPairs:
    """P pairs of images that show the same thing, the nearest kind of each pair.

    pairs: (P, 2) int64 positions, the smaller first. kinds: (P,) 'exact', 'hash' or 'features'.
    distances: (P,) bits in which the perceptual hashes differ, 0..64. cosines: (P,) of the centred features, nan where none were compared.
    """

    pairs: Pairs
    kinds: npt.NDArray[np.str_]
    distances: npt.NDArray[np.int64]
    cosines: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.pairs)


def exact_pairs(images: ImageSet) -> Pairs:
    """(P, 2) neighbours in each set of files with equal bytes; a chain joins all of them."""
    return np.sort(chain(digests(images.hashes)), axis=1)


def digests(hashes: Sequence[str]) -> npt.NDArray[np.bytes_]:
    """(N,) of 32 bytes: to compare and to sort, which gives the order of the texts."""
    return np.frombuffer(bytes.fromhex("".join(hashes)), dtype="S32")


def hash_pairs(phashes: npt.NDArray[np.uint64], most: int = HASH_ALONE) -> Pairs:
    """(P, 2) pairs whose hashes differ in at most `most` bits.

    Up to BLOCK * 10 images every pair is compared. Of more, those that agree in a whole band of bits: where at most `most` bits differ,
    one of `most` + 1 bands has none of them. Equal hashes are then joined in a chain, and one of them compared with the others: the
    same groups from fewer pairs.
    Of an image's hash half of the bits are set, but hardly one where it is of one colour; such images are left out.
    """
    bits = np.bitwise_count(phashes)
    told = np.flatnonzero(bits >= 8)
    hashes = phashes[told]
    if len(told) > 10 * BLOCK:
        unique, first = np.unique(hashes, return_index=True)
        pairs: Pairs = told[np.sort(np.concatenate([chain(hashes), first[_lsh_pairs(unique, most)]]), axis=1)]
        return pairs
    return told[_near(len(told), _alike(hashes, most))]


def centred(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(N, K) features less their centre: the set's mean, drawn towards the same number in all K places where images are few.

    What all images of a set have in common says nothing of a pair; without this, all radiographs would be near-duplicates.
    """
    count = len(features)
    centre = (PRIOR * features.mean() + count * features.mean(axis=0)) / (PRIOR + count)
    shifted: npt.NDArray[np.float32] = features - centre.astype(np.float32)
    return shifted


def feature_pairs(features: npt.NDArray[np.float32], least: float = COSINE_ALONE) -> Pairs:
    """(N, K) centred features -> (P, 2) pairs of cosine at least `least`. N² K operations: 1 s for 10,000 images, minutes for 100,000."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    return _near(len(unit), lambda a, b: unit[a] @ unit[b].T >= least)


def cosines_of(features: npt.NDArray[np.float32], pairs: Pairs) -> npt.NDArray[np.float64]:
    """(P,) cosine of each pair's vectors."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
    cosines: npt.NDArray[np.float64] = np.einsum("pk,pk->p", unit[pairs[:, 0]], unit[pairs[:, 1]]).astype(np.float64)
    return cosines


def near_pairs(images: ImageSet, vectors: npt.NDArray[np.float32] | None = None) -> NearPairs:
    """Every pair of images that shows the same thing, by bytes, perceptual hash and, where given, features (N, K) of a network."""
    exact = exact_pairs(images)
    if vectors is None:
        near, alike = hash_pairs(images.phashes, HASH_ALONE), np.empty((0, 2), dtype=np.int64)
    else:
        vectors = centred(vectors)
        near, alike = hash_pairs(images.phashes, max(HASH_COSINE_LIMITS)), feature_pairs(vectors)
        distances, cosines = _distances(images, near), cosines_of(vectors, near)
        near = near[np.any([(distances <= bits) & (cosines >= least) for bits, least in HASH_COSINE_LIMITS.items()], axis=0)]
    stacked = np.concatenate([exact, near, alike])
    kinds = np.repeat(np.array(KINDS), [len(exact), len(near), len(alike)])
    pairs, first = np.unique(stacked, axis=0, return_index=True)  # the first of equal ones: the nearest kind
    cosines = np.full(len(pairs), np.nan) if vectors is None else cosines_of(vectors, pairs)
    return NearPairs(pairs, kinds[first], _distances(images, pairs), cosines)


def _distances(images: ImageSet, pairs: Pairs) -> npt.NDArray[np.int64]:
    bits: npt.NDArray[np.int64] = np.bitwise_count(images.phashes[pairs[:, 0]] ^ images.phashes[pairs[:, 1]]).astype(np.int64)
    return bits


def label_groups(n: int, pairs: Pairs) -> npt.NDArray[np.int64]:
    """(N,) the smallest image of each one's group: images joined by pairs, and by pairs of pairs."""
    links = coo_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])), shape=(n, n))
    _, labels = connected_components(links, directed=False)
    _, first, places = np.unique(labels, return_index=True, return_inverse=True)
    return first[places].astype(np.int64)


def chain(entries: npt.ArrayLike) -> Pairs:
    """(P, 2) neighbours in each set of equal entries: what joins them as a group."""
    known = np.asarray(entries)
    order = np.argsort(known, kind="stable")
    ordered = known[order]
    same = np.flatnonzero(ordered[1:] == ordered[:-1])
    return np.stack([order[same], order[same + 1]], axis=1)


Blocks = Callable[[slice, slice], npt.NDArray[np.bool_]]


def _alike(hashes: npt.NDArray[np.uint64], most: int) -> Blocks:
    """Which hashes of two blocks differ in at most `most` bits."""
    return lambda a, b: np.bitwise_count(hashes[a, None] ^ hashes[b]) <= most


def _lsh_pairs(hashes: npt.NDArray[np.uint64], most: int) -> Pairs:
    """(P, 2) pairs i < j that differ in at most `most` bits, looked for among hashes that are equal in one band of bits."""
    found = [np.empty((0, 2), dtype=np.int64)]
    edges = np.linspace(0, 64, most + 2).astype(int)
    for low, high in itertools.pairwise(edges.tolist()):
        band = (hashes >> np.uint64(low)) & np.uint64(2 ** (high - low) - 1)
        order = np.argsort(band, kind="stable")
        ends = np.append(np.flatnonzero(np.diff(band[order])) + 1, len(order))
        starts = np.append(0, ends[:-1])
        for start, end in zip(starts[ends - starts > 1].tolist(), ends[ends - starts > 1].tolist(), strict=True):
            members = np.sort(order[start:end])
            if len(near := _near(len(members), _alike(hashes[members], most))):  # of millions most bands agree by chance alone
                found.append(members[near])
    return np.unique(np.concatenate(found), axis=0)


def _near(n: int, near: Blocks) -> Pairs:
    """(P, 2) pairs i < j of which `near` is true, asked block by block on and above the diagonal."""
    found = [np.empty((0, 2), dtype=np.int64)]
    for row in range(0, n, BLOCK):
        for column in range(row, n, BLOCK):
            places = np.argwhere(near(slice(row, row + BLOCK), slice(column, column + BLOCK))) + np.array([row, column])
            found.append(places[places[:, 0] < places[:, 1]])
    pairs = np.concatenate(found)
    return pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
