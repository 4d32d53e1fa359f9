"""ImageSet -> Split: seeded, stratified by class, pictures of a group kept in one part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from seewhy.duplicates import chain, exact_pairs, group_numbers
from seewhy.errors import SplitError
from seewhy.images import ImageSet

PARTS = ("train", "val", "test")
CALTECH30_TRAIN = 30  # pictures a class of the protocol; 3 of them are kept for validation
CALTECH30_VAL = 3


@dataclass(frozen=True)
class Split:
    """Which picture is used for what.

    protocol: how it was made ('ratio', 'caltech30', 'folders', or 'file').
    train, val, test: int64 indices into the ImageSet, sorted, disjoint.
    groups: (N,) a number a group of the ImageSet's pictures; no group lies in two parts but those of the classes in `torn`.
    torn: classes with too few groups to have one in each part; only their exact duplicates were kept together.
    """

    protocol: str
    seed: int
    train: npt.NDArray[np.int64]
    val: npt.NDArray[np.int64]
    test: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64]
    torn: tuple[str, ...] = ()

    def part(self, name: str) -> npt.NDArray[np.int64]:
        """Indices of 'train', 'val' or 'test'."""
        if name not in PARTS:
            raise SplitError(f"unknown part {name!r}; use one of {', '.join(PARTS)}")
        indices: npt.NDArray[np.int64] = getattr(self, name)
        return indices

    def record(self, images: ImageSet) -> dict[str, Any]:
        """The split by picture hash, as `split.json` holds it; independent of paths and order."""
        return {
            "protocol": self.protocol,
            "seed": self.seed,
            "hash": self.hash(images),
            "groups": self._groups_by_hash(images),
            "torn": list(self.torn),
            **{name: sorted(images.hashes[i] for i in self.part(name)) for name in PARTS},
        }

    def _groups_by_hash(self, images: ImageSet) -> list[list[str]]:
        """The groups of more than one picture content, each sorted."""
        members: dict[int, set[str]] = {}
        for group, sha256 in zip(self.groups.tolist(), images.hashes, strict=True):
            members.setdefault(group, set()).add(sha256)
        return sorted(sorted(hashes) for hashes in members.values() if len(hashes) > 1)

    def hash(self, images: ImageSet) -> str:
        """sha256 over which picture is in which part."""
        lines = sorted(f"{name} {images.hashes[i]}" for name in PARTS for i in self.part(name))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def leaked_pictures(split: Split, groups: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Test pictures that share a group with a training picture: what parts given by folders, or torn classes, let through."""
    return split.test[np.isin(groups[split.test], groups[split.train])]


def split_images(
    images: ImageSet,
    protocol: str = "ratio",
    seed: int = 0,
    val_fraction: float = 0.1,
    test_fraction: float = 0.2,
    groups: npt.NDArray[np.int64] | None = None,
    tear: bool = True,
) -> Split:
    """Divides each class at random, whole groups at a time.

    groups: (N,) a number a group of pictures that show the same; exact duplicates belong together in any case. None: these alone.
    A group of several classes is dealt with the one that most of it belongs to.
    tear: what to do with a class of too few groups, or with one that holds over half of it: divide it all the same, keeping equal files
    alone together (and name it in `torn`), or raise SplitError, which is right where groups were named and not guessed.

    ratio: `test_fraction` and `val_fraction` of each class, the rest to train.
    caltech30: 27 train + 3 val pictures of each class, the rest test.
    Parts that the folders already give are kept; missing ones are cut out of train.
    Raises SplitError where a class has too few different pictures.
    """
    rng = np.random.default_rng(seed)
    given = {part for part in images.parts if part}
    exact = group_numbers(len(images), exact_pairs(images))
    joined = exact
    if groups is not None:
        if given:  # what the folders divide stays divided; `leaked_pictures` counts what that lets through
            groups = groups * len(PARTS) + np.array([PARTS.index(part) for part in images.parts])
        joined = group_numbers(len(images), np.concatenate([exact_pairs(images), chain(groups)]))
    joined, torn = _torn_apart(images, joined, exact, given)
    if torn and not tear:
        raise SplitError(
            f"class {torn[0]!r} has too few groups, or one with over half of its pictures, to keep groups in one part each; "
            "add pictures of other groups, merge classes, or use --group-by duplicates or exact"
        )
    assigned: dict[str, list[int]] = {name: [] for name in PARTS}
    for label, class_groups in enumerate(_groups_by_class(images, joined, rng)):
        name = images.classes[label]
        if given:
            wanted = _divide_given(images, name, class_groups, given, val_fraction, test_fraction, assigned)
        elif protocol == "caltech30":
            wanted = {"val": CALTECH30_VAL, "train": CALTECH30_TRAIN - CALTECH30_VAL, "test": _size(class_groups) - CALTECH30_TRAIN}
        else:
            wanted = _ratio_sizes(_size(class_groups), val_fraction, test_fraction)
        pool = [g for g in class_groups if images.parts[g[0]] == "train"] if given else class_groups
        _check_enough(name, pool, wanted, protocol if not given else "folders")
        _deal(pool, wanted, assigned)
    train, val, test = (np.array(sorted(assigned[name]), dtype=np.int64) for name in PARTS)
    return Split("folders" if given else protocol, seed, train, val, test, joined, torn)


