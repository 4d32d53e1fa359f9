"""A folder, shards, Caltech-101 or the demo set -> ImageSet: paths, labels, content hashes, every picture checked."""

from __future__ import annotations

import difflib
import hashlib
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from seewhy import world
from seewhy.cache import cache_dir
from seewhy.decoding import decode, read_bytes, upright_size
from seewhy.errors import DataError, ImageError, OutputError
from seewhy.progress import LOG, progress
from seewhy.shard_names import PART_NAMES, PICTURES
from seewhy.shards import SOUGHT, find_shards, is_shard, members, stamp

RECORD = "checked-4.sqlite"  # the rules for what counts as usable are part of the name: new rules, new record
RECORDED_AT_ONCE = 1024  # pictures; what is killed between has to look at so many again
COLUMNS = "key TEXT PRIMARY KEY, sha256 TEXT, width INT, height INT, problem TEXT, phash TEXT, grey INT"  # of the record
GREY_SPREAD = 8  # of 255, between the channels of a grey picture


@dataclass(frozen=True, slots=True)  # slots: there are as many as pictures
class Checked:
    """What looking at one file said.

    sha256: of its bytes. width, height: in pixels. problem: why it is unusable, '' if it is not.
    phash: its perceptual hash, 64 bits as 16 hexadecimal digits. grey: whether it has no colours.
    """

    sha256: str
    width: int
    height: int
    problem: str
    phash: str = ""
    grey: bool = False


@dataclass(frozen=True)
class ImageSet:
    """Labelled pictures of one dataset, all of them decodable.

    paths: N files. labels: (N,) int64 indices into `classes`. hashes: N sha256 of the file contents.
    phashes: (N,) uint64 perceptual hashes. sizes: (N, 2) int64 width and height in pixels. grey: (N,) whether without colours.
    parts: N names ('train', 'val', 'test') where the dataset comes divided, else ''.
    masks: N files with the object's mask (white on black), or None where there is none.
    bad: (path, reason) of pictures left out.
    """

    name: str
    root: Path
    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    hashes: tuple[str, ...]
    phashes: npt.NDArray[np.uint64]
    sizes: npt.NDArray[np.int64]
    grey: npt.NDArray[np.bool_]
    parts: tuple[str, ...]
    masks: tuple[Path | None, ...]
    bad: tuple[tuple[str, str], ...] = field(default=())

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def content_hash(self) -> str:
        """sha256 over the sorted (picture, class) pairs: equal for equal data, wherever it lies."""
        lines = sorted(f"{h} {self.classes[label]}" for h, label in zip(self.hashes, self.labels, strict=True))
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---------------------------------------------------------------- files


def check_file(path: Path) -> Checked:
    """Read, hash and fully decode one file."""
    try:
        data = read_bytes(path)
    except OSError as error:
        return Checked("", 0, 0, (error.strerror or "cannot be read").lower())
    return check_bytes(data)


def check_bytes(data: bytes) -> Checked:
    """Hash and fully decode the content of one file."""
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        image = decode(data)
    except ValueError as error:
        return Checked(sha256, 0, 0, str(error))
    import imagehash  # brings SciPy, which answering with an ONNX file does without

    small = image.resize((32, 32), Image.Resampling.BILINEAR, reducing_gap=2.0)
    width, height = upright_size(data)
    return Checked(sha256, width, height, "", str(imagehash.phash(small)), is_grey(small))


def is_grey(image: Image.Image) -> bool:
    """Whether red, green and blue agree up to what JPEG leaves between them, at 99 of 100 places."""
    values = np.asarray(image.convert("RGB"), dtype=np.int16)
    return bool(np.mean(np.ptp(values, axis=2) <= GREY_SPREAD) >= 0.99)


def check_files(paths: Sequence[Path], workers: int = 2) -> list[Checked]:
    """Checked for each file, in order; files seen before (same path, size and time) are not read again."""
    file = cache_dir() / RECORD
    try:
        try:
            return _check_files(paths, workers, file)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # the place: read-only, full, locked
                raise
            LOG.info(f"{file} is damaged ({error}); it is made anew, and all pictures are looked at again")
            file.unlink()
            return _check_files(paths, workers, file)
    except (sqlite3.Error, OSError) as error:
        raise OutputError(f"{file}: {error}; free some space, or set SEEWHY_CACHE to a writable folder") from error


