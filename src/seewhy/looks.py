"""Image files -> image issues: dark, light, blurry, nearly empty, grey, of odd size or aspect ratio, by cleanvision."""

from __future__ import annotations

import io
import logging
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import BinaryIO

import pandas as pd
from PIL import Image

from seewhy.decoding import read_bytes
from seewhy.shards import shard_of

# cleanvision's name -> ours
KINDS = {
    "dark": "dark",
    "light": "light",
    "blurry": "blurry",
    "low_information": "nearly empty",
    "grayscale": "grey",
    "odd_size": "odd size",
    "odd_aspect_ratio": "odd aspect ratio",
}


class Pictures:
    """What cleanvision opens a path with: a file, or a picture in a shard."""

    def open(self, path: str | Path, mode: str = "rb") -> BinaryIO:
        """The picture's file, or its bytes as one."""
        return io.BytesIO(read_bytes(path)) if shard_of(Path(path)) else Path(path).open("rb")


def find_image_issues(paths: Sequence[Path]) -> pd.DataFrame:
    """A row a finding: path, issue (a value of KINDS), score (0..1, lower is worse; cleanvision's); sorted by issue, the worst first.

    Grey pictures with transparency are passed over: cleanvision 0.3 cannot take them.
    'odd size' is far from the median of the set; 'odd aspect ratio' a side more than about three times the other.
    """
    from cleanvision import Imagelab  # slow to import

    paths = [path for path in paths if not _has_two_bands(path)]

    logging.getLogger("cleanvision").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it shows a bar of its own
        lab = Imagelab(filepaths=[str(path) for path in paths])
        lab._dataset.fs = Pictures()  # type: ignore[attr-defined]  # what its list of files is opened with
        # With more jobs it forks, in a process with threads, and waits for ever where the caller handles SIGTERM without ending.
        lab.find_issues({name: {} for name in KINDS}, n_jobs=1, verbose=False)
    rows = []
    for theirs, ours in KINDS.items():
        found = lab.issues[lab.issues[f"is_{theirs}_issue"]]
        rows += [{"path": str(path), "issue": ours, "score": float(score)} for path, score in found[f"{theirs}_score"].items()]
    table = pd.DataFrame(rows, columns=["path", "issue", "score"])
    return table.sort_values(["issue", "score", "path"], ignore_index=True)


def _has_two_bands(path: Path) -> bool:
    """Grey or palette with transparency, which cleanvision 0.3 cannot take."""
    with Pictures().open(path) as file, Image.open(file) as image:
        return image.mode in ("LA", "La", "PA")
