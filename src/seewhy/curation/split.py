"""Split an ImageSet into train, val and test: seeded, stratified, near-duplicates kept together."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seewhy.curation.near_duplicates import digests, exact_pairs, label_groups, link_equal
from seewhy.data.image_set import ImageSet, digest_of_lines
from seewhy.errors import SplitError

PARTS = ("train", "val", "test")
PROTOCOLS = ("ratio", "caltech30")
TRAIN = PARTS.index("train")
NO_PART = len(PARTS)  # of an image that lies in no part's folder
CALTECH30_TRAIN = 30  # images a class, CALTECH30_VAL of which are used for validation
CALTECH30_VAL = 3

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Split:
    """The images of each part.

    protocol: 'ratio', 'caltech30', or 'folders' if the dataset came divided.
    train, val, test: int64 indices into the ImageSet, sorted, disjoint.
    groups: (N,) group number of each image; each group lies in one part, except in the classes of `split_groups_in`.
    split_groups_in: classes with too few groups for one in each part; only their exact duplicates are kept together.
    """

    protocol: str
    seed: int
    train: Indices
    val: Indices
    test: Indices
    groups: Indices
    split_groups_in: tuple[str, ...] = ()

    def part(self, name: str) -> Indices:
        """Indices of 'train', 'val' or 'test'."""
        if name not in PARTS:
            raise SplitError(f"unknown part {name!r}; use one of {', '.join(PARTS)}")
        indices: Indices = getattr(self, name)
        return indices

    def write(self, file: Path, images: ImageSet) -> None:
        """Write `split.json`: the split by image hash, independent of paths and order."""
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
        return sorted(images.hashes[i] for i in self.part(name))

    def _groups_by_hash(self, images: ImageSet) -> list[list[str]]:
        """The groups of at least two different images, each sorted, ordered by their first hash."""
        groups: dict[int, set[str]] = {}
        for i in np.flatnonzero(np.bincount(self.groups)[self.groups] > 1).tolist():
            groups.setdefault(int(self.groups[i]), set()).add(images.hashes[i])
        return sorted(sorted(group) for group in groups.values() if len(group) > 1)

    def hash(self, images: ImageSet) -> str:
        """sha256 over the image hashes of each part."""
        return digest_of_lines(f"{name} {sha256}" for name in sorted(PARTS) for sha256 in self._hashes(images, name))


def leaked_images(split: Split, groups: Indices) -> Indices:
    """Test images that share a group with a training image, as parts given by folders or split groups allow."""
    return split.test[np.isin(groups[split.test], groups[split.train])]


def split_images(
    images: ImageSet,
    protocol: str = "ratio",
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    groups: Indices | None = None,
    allow_split_groups: bool = True,
) -> Split:
    """Split each class at random, whole groups at a time.

    protocol: 'ratio' takes `test_fraction` and `val_fraction` of each class, the rest is for training; 'caltech30' takes 27 train and
    3 val images of each class, the rest is for testing. Parts given by folders are kept; missing ones are taken from train.
    groups: (N,) group number of each image; exact duplicates are always kept together. A group of several classes counts as one of its
    most frequent class.
    allow_split_groups: for a class with too few groups, or one group with over half of its images, keep only exact duplicates together
    and name the class in `split_groups_in`; else raise SplitError, which suits groups that the user named.

    Raises SplitError for an unknown protocol, and for a class with too few different images.
    """
    if protocol not in PROTOCOLS:
        raise SplitError(f"unknown protocol {protocol!r}; use one of {', '.join(PROTOCOLS)}")
    rng = np.random.default_rng(seed)
    folder_parts = np.array([PARTS.index(part) if part else NO_PART for part in images.parts], dtype=np.uint8)
    given = {PARTS[part] for part in np.unique(folder_parts).tolist() if part < NO_PART}
    duplicates = exact_pairs(images)
    exact = joined = label_groups(len(images), duplicates)
    if groups is not None:
        if given:  # a group that folders divide becomes one group a part; `leaked_images` counts its test images
            groups = groups * len(PARTS) + folder_parts
        joined = label_groups(len(images), np.concatenate([duplicates, link_equal(groups)]))
    joined, split_groups_in = _ungroup_small_classes(images, joined, exact, folder_parts if given else None)
    if split_groups_in and not allow_split_groups:
        raise SplitError(
            f"class {split_groups_in[0]!r} has too few groups, or one with over half of its images, to keep groups in one part each; "
            "add images of other groups, merge classes, or use --group-by duplicates or exact"
        )
    table = _group_table(images, joined)
    part_of = np.empty(len(table.sizes), dtype=np.uint8)  # of each group, as an index into PARTS
    for name, pool in zip(images.classes, table.by_class(), strict=True):
        rng.shuffle(pool)
        if given:
            part_of[pool] = _given_parts(images, folder_parts, table, pool)
            if missing := sorted(part for part in given if not np.any(part_of[pool] == PARTS.index(part))):
                raise SplitError(f"class {name!r} has no image in the {missing[0]} folder; add some, or remove the class from the others")
            pool = pool[part_of[pool] == TRAIN]
        n = int(table.sizes[pool].sum())
        if protocol == "caltech30" and not given:
            targets = {"val": CALTECH30_VAL, "train": CALTECH30_TRAIN - CALTECH30_VAL, "test": n - CALTECH30_TRAIN}
        else:
            targets = {"test": max(1, round(n * test_fraction)), "val": max(1, round(n * val_fraction))}
            targets["train"] = n - sum(targets.values())
            targets["train"] += sum(targets.pop(part) for part in ("val", "test") if part in given)
        _check_enough(name, len(pool), targets, protocol if not given else "folders")
        part_of[pool] = _assign_parts(table.sizes[pool], targets)
    parts = np.empty(len(images), dtype=np.uint8)
    parts[table.members] = np.repeat(part_of, table.sizes)
    train, val, test = (np.flatnonzero(parts == part) for part in range(len(PARTS)))
    return Split("folders" if given else protocol, seed, train, val, test, joined, split_groups_in)


@dataclass(frozen=True, eq=False)
class _GroupTable:
    """G groups of N images, ordered by the content of their first image, so that the split depends on neither paths nor file order.

    members: (N,) images, group by group, ascending in each. starts, sizes: (G,) each group's slice of `members`.
    labels: (G,) the most frequent class of each group. classes: how many there are.
    """

    members: Indices
    starts: Indices
    sizes: Indices
    labels: Indices
    classes: int

    def of(self, group: int) -> Indices:
        """The images of a group, ascending."""
        return self.members[self.starts[group] :][: self.sizes[group]]

    def first_of(self, groups: Indices) -> Indices:
        """The smallest image of each group."""
        first: Indices = self.members[self.starts[groups]]
        return first

    def by_class(self) -> list[Indices]:
        """The groups of each class."""
        order = np.argsort(self.labels, kind="stable")
        return np.split(order, np.searchsorted(self.labels[order], np.arange(1, self.classes)))


def _group_table(images: ImageSet, joined: Indices) -> _GroupTable:
    """Tabulate groups; joined: (N,) the smallest image of each image's group."""
    rank = np.empty(len(images), dtype=np.int64)
    rank[np.argsort(digests(images.hashes), kind="stable")] = np.arange(len(images))
    first = np.full(len(images), len(images))
    np.minimum.at(first, joined, rank)
    first = first[joined]
    members = np.argsort(first, kind="stable")
    starts = np.flatnonzero(np.diff(first[members], prepend=-1))
    sizes = np.diff(starts, append=len(members))
    labels = images.labels[members[starts]]
    table = _GroupTable(members, starts, sizes, labels, len(images.classes))
    for group in np.flatnonzero(sizes > 1).tolist():
        labels[group] = np.bincount(images.labels[table.of(group)]).argmax()
    return table


