"""The Python API: train a classifier, in this process or in several."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from seewhy.config import make_config
from seewhy.launch import launch
from seewhy.run import Run, load
from seewhy.workflow import train_run


def train(data: str | Path, *, out: Path | str | None = None, resume: bool = False, devices: int = 1, **options: Any) -> Run:
    """Train a classifier on a dataset or folder and return the saved run.

    data: 'caltech101', 'scenes', a folder of class folders, or tar or parquet shards. out: the run's folder (default runs/NAME).
    resume: go on with an unfinished run of the same config. devices: processes that share the work. options: fields of TrainConfig.
    """
    config, folder = make_config(data=str(data), **options), Path(out) if out is not None else None
    if devices > 1:
        return load(launch(config, folder, resume, devices))
    return train_run(config, folder, resume)
