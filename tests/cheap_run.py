"""A Run with random weights, made in a second and without training, for tests that need one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from seewhy.api import Run
from seewhy.config import make_config
from seewhy.models.backbones import create_backbone
from seewhy.models.transforms import Preprocessing
from seewhy.models.trunk_tail import split_backbone

UNCALIBRATED = {"temperature": 1.0, "selective": []}
CLASSES = ("ant", "bee", "cat", "dog", "elk", "fox")


def normalised(squares: npt.NDArray[np.uint8], preprocessing: Preprocessing) -> npt.NDArray[np.float32]:
    """(N, H, W, 3) uint8 -> (N, 3, H, W) float32, (x / 255 - mean) / std computed in float64."""
    exact = (squares / 255.0 - np.array(preprocessing.mean)) / np.array(preprocessing.std)
    return np.ascontiguousarray(exact.transpose(0, 3, 1, 2), dtype=np.float32)


def cheap_run(name: str = "resnet18", classes: Sequence[str] = CLASSES, size: int = 64, resize: str = "squash", **options: object) -> Run:
    """`size`: side of the network's square in pixels, small to be quick."""
    backbone = create_backbone(name, len(classes), weights="none", seed=0)
    backbone = replace(backbone, preprocessing=replace(backbone.preprocessing, size=size, resize=resize))
    backbone.model.get_classifier().weight.data.mul_(100)  # the small start would leave all classes as good as equal
    config = make_config(data="x", backbone=name, weights="none", **{"tta_flip": False, **options}).resolved()
    return Run(Path("cheap"), config, tuple(classes), backbone, split_backbone(backbone, 1), {"metrics": {}, "calibration": UNCALIBRATED})
