"""Open a dataset as an ImageSet: paths, labels, hashes, sizes, and the split that its folders define."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seewhy.core import distributed
from seewhy.data.columns import DigestColumn
from seewhy.data.listing import list_data
from seewhy.data.verify import check_files
from seewhy.errors import DataError, ImageError


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one dataset, all decodable.

    paths: N files. labels: (N,) int64 indices into `classes`. hashes: N sha256 of the file contents.
    phashes: (N,) uint64 perceptual hashes. sizes: (N, 2) int64 width and height in pixels. grey: (N,) bool, no colours.
    parts: N of 'train', 'val', 'test' if the dataset defines a split, else ''.
    masks: N files with the object's mask (white on black), or None.
    bad: (path, reason) of images that were skipped.
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
        """sha256 of the sorted (image, class) pairs, independent of paths."""
        return digest_of_lines(sorted(f"{sha256} {self.classes[label]}" for sha256, label in zip(self.hashes, self.labels, strict=True)))


def digest_of_lines(lines: Iterable[str]) -> str:
    """sha256 of the lines, joined by '\\n'."""
    digest = hashlib.sha256()
    for i, line in enumerate(lines):
        digest.update((f"\n{line}" if i else line).encode())
    return digest.hexdigest()


def open_images(data: str, data_root: str | None = None, skip_bad: bool = False, workers: int = 2) -> ImageSet:
    """List and check the images of a named dataset, a folder or shards.

    Raises DataError if it is no dataset, ImageError with the list of unusable images unless `skip_bad`.
    """
    listing = list_data(data, data_root)
    if distributed.world_size() > 1:  # each process checks its shard; the next call reads the results of all
        check_files(distributed.shard(listing.paths), workers)
        distributed.barrier()
    checks = check_files(listing.paths, workers)
    bad = tuple((str(listing.paths[i]), check.problem) for i, check in enumerate(checks) if check.problem)
    if bad and not skip_bad:
        raise ImageError.of(bad, len(checks), "replace or remove them, or pass --skip-bad")
    keep = [i for i, check in enumerate(checks) if not check.problem]
    good = [checks[i] for i in keep]
    classes = tuple(sorted({listing.class_names[i] for i in keep}))
    if empty := sorted(set(listing.class_names) - set(classes)):
        raise DataError(f"{listing.root}: class {empty[0]!r} has no usable image; add some or remove its folder")
    index = {name: number for number, name in enumerate(classes)}
    return ImageSet(
        name=listing.name,
        root=listing.root,
        paths=listing.paths.take(np.array(keep)),
        labels=np.array([index[listing.class_names[i]] for i in keep], dtype=np.int64),
        classes=classes,
        hashes=DigestColumn.of(check.sha256 for check in good),
        phashes=np.array([int(check.phash, 16) for check in good], dtype=np.uint64),
        sizes=np.array([(check.width, check.height) for check in good], dtype=np.int64),
        grey=np.array([check.grey for check in good], dtype=bool),
        parts=tuple(listing.parts[i] for i in keep),
        masks=tuple(listing.masks[i] for i in keep),
        bad=bad,
    )


def conflicting_duplicates(images: ImageSet) -> list[tuple[str, tuple[str, ...]]]:
    """(sha256, paths) of equal images in different classes."""
    members: dict[str, list[int]] = {}
    for i, sha256 in enumerate(images.hashes):
        members.setdefault(sha256, []).append(i)
    return [
        (sha256, tuple(str(images.paths[i]) for i in indices))
        for sha256, indices in members.items()
        if len({int(images.labels[i]) for i in indices}) > 1
    ]
