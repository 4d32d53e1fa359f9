"""A folder, shards, Caltech-101 or the demo set -> ImageSet: paths, labels, content hashes, every picture checked."""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seewhy import distributed
from seewhy.cache import cache_dir
from seewhy.checking import check_files
from seewhy.columns import Hashes, Paths
from seewhy.errors import DataError, ImageError, reason_of
from seewhy.shard_names import PART_NAMES, PICTURES
from seewhy.shards import SOUGHT, find_shards, is_shard, members


@dataclass(frozen=True)
class ImageSet:
    """Labelled pictures of one dataset, all of them decodable.

    paths: N files. labels: (N,) int64 indices into `classes`. hashes: N sha256 of the file contents.
    phashes: (N,) uint64 perceptual hashes. sizes: (N, 2) int64 width and height in pixels. grey: (N,) whether without colours.
    parts: N names ('train', 'val', 'test') where the dataset comes divided, else ''.
    masks: N files with the object's mask (white on black), or None where there is none.
    bad: (path, reason) of pictures left out.

    paths and hashes of a million pictures are columns (`columns.py`), which make their values when asked.
    """

    name: str
    root: Path
    paths: Sequence[Path]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    hashes: Sequence[str]
    phashes: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]
    grey: npt.NDArray[np.bool_]
    parts: Sequence[str]
    masks: Sequence[Path | None]
    bad: tuple[tuple[str, str], ...] = field(default=())

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def content_hash(self) -> str:
        """sha256 over the sorted (picture, class) pairs: equal for equal data, wherever it lies."""
        return digest_of_lines(sorted(f"{sha256} {self.classes[label]}" for sha256, label in zip(self.hashes, self.labels, strict=True)))


def digest_of_lines(lines: Iterable[str]) -> str:
    """sha256 of the lines, '\\n' between them."""
    found, between = hashlib.sha256(), ""
    for line in lines:
        found.update((between + line).encode())
        between = "\n"
    return found.hexdigest()


@dataclass(frozen=True)
class Listing:
    """N files of a dataset before they are looked at; class_names, parts ('' where not divided) and masks: one a path."""

    name: str
    root: Path
    paths: Paths
    class_names: Sequence[str]
    parts: Sequence[str]
    masks: Sequence[Path | None]


def open_images(data: str, data_root: str | None = None, skip_bad: bool = False, workers: int = 2) -> ImageSet:
    """Dataset name or folder -> ImageSet.

    Raises DataError for what cannot be a dataset, ImageError with the list of unusable
    pictures unless `skip_bad`.
    """
    listing = list_data(data, data_root)
    if distributed.world_size() > 1:  # each process checks its shard, and finds in the record what the others have checked
        check_files(distributed.shard(listing.paths), workers)
        distributed.barrier()
    checked = check_files(listing.paths, workers)
    bad = tuple((str(listing.paths[i]), found.problem) for i, found in enumerate(checked) if found.problem)
    if bad and not skip_bad:
        raise ImageError.of(bad, len(checked), "replace or remove them, or pass --skip-bad")
    keep = [i for i, found in enumerate(checked) if not found.problem]
    good = [checked[i] for i in keep]
    classes = tuple(sorted({listing.class_names[i] for i in keep}))
    emptied = sorted(set(listing.class_names) - set(classes))
    if emptied:
        raise DataError(f"{listing.root}: class {emptied[0]!r} has no usable picture; add some or remove its folder")
    index = {name: number for number, name in enumerate(classes)}
    return ImageSet(
        name=listing.name,
        root=listing.root,
        paths=listing.paths.take(np.array(keep)),
        labels=np.array([index[listing.class_names[i]] for i in keep], dtype=np.int64),
        classes=classes,
        hashes=Hashes.of(found.sha256 for found in good),
        phashes=np.array([int(found.phash, 16) for found in good], dtype=np.uint64),
        sizes=np.array([(found.width, found.height) for found in good], dtype=np.int64),
        grey=np.array([found.grey for found in good], dtype=bool),
        parts=tuple(listing.parts[i] for i in keep),
        masks=tuple(listing.masks[i] for i in keep),
        bad=bad,
    )