def _ungroup_small_classes(
    images: ImageSet, joined: Indices, exact: Indices, folder_parts: npt.NDArray[np.uint8] | None
) -> tuple[Indices, tuple[str, ...]]:
    """Reduce groups to exact duplicates in classes with too few groups for one in each part, or one with over half of the images.

    joined, exact: (N,) the smallest image of each image's group. Returns such groups, and the names of the classes.
    """
    parts = len(PARTS) if folder_parts is None else 1 + sum(not np.any(folder_parts == PARTS.index(part)) for part in ("val", "test"))
    ungrouped: set[int] = set()
    while True:
        table = _group_table(images, joined)
        pools = table.by_class()
        if folder_parts is not None:
            pools = [pool[folder_parts[table.first_of(pool)] == TRAIN] for pool in pools]
        more = {
            label
            for label, pool in enumerate(pools)
            if label not in ungrouped
            # The pool is empty if all images of the class lie in groups of other classes.
            and (len(pool) < parts or (table.sizes[pool].max() > 1 and 2 * table.sizes[pool].max() > table.sizes[pool].sum()))
            and np.any(np.isin(joined, joined[images.labels == label]) & (joined != exact))
        }
        if not more:
            return joined, tuple(images.classes[label] for label in sorted(ungrouped))
        ungrouped |= more
        loose = np.isin(images.labels, sorted(ungrouped))
        loose |= np.isin(joined, joined[loose])  # whole groups, other classes included
        joined = np.where(loose, exact, joined)


