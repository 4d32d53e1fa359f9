"""List the images of named datasets, class folders, shards, files and glob patterns."""

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
from seewhy.data.columns import PathColumn
from seewhy.data.shard_index import IMAGES, PART_NAMES
from seewhy.data.shards import LABEL_SOURCES, find_shards, is_shard, members, shard_of, shards_in
from seewhy.errors import DataError, reason_of


@dataclass(frozen=True)
class Listing:
    """N unchecked files of a dataset, with a class name, part ('' without a split) and mask each."""

    name: str
    root: Path
    paths: PathColumn
    class_names: Sequence[str]
    parts: Sequence[str]
    masks: Sequence[Path | None]


def list_images(folder: Path) -> list[Path]:
    """Image files in a folder and below, sorted; hidden ones are skipped."""
    return list(map(Path, _images_in(folder)))


def _images_in(folder: Path) -> list[str]:
    """`list_images` as text, sorted like paths: level by level."""
    paths: list[str] = []
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        images = (name for name in names if not name.startswith(".") and Path(name).suffix.lower() in IMAGES)
        paths += (check_name(os.path.join(directory, name)) for name in images)
    return sorted(paths, key=lambda path: os.path.normcase(path).replace(os.sep, "\0"))  # sorts before all characters of names


def check_name(path: str) -> str:
    """Return the path. Raises DataError if it is not UTF-8, as tables, records and pages must be."""
    try:
        path.encode()
    except UnicodeEncodeError:
        printable = path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        raise DataError(f"{printable}: the name is not UTF-8; rename it (convmv renames whole folders)") from None
    return path


def list_folder(root: Path) -> Listing:
    """List `root/class/image`, or `root/{train,val,test}/class/image`."""
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
    has_split = "train" in {f.name for f in folders} and all(f.name in PART_NAMES for f in folders)
    part_folders = {folder: PART_NAMES[folder.name] for folder in folders} if has_split else {root: ""}
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
    """List the images of (shard, part) pairs; every image needs a label."""
    if root.is_dir() and (folder := next((path for path in _subfolders(root) if list_images(path)), None)):
        raise DataError(f"{root}: holds shards ({shards[0][0].name}) and folders of images ({folder.name}); separate them")
    paths: list[str] = []
    class_names: list[str] = []
    parts: list[str] = []
    for shard, part in shards:
        check_name(str(shard))
        relative = shard.relative_to(root)
        for member in members(shard):
            if member.label is None:
                raise DataError(f"{shard}: {member.name} has no label; expected {LABEL_SOURCES[shard.suffix.lower()]}")
            paths.append(str(relative / member.name))
            class_names.append(member.label)
            parts.append(part)
    if not paths:
        raise DataError(f"{root}: no images in {'it' if is_shard(root) else 'its shards'}")
    return _listing(root, paths, class_names, parts)


def _listing(root: Path, paths: Sequence[str], class_names: Sequence[str], parts: Sequence[str]) -> Listing:
    """paths: relative to root. Raises DataError unless there are at least two classes that differ by more than case."""
    names = sorted(set(class_names))
    if not names:
        raise DataError(f"{root}: no class folders with images; expected {root}/CLASS/image.jpg")
    if len(names) == 1:
        raise DataError(f"{root}: only one class ({names[0]!r}); a classifier needs at least two class folders")
    by_lower: dict[str, str] = {}
    for name in names:
        if (other := by_lower.setdefault(name.lower(), name)) != name:
            raise DataError(f"{root}: classes {other!r} and {name!r} differ in case only; rename or merge them")
    return Listing(root.resolve().name, root, PathColumn.of(paths, root), class_names, parts, [None] * len(paths))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def find_caltech101(data_root: str | None) -> tuple[Path, bool]:
    """The folder of caltech101, present or to be downloaded into, and whether it is present."""
    roots = [Path(root) for root in (data_root, os.environ.get("SEEWHY_DATA"), "data") if root]
    present = next((root for root in roots if (root / "caltech101" / "101_ObjectCategories").is_dir()), None)
    return present or roots[0], present is not None


