"""Find image issues with cleanvision: dark, light, blurry, nearly empty, grey, odd size, odd aspect ratio."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr
from pathlib import Path
from typing import BinaryIO

import pandas as pd
from PIL import Image

from seewhy.core.process_state import quiet
from seewhy.data.decode import read_bytes
from seewhy.data.shards import shard_of

# cleanvision's name -> seewhy's
KINDS = {
    "dark": "dark",
    "light": "light",
    "blurry": "blurry",
    "low_information": "nearly empty",
    "grayscale": "grey",
    "odd_size": "odd size",
    "odd_aspect_ratio": "odd aspect ratio",
}


class ImageOpener:
    """File system for cleanvision: opens image files and images inside shards."""

    def open(self, path: str | Path, mode: str = "rb") -> BinaryIO:
        """Open an image as a binary file."""
        return io.BytesIO(read_bytes(path)) if shard_of(Path(path)) else Path(path).open("rb")


@quiet("cleanvision")
def find_image_issues(paths: Sequence[Path]) -> pd.DataFrame:
    """One row per issue, the worst first: path, issue (a value of KINDS), score (0..1, lower is worse).

    Scores and thresholds are cleanvision's. 'odd size' is far from the median of the set; 'odd aspect ratio' is a side more than about
    three times the other. Grey images with transparency are skipped: cleanvision 0.3 cannot read them.
    """
    from cleanvision import Imagelab  # slow to import

    opener = ImageOpener()
    with redirect_stderr(io.StringIO()):  # its progress bar cannot be switched off
        lab = Imagelab(filepaths=[str(path) for path in paths if not _has_two_bands(opener, path)])
        lab._dataset.fs = opener  # type: ignore[attr-defined]
        # n_jobs above 1 forks a process with threads, and hangs if the caller handles SIGTERM without exiting.
        lab.find_issues({name: {} for name in KINDS}, n_jobs=1, verbose=False)
    rows = [
        (str(path), issue, float(score))
        for name, issue in KINDS.items()
        for path, score in lab.issues.loc[lab.issues[f"is_{name}_issue"], f"{name}_score"].items()
    ]
    table = pd.DataFrame(rows, columns=["path", "issue", "score"])
    return table.sort_values(["issue", "score", "path"], ignore_index=True)


def _has_two_bands(opener: ImageOpener, path: Path) -> bool:
    with opener.open(path) as file, Image.open(file) as image:
        return image.mode in ("LA", "La", "PA")