def list_pictures(folder: Path) -> list[Path]:
    """Image files in a folder and below, sorted; hidden files and other suffixes are passed over."""
    return list(map(Path, _pictures_in(folder)))


def _pictures_in(folder: Path) -> list[str]:
    """The same as text, sorted as paths are: level by level."""
    found: list[str] = []
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        pictures = (name for name in names if not name.startswith(".") and Path(name).suffix.lower() in PICTURES)
        found += (os.path.join(directory, name) for name in pictures)
    found.sort(key=lambda text: os.path.normcase(text).replace(os.sep, "\0"))  # which comes before all that a name may hold
    for text in found:
        check_name(text)
    return found


def check_name(text: str) -> str:
    """The name; DataError where it is not UTF-8, since no table, record or page could give it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        shown = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        raise DataError(f"{shown}: the name is not UTF-8; rename it (convmv does whole folders)") from None
    return text


def list_folder(root: Path) -> Listing:
    """`root/class/picture`, or `root/{train,val,test}/class/picture`."""
    if not root.is_dir():
        if root.exists():
            raise DataError(f"{root}: a file, not a folder; pass a folder with one folder of pictures for each class, a .tar or a .parquet")
        near = difflib.get_close_matches(str(root), DATASETS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(f"{root}: no such folder or dataset{hint}; known datasets: {', '.join(DATASETS)}")
    try:
        folders = _subfolders(root)
    except OSError as error:
        raise DataError(f"{root}: cannot be read ({error.strerror}); check its permissions") from error
    divided = "train" in {f.name for f in folders} and all(f.name in PART_NAMES for f in folders)
    part_folders = {folder: PART_NAMES[folder.name] for folder in folders} if divided else {root: ""}
    paths: list[str] = []
    class_names: list[str] = []
    parts: list[str] = []
    for part_folder, part in part_folders.items():
        for class_folder in _subfolders(part_folder):
            pictures = _pictures_in(class_folder)
            if not pictures:
                raise DataError(f"{class_folder}: no pictures in this class folder; add some or remove it")
            start = len(str(class_folder)) - len(str(class_folder.relative_to(root)))
            paths += (picture[start:] for picture in pictures)
            class_names += [class_folder.name] * len(pictures)
            parts += [part] * len(pictures)
    return _listing(root, paths, class_names, parts)


def list_shards(root: Path, shards: Sequence[tuple[Path, str]]) -> Listing:
    """The pictures of shards, each with the part that it belongs to ('' where not divided); every picture needs a label."""
    if root.is_dir() and (mixed := next((path for path in _subfolders(root) if list_pictures(path)), None)):
        raise DataError(f"{root}: holds shards ({shards[0][0].name}) and folders of pictures ({mixed.name}); keep them apart")
    paths: list[str] = []
    class_names: list[str] = []
    parts: list[str] = []
    for shard, part in shards:
        check_name(str(shard))
        place = shard.relative_to(root)
        for member in members(shard):
            if member.label is None:
                raise DataError(f"{shard}: {member.name} has no label; looked for {SOUGHT[shard.suffix.lower()]}")
            paths.append(str(place / member.name))
            class_names.append(member.label)
            parts.append(part)
    if not paths:
        raise DataError(f"{root}: no pictures in {'it' if is_shard(root) else 'its shards'}")
    return _listing(root, paths, class_names, parts)


def _listing(root: Path, paths: Sequence[str], class_names: Sequence[str], parts: Sequence[str]) -> Listing:
    """paths: below root."""
    _check_classes(root, sorted(set(class_names)))
    return Listing(root.resolve().name, root, Paths.of(paths, root), class_names, parts, [None] * len(paths))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _check_classes(root: Path, names: Sequence[str]) -> None:
    """names: sorted."""
    if not names:
        raise DataError(f"{root}: no class folders with pictures inside; expected {root}/CLASS/picture.jpg")
    if len(names) == 1:
        raise DataError(f"{root}: only one class ({names[0]!r}); a classifier needs at least two class folders")
    lower: dict[str, str] = {}
    for name in names:
        if name.lower() in lower:
            raise DataError(f"{root}: classes {lower[name.lower()]!r} and {name!r} differ in case only; rename or merge them")
        lower[name.lower()] = name


def find_caltech101(data_root: str | None) -> tuple[Path, bool]:
    """The folder that holds caltech101, or the one that it is to be downloaded into, and whether it is there."""
    places = [Path(place) for place in (data_root, os.environ.get("SEEWHY_DATA"), "data") if place]
    root = next((place for place in places if (place / "caltech101" / "101_ObjectCategories").is_dir()), None)
    return root or places[0], root is not None


def list_caltech101(data_root: str | None) -> Listing:
    """Caltech-101 through torchvision: used in place, else downloaded; BACKGROUND_Google is no class."""
    from torchvision.datasets import Caltech101  # slow to import, needed here alone

    root, found = find_caltech101(data_root)
    if not found:
        download_caltech101(root)
    try:
        dataset = Caltech101(root=str(root))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{root}/caltech101: not as published ({error}); 101_ObjectCategories must hold the class folders, "
            "BACKGROUND_Google too, and nothing else"
        ) from error
    pictures = Path(dataset.root) / "101_ObjectCategories"
    class_names = [dataset.categories[y] for y in dataset.y]
    paths = Paths.of((f"{name}/image_{i:04d}.jpg" for name, i in zip(class_names, dataset.index, strict=True)), pictures)
    return Listing("caltech101", pictures, paths, class_names, [""] * len(paths), [None] * len(paths))


def download_caltech101(root: Path) -> None:
    """Downloads and unpacks Caltech-101 (137 MB, MD5-checked by torchvision) into root/caltech101."""
    from torchvision.datasets import Caltech101

    pictures = root / "caltech101" / "101_ObjectCategories"
    was_there = pictures.exists()
    try:
        Caltech101(root=str(root), download=True)
    except BaseException as error:  # Ctrl-C too: half unpacked, it would pass for the whole next time
        if not was_there:
            shutil.rmtree(pictures, ignore_errors=True)
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        reason = reason_of(error)
        # torchvision makes the folder before it knows that it can fill it.
        for left_over in (root / "caltech101", root):
            if left_over.is_dir() and not any(left_over.iterdir()):
                left_over.rmdir()
        raise DataError(
            f"caltech101 is not in {root} and cannot be downloaded ({reason}); "
            "pass --data-root or set SEEWHY_DATA to the folder that holds caltech101/101_ObjectCategories"
        ) from error


def list_scenes(data_root: str | None) -> Listing:
    """The embedded demo set, drawn on first use into the cache."""
    from seewhy.scenes import draw_scenes

    root = draw_scenes(cache_dir() / "scenes")
    listing = list_folder(root / "pictures")
    masks = [(root / "masks" / path.relative_to(root / "pictures")).with_suffix(".png") for path in listing.paths]
    return Listing("scenes", root / "pictures", listing.paths, listing.class_names, listing.parts, masks)


DATASETS: dict[str, Callable[[str | None], Listing]] = {"caltech101": list_caltech101, "scenes": list_scenes}


def check_here(data: str) -> None:
    """DataError for an address: what trains or audits reads pictures many times, and needs them on this machine."""
    if "://" in data:
        raise DataError(
            f"{data.partition('?')[0]}: an address, and this needs pictures on a disk of this machine; copy or mount them, and name their "
            "folder (predict, explain and features read addresses)"
        )


def list_data(data: str, data_root: str | None = None) -> Listing:
    """Dataset name, folder or shard -> its pictures, before they are looked at."""
    check_here(data)
    if data in DATASETS:
        return DATASETS[data](data_root)
    shards = find_shards(Path(data))
    return list_shards(Path(data), shards) if shards else list_folder(Path(data))


def conflicting_duplicates(images: ImageSet) -> list[tuple[str, tuple[str, ...]]]:
    """(hash, paths) of pictures that occur with the same content under different classes."""
    members: dict[str, list[int]] = {}
    for i, sha256 in enumerate(images.hashes):
        members.setdefault(sha256, []).append(i)
    return [
        (sha256, tuple(str(images.paths[i]) for i in indices))
        for sha256, indices in members.items()
        if len({int(images.labels[i]) for i in indices}) > 1
    ]
