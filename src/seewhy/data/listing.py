"""List images: a dataset's name, a folder of class folders, shards, files and patterns become paths and classes."""

from __future__ import annotations

import difflib
import glob
import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from seewhy.core.cache import cache_dir
from seewhy.data.columns import Paths
from seewhy.data.shard_index import IMAGES, PART_NAMES
from seewhy.data.shards import SOUGHT, find_shards, is_shard, members, shard_of, shards_in
from seewhy.errors import DataError, reason_of


@dataclass(frozen=True)
class Listing:
    """N files of a dataset before they are looked at; class_names, parts ('' where not divided) and masks: one a path."""

    name: str
    root: Path
    paths: Paths
    class_names: Sequence[str]
    parts: Sequence[str]
    masks: Sequence[Path | None]


def list_images(folder: Path) -> list[Path]:
    """Image files in a folder and below, sorted; hidden files and other suffixes are passed over."""
    return list(map(Path, _images_in(folder)))


def _images_in(folder: Path) -> list[str]:
    """The same as text, sorted as paths are: level by level."""
    found: list[str] = []
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in names if not name.startswith(".") and Path(name).suffix.lower() in IMAGES)
        found += (os.path.join(directory, name) for name in images)
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
    """`root/class/image`, or `root/{train,val,test}/class/image`."""
    if not root.is_dir():
        if root.exists():
            raise DataError(f"{root}: a file, not a folder; pass a folder with one folder of images for each class, a .tar or a .parquet")
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
            images = _images_in(class_folder)
            if not images:
                raise DataError(f"{class_folder}: no images in this class folder; add some or remove it")
            start = len(str(class_folder)) - len(str(class_folder.relative_to(root)))
            paths += (image[start:] for image in images)
            class_names += [class_folder.name] * len(images)
            parts += [part] * len(images)
    return _listing(root, paths, class_names, parts)


def list_shards(root: Path, shards: Sequence[tuple[Path, str]]) -> Listing:
    """The images of shards, each with the part that it belongs to ('' where not divided); every image needs a label."""
    if root.is_dir() and (mixed := next((path for path in _subfolders(root) if list_images(path)), None)):
        raise DataError(f"{root}: holds shards ({shards[0][0].name}) and folders of images ({mixed.name}); keep them apart")
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
        raise DataError(f"{root}: no images in {'it' if is_shard(root) else 'its shards'}")
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
        raise DataError(f"{root}: no class folders with images inside; expected {root}/CLASS/image.jpg")
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
    images = Path(dataset.root) / "101_ObjectCategories"
    class_names = [dataset.categories[y] for y in dataset.y]
    paths = Paths.of((f"{name}/image_{i:04d}.jpg" for name, i in zip(class_names, dataset.index, strict=True)), images)
    return Listing("caltech101", images, paths, class_names, [""] * len(paths), [None] * len(paths))


def download_caltech101(root: Path) -> None:
    """Downloads and unpacks Caltech-101 (137 MB, MD5-checked by torchvision) into root/caltech101."""
    from torchvision.datasets import Caltech101

    images = root / "caltech101" / "101_ObjectCategories"
    was_there = images.exists()
    try:
        Caltech101(root=str(root), download=True)
    except BaseException as error:  # Ctrl-C too: half unpacked, it would pass for the whole next time
        if not was_there:
            shutil.rmtree(images, ignore_errors=True)
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
    from seewhy.data.synthetic import draw_scenes

    root = draw_scenes(cache_dir() / "scenes")
    listing = list_folder(root / "images")
    masks = [(root / "masks" / path.relative_to(root / "images")).with_suffix(".png") for path in listing.paths]
    return Listing("scenes", root / "images", listing.paths, listing.class_names, listing.parts, masks)


DATASETS: dict[str, Callable[[str | None], Listing]] = {"caltech101": list_caltech101, "scenes": list_scenes}


def check_here(data: str) -> None:
    """DataError for an address: what trains or audits reads images many times, and needs them on this machine."""
    if "://" in data:
        raise DataError(
            f"{data.partition('?')[0]}: an address, and this needs images on a disk of this machine; copy or mount them, and name their "
            "folder (predict, explain and features read addresses)"
        )


def list_data(data: str, data_root: str | None = None) -> Listing:
    """Dataset name, folder or shard -> its images, before they are looked at."""
    check_here(data)
    if data in DATASETS:
        return DATASETS[data](data_root)
    shards = find_shards(Path(data))
    return list_shards(Path(data), shards) if shards else list_folder(Path(data))


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """Files, shards, paths into shards, folders (with all below) and glob patterns -> images, each once, in the order given.

    A folder gives the images in and below it, or those of the shards in it; DataError where it holds both.
    """
    found = list(dict.fromkeys(path for item in inputs for path in _images_of(item)))
    if not found:
        raise DataError("no images given; name files, folders or patterns")
    return found


def _images_of(item: str | Path) -> Iterable[Path]:
    path = Path(item)
    if path.is_dir():
        shards, images = shards_or_images(path)
        if images:
            return images
        if not any(len(members(shard)) for shard in shards):
            raise DataError(f"{path}: no images in this folder")
        return itertools.chain(*map(_members_of, shards))
    if path.exists() or shard_of(path):
        return _members_of(path)
    matches = [Path(match) for match in sorted(set(glob.glob(str(item), recursive=True))) if Path(match).is_file()]
    if not matches:
        raise DataError(f"{item}: no such file, folder or pattern")
    return itertools.chain(*map(_members_of, matches))


def shards_or_images(folder: Path) -> tuple[list[Path], list[Path]]:
    """The shards in a folder, or the images in and below it; DataError where it holds both."""
    shards, images = shards_in(folder), list_images(folder)
    if shards and images:
        raise mixed(str(folder), shards[0].name, str(images[0].relative_to(folder)))
    return shards, images


def mixed(folder: str, shard: str, image: str) -> DataError:
    """What to raise for a folder of which only a part would be looked at."""
    return DataError(f"{folder}: holds shards ({shard}) and images ({image}); keep them apart, or name those you mean")


def _members_of(path: Path) -> Iterable[Path]:
    check_name(str(path))
    return (path / member.name for member in members(path)) if is_shard(path) else [path]
