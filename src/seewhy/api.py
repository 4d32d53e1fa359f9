"""Train, load and pull runs: the facade over all stages, the only module that knows each of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from seewhy.config import make_config
from seewhy.core.progress import lines_in_notebook
from seewhy.deploy import hub
from seewhy.errors import RunError
from seewhy.models import saved_run
from seewhy.models.saved_run import SavedRun

if TYPE_CHECKING:
    import pandas as pd

    from seewhy.evaluation.evaluate import Evaluation
    from seewhy.explain.explainer import Explanation
    from seewhy.inference.predictions import Predictions


class Run(SavedRun):
    """A fitted classifier: its record, and what can be done with it. Each method imports its stage when called."""

    def threshold_for(self, precision: float) -> float:
        """The least probability to answer at, so that answers are right with probability `precision` (0..1): chosen on val.

        Raises RunError where no threshold promises that, with what there is on val, and for a run without val answers.
        """
        from seewhy.evaluation.calibration import threshold_for

        file = self.path / "predictions_val.csv"
        try:
            with file.open(newline="", encoding="utf-8") as lines:
                rows = [(float(row["prob"]), row["true"] == row["predicted"]) for row in csv.DictReader(lines)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file}: cannot be read; train the run again, or give the threshold itself") from error
        if not rows:
            raise RunError(f"{file}: empty; train the run again, or give the threshold itself")
        found = threshold_for(np.array([p for p, _ in rows]), np.array([right for _, right in rows], dtype=bool), precision)
        if found is None:
            raise RunError(
                f"{self.path}: no probability promises {precision:.1%} right answers, by its {len(rows)} validation images; "
                "ask for less, or validate on more (--set val_fraction=0.2)"
            )
        return found

    def evaluate(self, part: str = "test", data: str | None = None) -> Evaluation:
        """Measures the run on a part of its own split, or on all images of another labelled folder."""
        from seewhy.evaluation.evaluate import evaluate_run

        return evaluate_run(self, part, data)

    def predict(self, images: Sequence[str | Path], skip_bad: bool = False) -> Predictions:
        """Calibrated class probabilities of files, folders and patterns."""
        from seewhy.inference.predict import predict

        return predict(self, images, skip_bad)

    def export(self, path: Path | str | None = None, kind: str = "onnx") -> Path:
        """Writes one file that answers and explains without the run (docs/reference/onnx.md), after comparing it with the run.

        path: None for `model` and the kind's suffix in the run's folder. kind: onnx or pt2. OutputError where both do not agree.
        """
        from seewhy.deploy.export import export_file

        return export_file(self, path, kind)[0]

    def push(self, destination: str | Path, public: bool = False) -> str:
        """Copies the run to a folder that is not there yet, or to hf://USER/NAME; `seewhy.pull` makes it a run again."""
        from seewhy.deploy.hub import push

        return push(self, destination, public)

    def explain(
        self,
        images: Sequence[str | Path] | str | Path,
        method: str = "gradcam",
        target: str | Sequence[str] | None = None,
        contrast: str | Sequence[str] | None = None,
        layers: Sequence[str] = (),
        smooth: int = 1,
    ) -> Explanation:
        """Heatmaps of the predicted class, or of class `target` (and not `contrast`), of files, folders and patterns.

        target, contrast: one class, or one an image.
        layers: dotted names, several are fused; none: the last feature maps. smooth: the mean over smooth x smooth moved copies.
        """
        from seewhy.explain.explainer import explain

        return explain(self, [images] if isinstance(images, str | Path) else images, method, target, contrast, layers, smooth)

    def score_methods(
        self,
        images: Sequence[str | Path] | str | Path,
        methods: Sequence[str] | None = None,
        layers: Sequence[str] = (),
        smooth: int = 1,
    ) -> pd.DataFrame:
        """How far heatmaps of methods (None: all but the slow ones) can be trusted on these images: a row a method and score."""
        from seewhy.explain.method_comparison import COMPARED, score_methods

        chosen = [images] if isinstance(images, str | Path) else images
        return score_methods(self, chosen, methods or COMPARED, layers=layers, smooth=smooth)

    def sanity_check(
        self, images: Sequence[str | Path] | str | Path, methods: Sequence[str] | None = None, layers: Sequence[str] = ()
    ) -> pd.DataFrame:
        """How alike the maps stay as the network is randomised from the classifier down: a row a method and stage, with intervals."""
        from seewhy.explain.method_comparison import COMPARED, sanity_check

        return sanity_check(self, [images] if isinstance(images, str | Path) else images, methods or COMPARED, layers=layers)


@lines_in_notebook()
def train(data: str | Path, *, out: Path | str | None = None, resume: bool = False, devices: int = 1, **options: Any) -> Run:
    """Train a classifier on a dataset or folder and return the saved run.

    data: 'caltech101', 'scenes', a folder of class folders, or tar or parquet shards. out: the run's folder (default runs/NAME).
    resume: go on with an unfinished run of the same config. devices: processes that share the work. options: fields of TrainConfig.
    """
    config, place = make_config(data=str(data), **options), Path(out) if out is not None else None
    if devices > 1:
        from seewhy.training.launch import launch

        return load(launch(config, place, resume, devices))
    from seewhy.training.pipeline import train_run

    return as_run(train_run(config, place, resume))


def load(path: Path | str) -> Run:
    """Load a run folder, from any machine; no network and no pickle is involved.

    Raises RunError where the folder is missing, half-written, damaged or of another version.
    """
    return as_run(saved_run.load(path))


def pull(source: str | Path, out: Path | str | None = None, report: bool = False) -> Run:
    """Fetch a run that somebody has pushed, checked as `load` checks it; `out` is there whole or not at all.

    source: a folder, or hf://USER/NAME[@REVISION]. out: the run's folder (default: runs/NAME). report: take report.html too, a page that
    runs what its writer wrote when it is opened.
    Raises RunError for what is no run or cannot be fetched, OutputError where `out` holds something or cannot be written.
    """
    return as_run(hub.pull(source, out, report))


def as_run(saved: SavedRun) -> Run:
    """Give a saved run its methods."""
    return Run(**vars(saved))
