"""Group images that must stay in one part of a split: by near-duplicates, a table, or a pattern over their paths (--group-by)."""

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

MANY = 50_000  # images up to which near-duplicates are also found by features
Groups = npt.NDArray[np.int64]


def group_images(images: ImageSet, how: str = "duplicates", workers: int = 2, cache: bool = True) -> Groups | None:
    """(N,) group number of each image, or None if only exact duplicates are to be kept together.

    how: 'duplicates' (by bytes, perceptual hash and features; without features above MANY images, where they would take longer than the
    training), 'exact', the path of a .csv with the columns path and group, or a regular expression over the path relative to the
    dataset's folder, whose first group (or whole match) names the group.
    cache: whether to keep computed features in the cache.
    Raises ConfigError for a table or pattern that leaves an image without a group.
    """
    if how == "exact":
        return None
    if how == "duplicates":
        vectors = embed(images, workers=workers, cache=cache) if len(images) <= MANY else None
        numbers = label_groups(len(images), near_pairs(images, vectors).pairs) if distributed.is_main_process() else None
        shared: Groups = distributed.broadcast(numbers)
        return shared
    names = [path.relative_to(images.root).as_posix() if path.is_relative_to(images.root) else path.as_posix() for path in images.paths]
    group_names = _from_table(Path(how), names) if how.endswith(".csv") else _from_pattern(how, names)
    groups: Groups = np.unique(group_names, return_inverse=True)[1].astype(np.int64)
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
            f"{file}: {len(missing)} of {len(names)} images are not in it, for example {missing[0]!r}; "
            "list each by its path relative to the dataset's folder"
        )
    if blank := [name for name in names if not group_of[name].strip()]:
        raise ConfigError(f"{file}: {len(blank)} images have no group, for example {blank[0]!r}; give each image one")
    return [group_of[name] for name in names]


def _from_pattern(pattern: str, names: list[str]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(f"--group-by {pattern!r}: not a regular expression ({error}), nor duplicates, exact or a .csv file") from error
    matches = [compiled.search(name) for name in names]
    if missing := [name for name, match in zip(names, matches, strict=True) if match is None]:
        raise ConfigError(
            f"--group-by {pattern!r}: does not match {len(missing)} of {len(names)} paths, for example {missing[0]!r}; "
            "match all of them, or use duplicates, exact or a .csv file"
        )
    groups = [match[1 if compiled.groups else 0] or "" for match in matches if match]
    if blank := [name for name, group in zip(names, groups, strict=True) if not group]:
        raise ConfigError(
            f"--group-by {pattern!r}: gives {len(blank)} paths an empty group, for example {blank[0]!r}; match some text in each"
        )
    return groups
