"""ImageSet x --group-by -> a number a group: near-duplicates, exact ones alone, a table, or a pattern over the path."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pandas as pd

from seewhy.core import distributed
from seewhy.curation.near_duplicates import label_groups, near_pairs
from seewhy.data.image_set import ImageSet
from seewhy.errors import ConfigError, reason_of
from seewhy.models.features import embed

MANY = 50_000  # images up to which features are computed to find near-duplicates
Groups = npt.NDArray[np.int64]


def group_images(images: ImageSet, how: str = "duplicates", workers: int = 2, keep: bool = True) -> Groups | None:
    """(N,) a number a group of images that must stay in one part of a split; None where only equal bytes count.

    how: 'duplicates' (by bytes, perceptual hash and features; by hash alone for more than MANY images, whose features would take
    longer than the training), 'exact', the path of a .csv with columns path and group, or a regular
    expression over the path below the dataset's folder: what its first group (else the whole match) says is the group.
    keep: whether features that are computed for this stay in the cache.
    Raises ConfigError for a table or pattern that leaves an image out.
    """
    if how == "exact":
        return None
    if how == "duplicates":
        vectors = embed(images, workers=workers, cache=keep) if len(images) <= MANY else None
        numbers = label_groups(len(images), near_pairs(images, vectors).pairs) if distributed.is_main_process() else None
        shared: Groups = distributed.broadcast(numbers)
        return shared
    names = [path.relative_to(images.root).as_posix() if path.is_relative_to(images.root) else path.as_posix() for path in images.paths]
    found = _from_table(Path(how), names) if how.endswith(".csv") else _from_pattern(how, names)
    groups: Groups = np.unique(found, return_inverse=True)[1].astype(np.int64)
    return groups


def _from_table(file: Path, names: list[str]) -> list[str]:
    try:
        table = pd.read_csv(file, dtype=str, keep_default_na=False)
    except (OSError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else reason_of(error)
        raise ConfigError(f"{file}: cannot be read ({reason}); --group-by takes a .csv with the columns path and group") from error
    if not {"path", "group"} <= set(table.columns):
        raise ConfigError(f"{file}: has the columns {', '.join(map(str, table.columns))}; --group-by needs path and group")
    group_of = {path.removeprefix("./"): group for path, group in zip(table["path"], table["group"], strict=True)}
    if missing := [name for name in names if name not in group_of]:
        raise ConfigError(
            f"{file}: {len(missing)} of {len(names)} images are not in it, {missing[0]!r} for one; "
            "name each by its path below the dataset's folder"
        )
    if blank := [name for name in names if not group_of[name].strip()]:
        raise ConfigError(f"{file}: {len(blank)} images have no group, {blank[0]!r} for one; give each of them one, alone or with others")
    return [group_of[name] for name in names]


def _from_pattern(pattern: str, names: list[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group-by {pattern!r}: not a regular expression ({error}), nor duplicates, exact or a .csv file") from error
    matches = [compiled.search(name) for name in names]
    if missing := [name for name, match in zip(names, matches, strict=True) if match is None]:
        raise ConfigError(
            f"--group-by {pattern!r}: does not match {len(missing)} of {len(names)} paths, {missing[0]!r} for one; "
            "match all of them, or use duplicates, exact or a .csv file"
        )
    found = [(match.group(1) if compiled.groups else match.group(0)) or "" for match in matches if match]
    if blank := [name for name, group in zip(names, found, strict=True) if not group]:
        raise ConfigError(
            f"--group-by {pattern!r}: says no group of {len(blank)} paths, {blank[0]!r} for one; let it match something in each"
        )
    return found
