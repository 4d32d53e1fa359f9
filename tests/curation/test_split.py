"""Splits: sizes worked by hand, seeded and stratified, equal images together, kept and read back by content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seewhy.curation.split import PARTS, Split, leaked_images, read_split, split_images
from seewhy.data.image_set import ImageSet
from seewhy.errors import SplitError


def image_set(rows: Sequence[tuple[str, str, str]]) -> ImageSet:
    """(class, content, part) of each image -> an ImageSet whose files do not exist."""
    classes = tuple(sorted({name for name, _, _ in rows}))
    return ImageSet(
        name="fake",
        root=Path("/fake"),
        paths=tuple(Path(f"/fake/{part}/{name}/{i}.jpg") for i, (name, _, part) in enumerate(rows)),
        labels=np.array([classes.index(name) for name, _, _ in rows], dtype=np.int64),
        classes=classes,
        hashes=tuple(hashlib.sha256(content.encode()).hexdigest() for _, content, _ in rows),
        phashes=np.zeros(len(rows), dtype=np.uint64),
        sizes=np.full((len(rows), 2), 64),
        grey=np.zeros(len(rows), dtype=bool),
        parts=tuple(part for _, _, part in rows),
        masks=(None,) * len(rows),
    )


def plain(sizes: dict[str, int], part: str = "") -> list[tuple[str, str, str]]:
    return [(name, f"{name}-{part}-{n}", part) for name, count in sizes.items() for n in range(count)]


def counts(split: Split, images: ImageSet) -> dict[str, list[int]]:
    """Part -> images of each class in it."""
    return {name: np.bincount(images.labels[split.part(name)], minlength=len(images.classes)).tolist() for name in PARTS}


def hashes_of(split: Split, images: ImageSet) -> dict[str, set[str]]:
    return {name: {images.hashes[i] for i in split.part(name)} for name in PARTS}


@pytest.mark.parametrize(
    ("size", "train", "val", "test"),
    [(10, 7, 1, 2), (3, 1, 1, 1), (4, 2, 1, 1), (31, 22, 3, 6), (40, 28, 4, 8), (100, 70, 10, 20), (800, 560, 80, 160)],
)
def test_sizes_of_one_class_by_hand(size: int, train: int, val: int, test: int) -> None:
    images = image_set(plain({"a": size, "b": 10}))
    assert counts(split_images(images), images) == {"train": [train, 7], "val": [val, 1], "test": [test, 2]}


def test_other_fractions() -> None:
    images = image_set(plain({"a": 20}))
    assert counts(split_images(images, val_fraction=0.25, test_fraction=0.5), images) == {"train": [5], "val": [5], "test": [10]}


def test_every_image_once_and_sorted() -> None:
    images = image_set(plain({"a": 17, "b": 5, "c": 40}))
    split = split_images(images, seed=3)
    assert sorted([*split.train, *split.val, *split.test]) == list(range(62))
    assert all(np.all(np.diff(split.part(name)) > 0) and split.part(name).dtype == np.int64 for name in PARTS)
    assert (split.protocol, split.seed) == ("ratio", 3)


def test_same_seed_same_split_other_seed_another() -> None:
    images = image_set(plain({"a": 30, "b": 30}))
    one, two, other = split_images(images, seed=5), split_images(images, seed=5), split_images(images, seed=6)
    assert [one.part(n).tolist() for n in PARTS] == [two.part(n).tolist() for n in PARTS]
    assert one.hash(images) == two.hash(images)
    assert one.test.tolist() != other.test.tolist()
    assert one.hash(images) != other.hash(images)


def test_split_is_at_random_and_not_by_file_order() -> None:
    images = image_set(plain({"a": 200, "b": 200}))
    assert 60 < split_images(images).test[:40].mean() < 140  # mean of the 40 test indices of class a: 99.5 +- 8.2


def test_independent_of_file_order() -> None:
    rows = [*plain({"a": 25, "b": 13}), ("a", "a--0", ""), ("b", "a--1", "")]
    images, turned = image_set(rows), image_set(rows[::-1])
    assert hashes_of(split_images(images, seed=2), images) == hashes_of(split_images(turned, seed=2), turned)
    assert split_images(images, seed=2).hash(images) == split_images(turned, seed=2).hash(turned)


@pytest.mark.parametrize("seed", range(5))
def test_equal_images_stay_in_one_part(seed: int) -> None:
    same = [("a", "twin", "")] * 3 + [("a", "shared", ""), ("b", "shared", ""), ("b", "double", ""), ("b", "double", "")]
    images = image_set([*plain({"a": 12, "b": 12}), *same])
    split = split_images(images, seed=seed)
    train, val, test = hashes_of(split, images).values()
    assert not train & val
    assert not train & test
    assert not val & test
    assert sorted([*split.train, *split.val, *split.test]) == list(range(31))
    assert all(min(row) >= 1 for row in counts(split, images).values())


@pytest.mark.parametrize("seed", range(6))
def test_twins_count_once_when_parts_are_filled(seed: int) -> None:
    """Three different images, one of them 8 times: one each to test and val, the rest to train."""
    images = image_set([("a", "x", ""), ("a", "y", "")] + [("a", "z", "")] * 8)
    split = split_images(images, seed=seed)
    assert [len(split.part(n)) for n in PARTS] == [8, 1, 1]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([("few", "x", ""), ("few", "y", "")], "2 different images"),
        ([("few", "x", "")], "1 image,"),
        ([("few", "x", ""), ("few", "y", "")] + [("few", "y", "")] * 20, "2 different images"),
    ],
)
def test_too_few_images_names_the_class(rows: list[tuple[str, str, str]], found: str) -> None:
    with pytest.raises(SplitError, match=f"^class 'few' has {found}.* too few for one in each of train, val, test; add"):
        split_images(image_set([*plain({"enough": 10}), *rows]))


def test_fractions_that_leave_a_small_class_without_training_images() -> None:
    images = image_set(plain({"a": 4}))
    with pytest.raises(SplitError, match="class 'a' has 4"):
        split_images(images, val_fraction=0.45, test_fraction=0.45)


def test_caltech30_is_27_3_and_the_rest() -> None:
    images = image_set(plain({"a": 31, "b": 60, "c": 800}))
    split = split_images(images, protocol="caltech30")
    assert counts(split, images) == {"train": [27, 27, 27], "val": [3, 3, 3], "test": [1, 30, 770]}
    assert split.protocol == "caltech30"


def test_caltech30_of_a_small_class_names_it_and_the_way_out() -> None:
    with pytest.raises(SplitError, match=r"^class 'b' has 30 different images; caltech30 needs at least 31: use --protocol ratio$"):
        split_images(image_set(plain({"a": 40, "b": 30})), protocol="caltech30")


def test_parts_of_the_folders_are_kept() -> None:
    images = image_set([*plain({"a": 6, "b": 4}, "train"), *plain({"a": 2, "b": 3}, "val"), *plain({"a": 5, "b": 1}, "test")])
    split = split_images(images, seed=9)
    assert split.protocol == "folders"
    assert split.train.tolist() == list(range(10))
    assert split.val.tolist() == list(range(10, 15))
    assert split.test.tolist() == list(range(15, 21))


def test_missing_val_is_cut_out_of_train() -> None:
    images = image_set([*plain({"a": 20, "b": 10}, "train"), *plain({"a": 7, "b": 8}, "test")])
    split = split_images(images)
    assert counts(split, images) == {"train": [18, 9], "val": [2, 1], "test": [7, 8]}
    assert all(images.parts[i] == "train" for i in [*split.train, *split.val])


def test_missing_test_is_cut_out_of_train() -> None:
    images = image_set([*plain({"a": 20}, "train"), *plain({"a": 3}, "val")])
    assert counts(split_images(images), images) == {"train": [16], "val": [3], "test": [4]}


def test_train_folder_alone_is_cut_in_three() -> None:
    images = image_set(plain({"a": 20, "b": 10}, "train"))
    assert counts(split_images(images), images) == {"train": [14, 7], "val": [2, 1], "test": [4, 2]}


def test_class_without_training_folder_is_named() -> None:
    rows = [*plain({"a": 5, "b": 5}, "train"), *plain({"a": 2, "b": 2, "only": 4}, "val"), *plain({"a": 2, "b": 2, "only": 4}, "test")]
    with pytest.raises(SplitError, match=r"^class 'only' has no image in the train folder"):
        split_images(image_set(rows))


def test_class_missing_from_a_given_part_is_named() -> None:
    rows = [*plain({"a": 5, "b": 5, "lost": 5}, "train"), *plain({"a": 2, "b": 2}, "test")]
    with pytest.raises(SplitError, match=r"^class 'lost' has no image in the test folder"):
        split_images(image_set(rows))


def test_same_image_in_two_given_parts_is_an_error_that_names_the_files() -> None:
    rows = [*plain({"a": 5, "b": 5}, "train"), *plain({"a": 5, "b": 5}, "test"), ("a", "a-train-0", "test")]
    with pytest.raises(SplitError, match=r"same image lies in test and train \(/fake/train/a/0\.jpg, /fake/test/a/20\.jpg\); remove"):
        split_images(image_set(rows))


def test_same_image_of_two_classes_in_two_given_parts_is_an_error_too() -> None:
    rows = [*plain({"a": 5, "b": 5}, "train"), *plain({"a": 5, "b": 5}, "val"), ("b", "a-train-0", "val")]
    with pytest.raises(SplitError, match="same image lies in train and val"):
        split_images(image_set(rows))


def test_unknown_part_is_named() -> None:
    split = split_images(image_set(plain({"a": 10})))
    with pytest.raises(SplitError, match="unknown part 'dev'; use one of train, val, test"):
        split.part("dev")


# ---------------------------------------------------------------- split.json


def save(split: Split, images: ImageSet, folder: Path) -> Path:
    split.write(folder / "split.json", images)
    return folder / "split.json"


def test_split_json_round_trip_from_file_and_from_run_folder(tmp_path: Path) -> None:
    images = image_set([*plain({"a": 12, "b": 15}), ("a", "a--1", "")])
    split = split_images(images, seed=4)
    file = save(split, images, tmp_path)
    for place in (file, tmp_path):
        again = read_split(place, images)
        assert [again.part(n).tolist() for n in PARTS] == [split.part(n).tolist() for n in PARTS]
        assert (again.protocol, again.seed) == ("ratio", 4)
        assert again.hash(images) == split.hash(images)


def test_split_json_goes_by_content_and_not_by_path_or_order(tmp_path: Path) -> None:
    rows = plain({"a": 12, "b": 15})
    images, turned = image_set(rows), image_set(rows[::-1])
    split = split_images(images)
    again = read_split(save(split, images, tmp_path), turned)
    assert hashes_of(again, turned) == hashes_of(split, images)
    assert again.test.tolist() == sorted(26 - split.test)


def test_split_of_a_subset_of_the_images(tmp_path: Path) -> None:
    rows = plain({"a": 10, "b": 10})
    images = image_set(rows)
    split = split_images(images)
    fewer = image_set([row for i, row in enumerate(rows) if i != split.train[0]])
    assert len(read_split(save(split, images, tmp_path), fewer).train) == 13


def test_images_that_are_in_no_part_are_counted_and_one_is_named(tmp_path: Path) -> None:
    images = image_set(plain({"a": 10, "b": 10}))
    file = save(split_images(images), images, tmp_path)
    more = image_set([*plain({"a": 10, "b": 10}), ("b", "new-1", ""), ("b", "new-2", "")])
    with pytest.raises(SplitError, match=r"2 of 22 images are not in this split, for example /fake//?b/20\.jpg; use the data"):
        read_split(file, more)


def test_data_without_any_image_of_a_part(tmp_path: Path) -> None:
    rows = plain({"a": 10, "b": 10})
    images = image_set(rows)
    split = split_images(images)
    file = save(split, images, tmp_path)
    with pytest.raises(SplitError, match="no image of its val part is in the data"):
        read_split(file, image_set([row for i, row in enumerate(rows) if i not in split.val]))


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"train": [], "val": [], "test": []}',
        '{"protocol": "ratio", "seed": 0, "train": 1, "val": [], "test": []}',
    ],
)
def test_damaged_split_file_is_one_line(tmp_path: Path, content: str) -> None:
    file = tmp_path / "split.json"
    file.write_text(content)
    with pytest.raises(SplitError) as caught:
        read_split(file, image_set(plain({"a": 10})))
    assert str(caught.value).startswith(f"{file}: not a split (")
    assert "\n" not in str(caught.value)


def test_binary_and_missing_split_files(tmp_path: Path) -> None:
    images = image_set(plain({"a": 10}))
    (tmp_path / "weights.json").write_bytes(b"\x80\x02\xff")
    with pytest.raises(SplitError, match="not a split"):
        read_split(tmp_path / "weights.json", images)
    with pytest.raises(SplitError, match="no such split"):
        read_split(tmp_path / "absent.json", images)
    with pytest.raises(SplitError, match=r"split\.json: no such split"):
        read_split(tmp_path, images)


def test_split_json_names_parts_and_groups_by_sorted_hashes(tmp_path: Path) -> None:
    images = image_set([*plain({"a": 12, "ü": 15}), ("ü", "a--1", "")])
    groups = np.arange(28) // 2
    groups[:10] = 0  # most of a: torn
    split = split_images(images, groups=groups)
    text = save(split, images, tmp_path).read_text()
    record = json.loads(text)
    assert text == json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    assert (record["protocol"], record["seed"], record["hash"]) == ("ratio", 0, split.hash(images))
    assert {name: record[name] for name in PARTS} == {name: sorted(images.hashes[i] for i in split.part(name)) for name in PARTS}
    joined = [{images.hashes[i] for i in np.flatnonzero(split.groups == number)} for number in np.unique(split.groups)]
    assert record["groups"] == sorted(sorted(group) for group in joined if len(group) > 1)
    assert len(record["groups"]) > 3
    assert record["split_groups_in"] == list(split.split_groups_in) == ["a"]


def test_a_hash_that_a_file_names_twice_counts_where_it_stands_last(tmp_path: Path) -> None:
    images = image_set(plain({"a": 10, "b": 10}))
    record = json.loads(save(split_images(images), images, tmp_path).read_text())
    moved = record["train"][0]
    (tmp_path / "split.json").write_text(json.dumps({**record, "test": [*record["test"], moved]}))
    found = read_split(tmp_path, images)
    assert moved in hashes_of(found, images)["test"]
    assert len(found.train) == len(record["train"]) - 1


# ---------------------------------------------------------------- the same draws for ever


def dealt_by_lists(images: ImageSet, seed: int, groups: np.ndarray) -> dict[str, list[int]]:
    """How a ratio of 70, 10 and 20% was dealt from the beginning, with lists; no class is torn, no part given."""
    members: dict[int, list[int]] = {}
    for i in sorted(range(len(images)), key=lambda i: images.hashes[i]):
        members.setdefault(int(groups[i]), []).append(i)
    by_class: list[list[list[int]]] = [[] for _ in images.classes]
    for group in members.values():
        by_class[int(np.bincount(images.labels[group]).argmax())].append(sorted(group))
    rng = np.random.default_rng(seed)
    for class_groups in by_class:
        rng.shuffle(class_groups)
    assigned: dict[str, list[int]] = {name: [] for name in PARTS}
    for queue in by_class:
        n = sum(map(len, queue))
        left = {"test": max(1, round(n * 0.2)), "val": max(1, round(n * 0.1))}
        left["train"] = n - left["test"] - left["val"]
        for part in left:
            fitting = [place for place, group in enumerate(queue) if len(group) <= left[part]]
            group = queue.pop(fitting[0] if fitting else min(range(len(queue)), key=lambda place: len(queue[place])))
            assigned[part] += group
            left[part] -= len(group)
        for group in queue:
            part = next((part for part in left if left[part] >= len(group)), "train")
            assigned[part] += group
            left[part] -= len(group)
    return {name: sorted(indices) for name, indices in assigned.items()}


@settings(max_examples=100, deadline=None)
@given(sizes=st.lists(st.integers(6, 40), min_size=1, max_size=4), seed=st.integers(0, 2**32 - 1), width=st.integers(1, 4))
def test_arrays_are_dealt_as_lists_were(sizes: list[int], seed: int, width: int) -> None:
    images = image_set(plain({f"c{n}": size for n, size in enumerate(sizes)}))
    groups = np.random.default_rng(seed).integers(0, max(1, len(images) // width), len(images))
    split = split_images(images, seed=seed, groups=groups)
    assert {name: split.part(name).tolist() for name in PARTS} == dealt_by_lists(images, seed, split.groups)


def test_the_split_of_a_seed_is_the_one_it_always_was() -> None:
    """Runs are compared and repeated by it."""
    images = image_set([*plain({"a": 40, "b": 25}), ("b", "a--1", ""), ("a", "b--3", "")])
    groups = np.arange(67) // 2
    assert split_images(images).hash(images) == "b3cc5d94dac1f0b314c8bb8ef9cfb673fd1c1950ef4f8ecd2e9a4c10a51bbec6"
    assert split_images(images, seed=7, groups=groups).hash(images) == "46d3bfab74b0c410fc7f8acc8f45945b9a7098afdb40a6ea8a8430ecdb696694"
    assert images.content_hash == "a3ec80cdfa1a76a6af84d1aa08b6eee299b39782487efb9270c32836f5691009"


# ---------------------------------------------------------------- any data


@settings(max_examples=150, deadline=None)
@given(
    sizes=st.lists(st.integers(3, 40), min_size=1, max_size=4),
    repeats=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 3)), max_size=12),
    seed=st.integers(0, 2**32 - 1),
    val_fraction=st.sampled_from([0.05, 0.1, 0.2]),
    test_fraction=st.sampled_from([0.1, 0.2, 0.3]),
)
def test_any_data(sizes: list[int], repeats: list[tuple[int, int]], seed: int, val_fraction: float, test_fraction: float) -> None:
    """Disjoint and complete, equal images together, every class everywhere; within one image of the shares without duplicates."""
    rows = plain({f"c{n}": size for n, size in enumerate(sizes)})
    for source, target in repeats:  # a copy of some image in some class
        rows.append((f"c{target % len(sizes)}", rows[source % len(rows)][1], ""))
    images = image_set(rows)
    try:
        split = split_images(images, seed=seed, val_fraction=val_fraction, test_fraction=test_fraction)
    except SplitError:
        # Only where fewer than three images are left to a class: one with copies elsewhere goes to the class that has most of them.
        hashes, labels = np.array(images.hashes), images.labels
        owners = [int(np.bincount(labels[hashes == h]).argmax()) for h in set(images.hashes)]
        assert min(owners.count(c) for c in range(len(sizes))) < 3
        return
    assert sorted([*split.train, *split.val, *split.test]) == list(range(len(rows)))
    train, val, test = hashes_of(split, images).values()
    assert len(train) + len(val) + len(test) == len(train | val | test)
    found = counts(split, images)
    assert all(min(row) >= 1 for row in found.values())
    if not repeats:
        for c, size in enumerate(sizes):
            assert abs(found["test"][c] - test_fraction * size) <= 1
            assert abs(found["val"][c] - val_fraction * size) <= 1
            assert found["train"][c] == size - found["val"][c] - found["test"][c]


# ---------------------------------------------------------------- groups


def straddling(split: Split, groups: np.ndarray) -> int:
    """How many groups have images in more than one part."""
    parts = [set(groups[split.part(name)].tolist()) for name in PARTS]
    return len((parts[0] & parts[1]) | (parts[0] & parts[2]) | (parts[1] & parts[2]))


@pytest.mark.parametrize("seed", range(5))
def test_groups_stay_in_one_part_and_parts_keep_their_sizes(seed: int) -> None:
    images = image_set(plain({"a": 200, "b": 100}))
    groups = np.random.default_rng(seed).integers(0, 120, 200).tolist() + [1000 + n for n in range(100)]
    split = split_images(images, seed=seed, groups=np.array(groups))
    assert straddling(split, np.array(groups)) == 0
    found = counts(split, images)
    assert abs(found["test"][0] - 40) <= 2
    assert abs(found["val"][0] - 20) <= 2
    assert (found["test"][1], found["val"][1]) == (20, 10)
    assert split.split_groups_in == ()
    assert straddling(split_images(images, seed=seed), np.array(groups)) > 0  # what a plain split would leak


def test_large_and_small_groups_have_their_share_of_every_part() -> None:
    """Half of the images in groups of four: about half of the test part too, or a test would be of singles alone."""
    images = image_set(plain({"a": 400}))
    groups = np.array([n // 4 if n < 200 else n for n in range(400)])
    shares = [np.mean(split_images(images, seed=seed, groups=groups).test < 200) for seed in range(20)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.06)


def test_a_group_across_classes_stays_together_with_most_of_it() -> None:
    images = image_set(plain({"a": 30, "b": 30}))
    groups = np.arange(60)
    groups[[0, 30, 31]] = 0
    for seed in range(10):
        split = split_images(images, seed=seed, groups=groups)
        assert sum(0 in split.part(name) and {30, 31} <= set(split.part(name).tolist()) for name in PARTS) == 1


def test_a_class_that_is_one_group_falls_back_to_exact_duplicates() -> None:
    images = image_set(plain({"a": 20, "b": 20}))
    groups = np.array([0] * 15 + list(range(15, 40)))
    split = split_images(images, groups=groups)
    assert split.split_groups_in == ("a",)
    assert counts(split, images) == counts(split_images(images), images)
    assert len(np.unique(split.groups)) == 40


def test_a_class_starved_by_groups_of_a_larger_one_falls_back() -> None:
    """Three of its four images are near-duplicates of images of the other class, which would take them all."""
    images = image_set(plain({"a": 4, "b": 12}))
    groups = np.arange(16)
    for n in range(3):
        groups[[n, 4 + 2 * n, 5 + 2 * n]] = n
    split = split_images(images, groups=groups)
    assert split.split_groups_in == ("a",)
    assert counts(split, images)["train"][0] == 2


def test_fallback_where_parts_are_given_looks_at_the_training_folder() -> None:
    rows = plain({"a": 10, "b": 10}, "train") + plain({"a": 10, "b": 10}, "val")
    images = image_set(rows)
    groups = np.arange(40)
    groups[:10] = 0  # the training images of a: one group, with test to be cut out of them
    split = split_images(images, groups=groups)
    assert split.split_groups_in == ("a",)
    assert counts(split, images)["test"] == [2, 2]


def test_torn_classes_are_remembered_by_split_json(tmp_path: Path) -> None:
    images = image_set(plain({"a": 20, "b": 20}))
    groups = np.array([0] * 15 + list(range(15, 40)))
    split = split_images(images, groups=groups)
    split.write(tmp_path / "split.json", images)
    assert read_split(tmp_path, images).split_groups_in == ("a",)


def test_groups_that_were_named_are_never_torn() -> None:
    images = image_set(plain({"a": 20, "b": 20}))
    groups = np.array([0] * 15 + list(range(15, 40)))
    with pytest.raises(SplitError, match="class 'a' has too few groups, or one with over half"):
        split_images(images, groups=groups, allow_split_groups=False)


def test_given_parts_are_kept_even_where_they_leak() -> None:
    images = image_set(plain({"a": 10, "b": 10}, "train") + plain({"a": 4, "b": 4}, "test"))
    groups = np.arange(28)
    groups[[0, 1, 20]] = 0  # two training images and a test image
    split = split_images(images, groups=groups)
    assert split.test.tolist() == list(range(20, 28))
    assert {0, 1} <= set(split.train.tolist()) or {0, 1} <= set(split.val.tolist())


def test_leaks_are_counted() -> None:
    images = image_set(plain({"a": 10, "b": 10}, "train") + plain({"a": 4, "b": 4}, "test"))
    groups = np.arange(28)
    groups[[0, 1, 20]] = 0
    groups[[27, 26]] = 26  # two test images: no leak
    split = split_images(images, val_fraction=0.1, groups=groups)
    expected = [20] if {0, 1} & set(split.train.tolist()) else []
    assert leaked_images(split, groups).tolist() == expected == [20]
    assert leaked_images(split_images(image_set(plain({"a": 30})), groups=np.arange(30) // 2), np.arange(30) // 2).tolist() == []


def test_groups_are_found_again_by_content(tmp_path: Path) -> None:
    images = image_set(plain({"a": 20, "b": 10}))
    groups = np.array([n // 2 if n < 20 else n for n in range(30)])
    split = split_images(images, groups=groups)
    split.write(tmp_path / "split.json", images)
    found = read_split(tmp_path, images)
    assert np.array_equal(found.groups, split.groups)
    assert np.array_equal(np.unique(groups, return_inverse=True)[1], np.unique(found.groups, return_inverse=True)[1])


@pytest.mark.parametrize("protocol", ["caltech-30", "folders", ""])
def test_an_unknown_protocol_is_refused(protocol: str) -> None:
    with pytest.raises(SplitError, match=f"^unknown protocol '{protocol}'; use one of ratio, caltech30$"):
        split_images(image_set(plain({"a": 40, "b": 40})), protocol=protocol)