def _torn_apart(
    images: ImageSet, joined: npt.NDArray[np.int64], exact: npt.NDArray[np.int64], given: set[str]
) -> tuple[npt.NDArray[np.int64], tuple[str, ...]]:
    """Groups, but only exact duplicates where a class has too few to deal one to each part, or one that holds over half of it."""
    parts = 1 + sum(part not in given for part in ("val", "test")) if given else len(PARTS)
    torn: set[int] = set()
    while True:
        dealt = _groups_by_class(images, joined, None)
        pools = [[g for g in groups if not given or images.parts[g[0]] == "train"] for groups in dealt]
        more = {
            label
            for label, pool in enumerate(pools)
            if label not in torn
            # A class whose pictures all lie in groups of other classes is starved by them.
            and (len(pool) < parts or (max(map(len, pool)) > 1 and 2 * max(map(len, pool)) > _size(pool)))
            and np.any(np.isin(joined, joined[images.labels == label]) & (joined != exact))
        }
        if not more:
            return joined, tuple(images.classes[label] for label in sorted(torn))
        torn |= more
        loose = np.isin(images.labels, sorted(torn))
        loose |= np.isin(joined, joined[loose])  # half a group would be no group
        joined = np.where(loose, exact, joined)


def _size(groups: Sequence[list[int]]) -> int:
    return sum(len(group) for group in groups)


def _groups_by_class(images: ImageSet, joined: npt.NDArray[np.int64], rng: np.random.Generator | None) -> list[list[list[int]]]:
    """For each class its groups, shuffled by `rng`. A group of several classes is dealt with the commonest of them."""
    members: dict[int, list[int]] = {}
    for i in sorted(range(len(images)), key=lambda i: images.hashes[i]):  # by content, so that neither paths nor file order decide
        members.setdefault(int(joined[i]), []).append(i)
    groups: list[list[list[int]]] = [[] for _ in images.classes]
    for group in members.values():
        groups[int(np.bincount(images.labels[group]).argmax())].append(sorted(group))
    if rng is not None:
        for class_groups in groups:
            rng.shuffle(class_groups)
    return groups


def _ratio_sizes(n: int, val_fraction: float, test_fraction: float) -> dict[str, int]:
    test = max(1, round(n * test_fraction))
    val = max(1, round(n * val_fraction))
    return {"test": test, "val": val, "train": n - test - val}


