"""ImageSet -> Split: seeded, stratified by class, images of a group kept in one part."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seewhy.curation.near_duplicates import chain, digests, exact_pairs, label_groups
from seewhy.data.image_set import ImageSet, digest_of_lines
from seewhy.errors import SplitError

PARTS = ("train", "val", "test")
PROTOCOLS = ("ratio", "caltech30")
TRAIN = PARTS.index("train")
NOWHERE = len(PARTS)  # the part of an image to which none is given
CALTECH30_TRAIN = 30  # images a class of the protocol; 3 of them are kept for validation
CALTECH30_VAL = 3


@dataclass(frozen=True, eq=False)
class Split:
    """Which image is used for what.

    protocol: how it was made ('ratio', 'caltech30', 'folders', or 'file').
    train, val, test: int64 indices into the ImageSet, sorted, disjoint.
    groups: (N,) a number a group of the ImageSet's images; no group lies in two parts but those of the classes in `torn`.
    torn: classes with too few groups to have one in each part; only their exact duplicates were kept together.
    """

    protocol: str
    seed: int
    train: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    split_groups_in: tuple[str, ...] = ()

    def part(self, name: str) -> npt.NDArray[np.int64]:
        """Indices of 'train', 'val' or 'test'."""
        if name not in PARTS:
            raise SplitError(f"unknown part {name!r}; use one of {', '.join(PARTS)}")
        indices: npt.NDArray[np.int64] = getattr(self, name)
        return indices

    def write(self, file: Path, images: ImageSet) -> None:
        """`split.json`: the split by image hash, independent of paths and order."""
        record = {
            "protocol": self.protocol,
            "seed": self.seed,
            "hash": self.hash(images),
            "groups": self._groups_by_hash(images),
            "split_groups_in": self.split_groups_in,
            **{name: self._hashes(images, name) for name in PARTS},
        }
        with file.open("w", encoding="utf-8") as out:
            json.dump(record, out, indent=1, ensure_ascii=False)
            out.write("\n")

    def _hashes(self, images: ImageSet, name: str) -> list[str]:
        """Those of a part's images, sorted."""
        return sorted(images.hashes[i] for i in self.part(name))

    def _groups_by_hash(self, images: ImageSet) -> list[list[str]]:
        """The groups of more than one image content, each sorted, in the order of their first hashes."""
        groups: dict[int, set[str]] = {}
        for i in np.flatnonzero(np.bincount(self.groups)[self.groups] > 1).tolist():
            groups.setdefault(int(self.groups[i]), set()).add(images.hashes[i])
        return sorted(sorted(group) for group in groups.values() if len(group) > 1)

    def hash(self, images: ImageSet) -> str:
        """sha256 over which image is in which part."""
        return digest_of_lines(f"{name} {sha256}" for name in sorted(PARTS) for sha256 in self._hashes(images, name))