def _given_parts(images: ImageSet, folder_parts: npt.NDArray[np.uint8], table: _GroupTable, groups: Indices) -> npt.NDArray[np.uint8]:
    """(G,) the part whose folder each group lies in, as an index into PARTS; SplitError if it lies in several."""
    for group in groups[table.sizes[groups] > 1].tolist():
        parts = {PARTS[part] for part in folder_parts[table.of(group)].tolist()}
        if len(parts) > 1:
            shown = ", ".join(str(images.paths[i]) for i in table.of(group)[:3])
            raise SplitError(f"the same image lies in {' and '.join(sorted(parts))} ({shown}); remove all but one")
    given: npt.NDArray[np.uint8] = folder_parts[table.first_of(groups)]
    return given


def _check_enough(name: str, groups: int, targets: dict[str, int], protocol: str) -> None:
    """Raise SplitError unless each part gets an image. groups: of the class; duplicates count once."""
    if groups >= len(targets) and min(targets.values()) >= 1:
        return
    noun = "image" if groups == 1 else "different images"
    if protocol == "caltech30":
        raise SplitError(f"class {name!r} has {groups} {noun}; caltech30 needs at least {CALTECH30_TRAIN + 1}: use --protocol ratio")
    raise SplitError(
        f"class {name!r} has {groups} {noun}, too few for one in each of {', '.join(p for p in PARTS if p in targets)}; "
        f"add images (at least {len(targets)}) or remove the class"
    )


def _assign_parts(sizes: Indices, targets: dict[str, int]) -> npt.NDArray[np.uint8]:
    """(G,) images of each group, and how many each part should get -> (G,) part of each group, as an index into PARTS.

    First each part gets one group: the next that fits, or the smallest. Then each group goes to the first of test, val and train that
    has room for it, else to train. Groups are not sorted by size, so each part gets its share of large and small ones.
    """
    order = sorted(targets, key=PARTS.index, reverse=True)  # test, val, train
    room = dict(targets)
    parts = np.zeros(len(sizes), dtype=np.uint8)
    queue = np.arange(len(sizes))
    for part in order:
        fitting = np.flatnonzero(sizes[queue] <= room[part])
        position = fitting[0] if len(fitting) else sizes[queue].argmin()
        parts[queue[position]] = PARTS.index(part)
        room[part] -= int(sizes[queue[position]])
        queue = np.delete(queue, position)
    for group, size in zip(queue, sizes[queue].tolist(), strict=True):
        part = next((p for p in order if room[p] >= size), order[-1])
        parts[group] = PARTS.index(part)
        room[part] -= size
    return parts


def read_split(path: Path, images: ImageSet) -> Split:
    """Apply the split of a run folder or `split.json` to `images`, matched by content.

    Raises SplitError if the file is missing or damaged, an image is in none of its parts, or a part is left empty.
    """
    file = path / "split.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        part_of = {sha256: part for part, name in enumerate(PARTS) for sha256 in record[name]}
        group_of = {sha256: number for number, group in enumerate(record["groups"]) for sha256 in group}
        protocol, seed, split_groups_in = str(record["protocol"]), int(record["seed"]), tuple(map(str, record["split_groups_in"]))
    except FileNotFoundError as error:
        raise SplitError(f"{file}: no such split; pass a run folder or a split.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SplitError(f"{file}: not a split ({error}); pass a run folder or a split.json") from error
    parts = np.array([part_of.get(sha256, NO_PART) for sha256 in images.hashes])
    unknown = np.flatnonzero(parts == NO_PART)
    if len(unknown):
        raise SplitError(
            f"{file}: {len(unknown)} of {len(images)} images are not in this split, for example {images.paths[unknown[0]]}; "
            "use the data it was made for, or leave out --split-from"
        )
    train, val, test = (np.flatnonzero(parts == part) for part in range(len(PARTS)))
    for name, indices in zip(PARTS, (train, val, test), strict=True):
        if not len(indices):
            raise SplitError(f"{file}: no image of its {name} part is in the data; leave out --split-from")
    groups = np.array([group_of.get(sha256, -1) for sha256 in images.hashes])
    grouped = np.flatnonzero(groups >= 0)
    pairs = np.concatenate([exact_pairs(images), grouped[link_equal(groups[grouped])]])
    return Split(protocol, seed, train, val, test, label_groups(len(images), pairs), split_groups_in)