def list_caltech101(data_root: str | None) -> Listing:
    """List Caltech-101 through torchvision, downloaded if missing; without BACKGROUND_Google, which is no class."""
    from torchvision.datasets import Caltech101  # slow to import

    root, present = find_caltech101(data_root)
    if not present:
        _download_caltech101(root)
    try:
        dataset = Caltech101(root=str(root))
    except (OSError, ValueError) as error:
        raise DataError(f"{root}/caltech101: {error}; 101_ObjectCategories must hold the class folders and BACKGROUND_Google") from error
    images = Path(dataset.root) / "101_ObjectCategories"
    class_names = [dataset.categories[y] for y in dataset.y]
    paths = PathColumn.of((f"{name}/image_{i:04d}.jpg" for name, i in zip(class_names, dataset.index, strict=True)), images)
    return Listing("caltech101", images, paths, class_names, [""] * len(paths), [None] * len(paths))


def _download_caltech101(root: Path) -> None:
    """Download and unpack Caltech-101 (137 MB, MD5-checked by torchvision) into root/caltech101."""
    from torchvision.datasets import Caltech101

    images = root / "caltech101" / "101_ObjectCategories"
    existed = images.exists()
    try:
        Caltech101(root=str(root), download=True)
    except BaseException as error:  # on Ctrl-C too: unpacked in part, it would look complete
        if not existed:
            shutil.rmtree(images, ignore_errors=True)
        if not isinstance(error, (OSError, RuntimeError)):
            raise
        for empty in (root / "caltech101", root):  # created by torchvision before the download
            if empty.is_dir() and not any(empty.iterdir()):
                empty.rmdir()
        raise DataError(
            f"caltech101 is not in {root} and cannot be downloaded ({reason_of(error)}); "
            "pass --data-root or set SEEWHY_DATA to the folder of caltech101/101_ObjectCategories"
        ) from error


def list_scenes(data_root: str | None) -> Listing:
    """List the synthetic demo set, drawn into the cache on first use."""
    from seewhy.data.synthetic import draw_scenes

    root = draw_scenes(cache_dir() / "scenes")
    listing = list_folder(root / "images")
    masks = [(root / "masks" / path.relative_to(root / "images")).with_suffix(".png") for path in listing.paths]
    return Listing("scenes", root / "images", listing.paths, listing.class_names, listing.parts, masks)


DATASETS: dict[str, Callable[[str | None], Listing]] = {"caltech101": list_caltech101, "scenes": list_scenes}


def require_local(data: str) -> None:
    """Raise DataError for an address: training and audits read images many times."""
    if "://" in data:
        address = data.partition("?")[0]
        raise DataError(f"{address}: only predict, explain and precompute read addresses; copy or mount the images and pass their folder")


def list_data(data: str, data_root: str | None = None) -> Listing:
    """List the images of a named dataset, a folder or a shard, unchecked."""
    require_local(data)
    if data in DATASETS:
        return DATASETS[data](data_root)
    shards = find_shards(Path(data))
    return list_shards(Path(data), shards) if shards else list_folder(Path(data))


def find_images(inputs: Sequence[str | Path]) -> list[Path]:
    """List the images of files, shards, paths into shards, folders and glob patterns, each once, in the order given.

    A folder gives the images in and below it, or those of its shards. Raises DataError if it holds both, or nothing is found.
    """
    paths = list(dict.fromkeys(path for item in inputs for path in _images_of(item)))
    if not paths:
        raise DataError("no images given; pass files, folders or patterns")
    return paths


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
    """Shards in a folder, or images in and below it. Raises DataError if it holds both."""
    shards, images = shards_in(folder), list_images(folder)
    if shards and images:
        raise mixed_folder_error(str(folder), shards[0].name, str(images[0].relative_to(folder)))
    return shards, images


def mixed_folder_error(folder: str, shard: str, image: str) -> DataError:
    """The error for a folder that holds shards and images."""
    return DataError(f"{folder}: holds shards ({shard}) and images ({image}); separate them, or pass the paths you mean")


def _members_of(path: Path) -> Iterable[Path]:
    check_name(str(path))
    return (path / member.name for member in members(path)) if is_shard(path) else [path]