def leaked_images(split: Split, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Test images that share a group with a training image: what parts given by folders, or torn classes, let through."""
    return split.test[np.isin(groups[split.test], groups[split.train])]


def split_images(
    images: ImageSet,
    protocol: str = "ratio",
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    groups: npt.NDArray[np.int64] | None = None,
    allow_split_groups: bool = True,
) -> Split:
    """Divides each class at random, whole groups at a time.

    groups: (N,) a number a group of images that show the same; exact duplicates belong together in any case. None: these alone.
    A group of several classes is dealt with the one that most of it belongs to.
    allow_split_groups: where a class has too few groups, or one group holds over half of it, keep only equal files together and name the
    class in `split_groups_in`; else raise SplitError, which is right where groups were named and not guessed.

    ratio: `test_fraction` and `val_fraction` of each class, the rest to train.
    caltech30: 27 train + 3 val images of each class, the rest test.
    Parts that the folders already give are kept; missing ones are cut out of train.
    Raises SplitError for an unknown protocol, and where a class has too few different images.
    """
    if protocol not in PROTOCOLS:
        raise SplitError(f"unknown protocol {protocol!r}; use one of {', '.join(PROTOCOLS)}")
    rng = np.random.default_rng(seed)
    parts = _given_parts(images)
    given = {PARTS[part] for part in np.unique(parts).tolist() if part < NOWHERE}
    twins = exact_pairs(images)
    exact = joined = label_groups(len(images), twins)
    if groups is not None:
        if given:  # what the folders divide stays divided; `leaked_images` counts what that lets through
            groups = groups * len(PARTS) + parts
        joined = label_groups(len(images), np.concatenate([twins, chain(groups)]))
    joined, torn = _torn_apart(images, joined, exact, parts if given else None)
    if torn and not allow_split_groups:
        raise SplitError(
            f"class {torn[0]!r} has too few groups, or one with over half of its images, to keep groups in one part each; "
            "add images of other groups, merge classes, or use --group-by duplicates or exact"
        )
    dealt = _order_groups(images, joined)
    where = np.empty(len(dealt), dtype=np.uint8)  # the part of each group, by its place in PARTS
    for label, own in enumerate(dealt.shuffled(rng)):
        name = images.classes[label]
        if given:
            _take_given(images, parts, name, dealt, own, given, where)
            wanted = _ratio_sizes(dealt.count(own[where[own] == TRAIN]), val_fraction, test_fraction)
            wanted["train"] += sum(wanted.pop(part) for part in ("val", "test") if part in given)
        elif protocol == "caltech30":
            wanted = {"val": CALTECH30_VAL, "train": CALTECH30_TRAIN - CALTECH30_VAL, "test": dealt.count(own) - CALTECH30_TRAIN}
        else:
            wanted = _ratio_sizes(dealt.count(own), val_fraction, test_fraction)
        pool = own[where[own] == TRAIN] if given else own
        _check_enough(name, len(pool), wanted, protocol if not given else "folders")
        where[pool] = _deal(dealt.sizes[pool], wanted)
    found = np.empty(len(images), dtype=np.uint8)
    found[dealt.members] = np.repeat(where, dealt.sizes)
    train, val, test = (np.flatnonzero(found == part) for part in range(len(PARTS)))
    return Split("folders" if given else protocol, seed, train, val, test, joined, torn)


def _given_parts(images: ImageSet) -> npt.NDArray[np.uint8]:
    """(N,) the part in which each image lies, as its place in PARTS, else NOWHERE."""
    return np.array([PARTS.index(part) if part else NOWHERE for part in images.parts], dtype=np.uint8)


@dataclass(frozen=True, eq=False)
class _Groups:
    """G groups of N images, each with the class it is dealt with: the commonest among its images.

    In the order of their first image by content, so that neither paths nor file order decide.
    members: (N,) images, group after group, ascending in each. begins, sizes: (G,) where they lie in `members`. labels: (G,).
    """

    members: npt.NDArray[np.int64]
    begins: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: int

    def __len__(self) -> int:
        return len(self.sizes)

    def of(self, group: int) -> npt.NDArray[np.int64]:
        """Its images, ascending."""
        return self.members[self.begins[group] :][: self.sizes[group]]

    def first_of(self, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The smallest image of each."""
        found: npt.NDArray[np.int64] = self.members[self.begins[groups]]
        return found

    def by_class(self) -> list[npt.NDArray[np.int64]]:
        """The groups of each class."""
        order = np.argsort(self.labels, kind="stable")
        return np.split(order, np.searchsorted(self.labels[order], np.arange(1, self.classes)))

    def shuffled(self, rng: np.random.Generator) -> list[npt.NDArray[np.int64]]:
        """The same in an order that `rng` draws."""
        found = self.by_class()
        for groups in found:
            rng.shuffle(groups)
        return found

    def count(self, groups: npt.NDArray[np.int64]) -> int:
        """Of their images."""
        return int(self.sizes[groups].sum())


def _order_groups(images: ImageSet, joined: npt.NDArray[np.int64]) -> _Groups:
    """joined: (N,) the smallest image of each one's group."""
    rank = np.empty(len(images), dtype=np.int64)
    rank[np.argsort(digests(images.hashes), kind="stable")] = np.arange(len(images))
    first = np.full(len(images), len(images))
    np.minimum.at(first, joined, rank)
    first = first[joined]
    members = np.argsort(first, kind="stable")
    begins = np.flatnonzero(np.diff(first[members], prepend=-1))
    sizes = np.diff(begins, append=len(members))
    labels = images.labels[members[begins]]
    for group in np.flatnonzero(sizes > 1):
        labels[group] = np.bincount(images.labels[members[begins[group] :][: sizes[group]]]).argmax()
    return _Groups(members, begins, sizes, labels, len(images.classes))


def _torn_apart(
    images: ImageSet, joined: npt.NDArray[np.int64], exact: npt.NDArray[np.int64], given: npt.NDArray[np.uint8] | None
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Groups, but only exact duplicates where a class has too few to deal one to each part, or one that holds over half of it."""
    parts = len(PARTS) if given is None else 1 + sum(not np.any(given == PARTS.index(part)) for part in ("val", "test"))
    torn: set[int] = set()
    while True:
        dealt = _order_groups(images, joined)
        pools = dealt.by_class()
        if given is not None:
            pools = [groups[given[dealt.first_of(groups)] == TRAIN] for groups in pools]
        more = {
            label
            for label, pool in enumerate(pools)
            if label not in torn
            # A class whose images all lie in groups of other classes is starved by them.
            and (len(pool) < parts or (dealt.sizes[pool].max() > 1 and 2 * dealt.sizes[pool].max() > dealt.count(pool)))
            and np.any(np.isin(joined, joined[images.labels == label]) & (joined != exact))
        }
        if not more:
            return joined, tuple(images.classes[label] for label in sorted(torn))
        torn |= more
        loose = np.isin(images.labels, sorted(torn))
        loose |= np.isin(joined, joined[loose])  # half a group would be no group
        joined = np.where(loose, exact, joined)


def _ratio_sizes(n: int, val_fraction: float, test_fraction: float) -> dict[str, int]:
    test = max(1, round(n * test_fraction))
    val = max(1, round(n * val_fraction))
    return {"test": test, "val": val, "train": n - test - val}


def _take_given(
    images: ImageSet,
    parts: npt.NDArray[np.uint8],
    name: str,
    dealt: _Groups,
    own: npt.NDArray[np.int64],
    given: set[str],
    where: npt.NDArray[np.uint8],
) -> None:
    """Takes over the given parts of a class's groups, into `where`."""
    for group in own[dealt.sizes[own] > 1].tolist():
        found = {PARTS[part] for part in parts[dealt.of(group)].tolist()}
        if len(found) > 1:
            shown = ", ".join(str(images.paths[i]) for i in dealt.of(group)[:3])
            raise SplitError(f"the same image lies in {' and '.join(sorted(found))} ({shown}); remove all but one")
    where[own] = parts[dealt.first_of(own)]
    missing = sorted(part for part in given if not np.any(where[own] == PARTS.index(part)))
    if missing:
        raise SplitError(f"class {name!r} has no image in the {missing[0]} folder; add some, or remove the class from the others")


def _check_enough(name: str, n: int, wanted: dict[str, int], protocol: str) -> None:
    """At least one image in each part, counting duplicates once. n: groups."""
    if n >= len(wanted) and min(wanted.values()) >= 1:
        return
    noun = "image" if n == 1 else "different images"
    if protocol == "caltech30":
        raise SplitError(f"class {name!r} has {n} {noun}; caltech30 needs at least {CALTECH30_TRAIN + 1}: use --protocol ratio")
    raise SplitError(
        f"class {name!r} has {n} {noun}, too few for one in each of {', '.join(p for p in PARTS if p in wanted)}; "
        f"add images (at least {len(wanted)}) or remove the class"
    )


def _deal(sizes: npt.NDArray[np.int64], wanted: dict[str, int]) -> npt.NDArray[np.uint8]:
    """(G,) images of each group -> (G,) its part, as a place in PARTS.

    Whole groups to the first part that has room for them (test, val, train); train takes what is over.
    In the order they come, large or small, so that each part has its share of either; but every part gets a group before any gets
    a second one, and the smallest ones serve for that.
    """
    order = sorted(wanted, key=lambda part: PARTS.index(part), reverse=True)  # test, val, train
    left = dict(wanted)
    dealt = np.zeros(len(sizes), dtype=np.uint8)
    queue = np.arange(len(sizes))
    for part in order:
        fitting = np.flatnonzero(sizes[queue] <= left[part])
        place = fitting[0] if len(fitting) else sizes[queue].argmin()
        dealt[queue[place]] = PARTS.index(part)
        left[part] -= int(sizes[queue[place]])
        queue = np.delete(queue, place)
    for group, size in zip(queue, sizes[queue].tolist(), strict=True):
        part = next((p for p in order if left[p] >= size), order[-1])
        dealt[group] = PARTS.index(part)
        left[part] -= size
    return dealt


def read_split(path: Path, images: ImageSet) -> Split:
    """The split of a run folder or `split.json`, applied to these images by their content.

    Raises SplitError if an image is in none of its parts, or a part is left empty.
    """
    file = path / "split.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        part_of = {sha256: part for part, name in enumerate(PARTS) for sha256 in record[name]}
        group_of = {sha256: number for number, group in enumerate(record["groups"]) for sha256 in group}
        protocol, seed, torn = str(record["protocol"]), int(record["seed"]), tuple(map(str, record["split_groups_in"]))
    except FileNotFoundError as error:
        raise SplitError(f"{file}: no such split; pass a run folder or a split.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SplitError(f"{file}: not a split ({error}); pass a run folder or a split.json") from error
    parts = np.array([part_of.get(sha256, NOWHERE) for sha256 in images.hashes])
    unknown = np.flatnonzero(parts == NOWHERE)
    if len(unknown):
        raise SplitError(
            f"{file}: {len(unknown)} of {len(images)} images are not in this split, {images.paths[unknown[0]]} for one; "
            "use the data it was made for, or leave out --split-from"
        )
    train, val, test = indices = [np.flatnonzero(parts == part) for part in range(len(PARTS))]
    for name, found in zip(PARTS, indices, strict=True):
        if not len(found):
            raise SplitError(f"{file}: no image of its {name} part is in the data; leave out --split-from")
    groups = np.array([group_of.get(sha256, -1) for sha256 in images.hashes])
    inside = np.flatnonzero(groups >= 0)
    pairs = np.concatenate([exact_pairs(images), inside[chain(groups[inside])]])
    return Split(protocol, seed, train, val, test, label_groups(len(images), pairs), torn)