def record_checked(paths: Sequence[Path], checked: Sequence[Checked]) -> None:
    """Keeps what was found elsewhere of these files, so that `check_files` need not look at them. Raises OutputError."""
    file = cache_dir() / RECORD
    rows = [(_stat_key(path), *astuple(each)) for path, each in zip(paths, checked, strict=True) if each.sha256]
    try:
        with closing(sqlite3.connect(file, timeout=60)) as record, record:
            record.execute(f"CREATE TABLE IF NOT EXISTS checked ({COLUMNS})")
            record.executemany("INSERT OR REPLACE INTO checked VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    except (sqlite3.Error, OSError) as error:
        raise OutputError(f"{file}: {error}; free some space, or set SEEWHY_CACHE to a writable folder") from error


def _check_files(paths: Sequence[Path], workers: int, file: Path) -> list[Checked]:
    stats = [_stat_key(path) for path in paths]
    with closing(sqlite3.connect(file, timeout=60)) as record:
        record.execute(f"CREATE TABLE IF NOT EXISTS checked ({COLUMNS})")
        known = {row[0]: Checked(*row[1:]) for row in _known_rows(record, stats)}
        todo = [i for i, key in enumerate(stats) if key not in known]
        with ThreadPoolExecutor(max(1, workers)) as pool, progress("checking pictures", len(todo)) as advance:
            for start in range(0, len(todo), RECORDED_AT_ONCE):
                rows = []
                chunk = todo[start : start + RECORDED_AT_ONCE]
                for i, checked in zip(chunk, pool.map(lambda i: check_file(paths[i]), chunk), strict=True):
                    known[stats[i]] = checked
                    advance(1)
                    if checked.sha256:  # an unreadable file may become readable without changing
                        rows.append((stats[i], *astuple(checked)))
                with record:
                    record.executemany("INSERT OR REPLACE INTO checked VALUES (?, ?, ?, ?, ?, ?, ?)", rows)
    return [known[key] for key in stats]


def _stat_key(path: Path) -> str:
    try:
        return stamp(path)
    except OSError:
        return str(path.absolute())


def _known_rows(record: sqlite3.Connection, keys: Sequence[str]) -> Iterable[tuple[Any, ...]]:
    for start in range(0, len(keys), 500):
        chunk = keys[start : start + 500]
        marks = ",".join("?" * len(chunk))
        yield from record.execute(f"SELECT * FROM checked WHERE key IN ({marks})", chunk)


# ---------------------------------------------------------------- datasets


@dataclass(frozen=True)
class Listing:
    """Files of a dataset before they are looked at."""

    name: str
    root: Path
    paths: list[Path]
    class_names: list[str]  # one a path
    parts: list[str]  # one a path, '' where not divided
    masks: list[Path | None]  # one a path


def open_images(data: str, data_root: str | None = None, skip_bad: bool = False, workers: int = 2) -> ImageSet:
    """Dataset name or folder -> ImageSet.

    Raises DataError for what cannot be a dataset, ImageError with the list of unusable
    pictures unless `skip_bad`.
    """
    listing = list_data(data, data_root)
    if world.size() > 1:  # each process looks at its share, and finds in the record what the others saw
        check_files(world.share(listing.paths), workers)
        world.wait()
    checked = check_files(listing.paths, workers)
    bad = tuple((str(path), c.problem) for path, c in zip(listing.paths, checked, strict=True) if c.problem)
    if bad and not skip_bad:
        raise ImageError(_bad_message(bad, len(listing.paths)), bad=bad)
    keep = [i for i, c in enumerate(checked) if not c.problem]
    classes = tuple(sorted({listing.class_names[i] for i in keep}))
    emptied = sorted(set(listing.class_names) - set(classes))
    if emptied:
        raise DataError(f"{listing.root}: class {emptied[0]!r} has no usable picture; add some or remove its folder")
    index = {name: number for number, name in enumerate(classes)}
    return ImageSet(
        name=listing.name,
        root=listing.root,
        paths=tuple(listing.paths[i] for i in keep),
        labels=np.array([index[listing.class_names[i]] for i in keep], dtype=np.int64),
        classes=classes,
        hashes=tuple(checked[i].sha256 for i in keep),
        phashes=np.array([int(checked[i].phash, 16) for i in keep], dtype=np.uint64),
        sizes=np.array([(checked[i].width, checked[i].height) for i in keep], dtype=np.int64),
        grey=np.array([bool(checked[i].grey) for i in keep]),
        parts=tuple(listing.parts[i] for i in keep),
        masks=tuple(listing.masks[i] for i in keep),
        bad=bad,
    )


def _bad_message(bad: Sequence[tuple[str, str]], total: int) -> str:
    shown = ", ".join(f"{path} ({reason})" for path, reason in bad[:5])
    more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
    noun = "picture" if len(bad) == 1 else "pictures"
    return f"{len(bad)} of {total} {noun} cannot be used: {shown}{more}; replace or remove them, or pass --skip-bad"


def list_pictures(folder: Path) -> list[Path]:
    """Image files in a folder and below, sorted; hidden files and other suffixes are passed over."""
    found = []
    for directory, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(directory, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in PICTURES]
    return check_names(sorted(found))


def check_names(paths: list[Path]) -> list[Path]:
    """The paths; DataError where one is not UTF-8, since no table, record or page could name it."""
    for path in paths:
        try:
            str(path).encode()
        except UnicodeEncodeError:
            shown = str(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            raise DataError(f"{shown}: the name is not UTF-8; rename it (convmv does whole folders)") from None
    return paths


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
    paths: list[Path] = []
    class_names: list[str] = []
    parts: list[str] = []
    for part_folder, part in part_folders.items():
        for class_folder in _subfolders(part_folder):
            pictures = list_pictures(class_folder)
            if not pictures:
                raise DataError(f"{class_folder}: no pictures in this class folder; add some or remove it")
            paths += pictures
            class_names += [class_folder.name] * len(pictures)
            parts += [part] * len(pictures)
    _check_classes(root, class_names)
    return Listing(root.resolve().name, root, paths, class_names, parts, [None] * len(paths))


def list_shards(root: Path, shards: Sequence[tuple[Path, str]]) -> Listing:
    """The pictures of shards, each with the part that it belongs to ('' where not divided); every picture needs a label."""
    if root.is_dir() and (mixed := next((path for path in _subfolders(root) if list_pictures(path)), None)):
        raise DataError(f"{root}: holds shards ({shards[0][0].name}) and folders of pictures ({mixed.name}); keep them apart")
    paths: list[Path] = []
    class_names: list[str] = []
    parts: list[str] = []
    for shard, part in shards:
        for member in members(shard):
            if member.label is None:
                raise DataError(f"{shard}: {member.name} has no label; looked for {SOUGHT[shard.suffix.lower()]}")
            paths.append(shard / member.name)
            class_names.append(member.label)
            parts.append(part)
    if not paths:
        raise DataError(f"{root}: no pictures in {'it' if is_shard(root) else 'its shards'}")
    _check_classes(root, class_names)
    return Listing(root.resolve().name, root, paths, class_names, parts, [None] * len(paths))


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _check_classes(root: Path, class_names: Sequence[str]) -> None:
    names = sorted(set(class_names))
    if not names:
        raise DataError(f"{root}: no class folders with pictures inside; expected {root}/CLASS/picture.jpg")
    if len(names) == 1:
        raise DataError(f"{root}: only one class ({names[0]!r}); a classifier needs at least two class folders")
    lower: dict[str, str] = {}
    for name in names:
        if name.lower() in lower:
            raise DataError(f"{root}: classes {lower[name.lower()]!r} and {name!r} differ in case only; rename or merge them")
        lower[name.lower()] = name


def list_caltech101(data_root: str | None) -> Listing:
    """Caltech-101 through torchvision: used in place, else downloaded; BACKGROUND_Google is no class."""
    from torchvision.datasets import Caltech101  # slow to import, needed here alone

    places = [Path(place) for place in (data_root, os.environ.get("SEEWHY_DATA"), "data") if place]
    root = next((place for place in places if (place / "caltech101" / "101_ObjectCategories").is_dir()), None)
    if root is None:
        root = places[0]
        download_caltech101(root)
    try:
        dataset = Caltech101(root=str(root))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{root}/caltech101: not as published ({error}); 101_ObjectCategories must hold the class folders, "
            "BACKGROUND_Google too, and nothing else"
        ) from error
    pictures = Path(dataset.root) / "101_ObjectCategories"
    paths = [pictures / dataset.categories[y] / f"image_{i:04d}.jpg" for y, i in zip(dataset.y, dataset.index, strict=True)]
    class_names = [dataset.categories[y] for y in dataset.y]
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
        reason = " ".join(str(error).split())
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
    masks: list[Path | None] = [(root / "masks" / path.relative_to(root / "pictures")).with_suffix(".png") for path in listing.paths]
    return Listing("scenes", root / "pictures", listing.paths, listing.class_names, listing.parts, masks)


DATASETS: dict[str, Callable[[str | None], Listing]] = {"caltech101": list_caltech101, "scenes": list_scenes}


def list_data(data: str, data_root: str | None = None) -> Listing:
    """Dataset name, folder or shard -> its pictures, before they are looked at."""
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
