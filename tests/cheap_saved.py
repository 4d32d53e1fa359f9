"""A cheap run as a folder on the disk, and small images in shards, for tests of what other processes read."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from seewhy.api import Run, load
from seewhy.models.saved_run import finish, make_manifest, save_weights
from tests.cheap_run import UNCALIBRATED, cheap_run


def saved_cheap_run(folder: Path, **options: object) -> Run:
    """`cheap_run`, saved and loaded."""
    run = cheap_run(**options)  # type: ignore[arg-type]
    work = folder.parent / f".{folder.name}.work"
    work.mkdir(parents=True)
    save_weights(run.backbone, work)
    metrics = {"test": {"accuracy": 0.5, "n": 6}}
    facts = {"metrics": metrics, "data": {"hash": "0"}, "split": {"hash": "0"}, "calibration": UNCALIBRATED}
    finish(work, folder, make_manifest(run.config, run.classes, run.backbone, facts))
    return load(folder)


def jpegs(count: int, side: int = 40) -> list[bytes]:
    """Small images, all different."""
    found = []
    for n in range(count):
        file = io.BytesIO()
        rough = np.random.default_rng(n).integers(0, 256, (5, 5, 3), dtype=np.uint8)
        Image.fromarray(rough).resize((side, side)).save(file, "JPEG")
        found.append(file.getvalue())
    return found


def write_parquet(file: Path, contents: Sequence[bytes], first: int = 0) -> Path:
    """A shard with a counter behind each image's bytes, so that no two are equal."""
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [data + f" {first + n}".encode() for n, data in enumerate(contents)]
    pq.write_table(pa.table({"image": rows, "label": [f"class {n % 2}" for n in range(len(rows))]}), file, row_group_size=100)
    return file


def write_tar(file: Path, contents: Sequence[bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w") as archive:
        for n, data in enumerate(contents):
            info = tarfile.TarInfo(f"{'ab'[n % 2]}/{n:05d}.jpg")
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file
