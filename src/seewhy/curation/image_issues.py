"""Image files -> image issues: dark, light, blurry, nearly empty, grey, of odd size or aspect ratio, by cleanvision."""

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


class Images:
    """What cleanvision opens a path with: a file, or an image in a shard."""

    def open(self, path: str | Path, mode: str = "rb") -> BinaryIO:
        """The image's file, or its bytes as one."""
        return io.BytesIO(read_bytes(path)) if shard_of(Path(path)) else Path(path).open("rb")


@quiet("cleanvision")
def find_image_issues(paths: Sequence[Path]) -> pd.DataFrame:
    """A row a finding, the oddest first: path, look (a value of KINDS), score (0..1, lower is odder; cleanvision's, with its thresholds).

    Grey images with transparency are passed over: cleanvision 0.3 cannot take them.
    'odd size' is far from the median of the set; 'odd aspect ratio' a side more than about three times the other.
    """
    from cleanvision import Imagelab  # slow to import

    paths = [path for path in paths if not _has_two_bands(path)]

    with redirect_stderr(io.StringIO()):  # its bar cannot be switched off
        lab = Imagelab(filepaths=[str(path) for path in paths])
        lab._dataset.fs = Images()  # type: ignore[attr-defined]  # what its list of files is opened with
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
    with Images().open(path) as file, Image.open(file) as image:
        return image.mode in ("LA", "La", "PA")
