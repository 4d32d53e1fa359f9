"""Hold the labelled images of a dataset: paths, labels, hashes, sizes and the parts that folders give."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seewhy.core import distributed
from seewhy.data.columns import Hashes
from seewhy.data.listing import list_data
from seewhy.data.verify import check_files
from seewhy.errors import DataError, ImageError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one dataset, all of them decodable.

    paths: N files. labels: (N,) int64 indices into `classes`. hashes: N sha256 of the file contents.
    phashes: (N,) uint64 perceptual hashes. sizes: (N, 2) int64 width and height in pixels. grey: (N,) whether without colours.
    parts: N names ('train', 'val', 'test') where the dataset comes divided, else ''.
    masks: N files with the object's mask (white on black), or None where there is none.
    bad: (path, reason) of images left out.

    paths and hashes of a million images are columns (`columns.py`), which make their values when asked.
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
        """sha256 over the sorted (image, class) pairs: equal for equal data, wherever it lies."""
        return digest_of_lines(sorted(f"{sha256} {self.classes[label]}" for sha256, label in zip(self.hashes, self.labels, strict=True)))


def digest_of_lines(lines: Iterable[str]) -> str:
    """sha256 of the lines, '\\n' between them."""
    found, between = hashlib.sha256(), ""
    for line in lines:
        found.update((between + line).encode())
        between = "\n"
    return found.hexdigest()


def open_images(data: str, data_root: str | None = None, skip_bad: bool = False, workers: int = 2) -> ImageSet:
    """Dataset name or folder -> ImageSet.

    Raises DataError for what cannot be a dataset, ImageError with the list of unusable
    images unless `skip_bad`.
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
        raise DataError(f"{listing.root}: class {emptied[0]!r} has no usable image; add some or remove its folder")
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


def conflicting_duplicates(images: ImageSet) -> list[tuple[str, tuple[str, ...]]]:
    """(hash, paths) of images that occur with the same content under different classes."""
    members: dict[str, list[int]] = {}
    for i, sha256 in enumerate(images.hashes):
        members.setdefault(sha256, []).append(i)
    return [
        (sha256, tuple(str(images.paths[i]) for i in indices))
        for sha256, indices in members.items()
        if len({int(images.labels[i]) for i in indices}) > 1
    ]