def _divide_given(
    images: ImageSet,
    name: str,
    class_groups: list[list[int]],
    given: set[str],
    val_fraction: float,
    test_fraction: float,
    assigned: dict[str, list[int]],
) -> dict[str, int]:
    """Takes over the given val and test; how many of the train folder go where is returned."""
    for group in class_groups:
        found = {images.parts[i] for i in group}
        if len(found) > 1:
            where = ", ".join(str(images.paths[i]) for i in group[:3])
            raise SplitError(f"the same picture lies in {' and '.join(sorted(found))} ({where}); remove all but one")
        if found != {"train"}:
            assigned[found.pop()] += group
    missing = sorted(given - {images.parts[group[0]] for group in class_groups})
    if missing:
        raise SplitError(f"class {name!r} has no picture in the {missing[0]} folder; add some, or remove the class from the others")
    n = _size([g for g in class_groups if images.parts[g[0]] == "train"])
    wanted = _ratio_sizes(n, val_fraction, test_fraction)
    for part in ("val", "test"):
        if part in given:
            wanted["train"] += wanted.pop(part)
    return wanted


def _check_enough(name: str, groups: Sequence[list[int]], wanted: dict[str, int], protocol: str) -> None:
    """At least one picture in each part, counting duplicates once."""
    if len(groups) >= len(wanted) and min(wanted.values()) >= 1:
        return
    n = len(groups)
    noun = "picture" if n == 1 else "different pictures"
    if protocol == "caltech30":
        raise SplitError(f"class {name!r} has {n} {noun}; caltech30 needs at least {CALTECH30_TRAIN + 1}: use --protocol ratio")
    raise SplitError(
        f"class {name!r} has {n} {noun}, too few for one in each of {', '.join(p for p in PARTS if p in wanted)}; "
        f"add pictures (at least {len(wanted)}) or remove the class"
    )


def _deal(groups: Sequence[list[int]], wanted: dict[str, int], assigned: dict[str, list[int]]) -> None:
    """Whole groups to the first part that has room for them (test, val, train); train takes what is over.

    In the order they come, large or small, so that each part has its share of either; but every part gets a group before any gets
    a second one, and the smallest ones serve for that.
    """
    order = sorted(wanted, key=lambda part: PARTS.index(part), reverse=True)  # test, val, train
    left = dict(wanted)
    queue = list(groups)
    for part in order:
        fitting = [n for n, group in enumerate(queue) if len(group) <= left[part]]
        group = queue.pop(fitting[0] if fitting else min(range(len(queue)), key=lambda n: len(queue[n])))
        assigned[part] += group
        left[part] -= len(group)
    for group in queue:
        part = next((p for p in order if left[p] >= len(group)), order[-1])
        assigned[part] += group
        left[part] -= len(group)


def read_split(path: Path, images: ImageSet) -> Split:
    """The split of a run folder or `split.json`, applied to these pictures by their content.

    Raises SplitError if a picture is in none of its parts, or a part is left empty.
    """
    file = path / "split.json" if path.is_dir() else path
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        part_of = {sha256: name for name in PARTS for sha256 in record[name]}
        protocol, seed = str(record["protocol"]), int(record["seed"])
        torn = tuple(str(name) for name in record.get("torn", []))
        group_of = {sha256: number for number, group in enumerate(record.get("groups", [])) for sha256 in group}
    except FileNotFoundError as error:
        raise SplitError(f"{file}: no such split; pass a run folder or a split.json") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SplitError(f"{file}: not a split ({error}); pass a run folder or a split.json") from error
    unknown = [i for i, sha256 in enumerate(images.hashes) if sha256 not in part_of]
    if unknown:
        raise SplitError(
            f"{file}: {len(unknown)} of {len(images)} pictures are not in this split, {images.paths[unknown[0]]} for one; "
            "use the data it was made for, or leave out --split-from"
        )
    indices = {name: [i for i, sha256 in enumerate(images.hashes) if part_of[sha256] == name] for name in PARTS}
    for name, members in indices.items():
        if not members:
            raise SplitError(f"{file}: no picture of its {name} part is in the data; leave out --split-from")
    train, val, test = (np.array(indices[name], dtype=np.int64) for name in PARTS)
    names = [group_of.get(sha256, sha256) for sha256 in images.hashes]
    return Split(protocol, seed, train, val, test, group_numbers(len(images), chain([str(name) for name in names])), torn)
