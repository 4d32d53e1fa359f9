"""Train, load and pull runs: the public Python API, the only module that knows every stage."""

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

Images = Sequence[str | Path] | str | Path


class Run(SavedRun):
    """Hold a trained classifier with its record, and evaluate, predict, explain, export and share it.

    `images` of its methods: image files, folders (searched recursively) or glob patterns, one or several.
    """

    def evaluate(self, part: str = "test", data: str | None = None) -> Evaluation:
        """Evaluate the run on part "train", "val" or "test" of its own split, or on all images of another labelled folder `data`.

        Raises SplitError if the run's data has changed, DataError if `data` has classes that the run does not know.
        """
        from seewhy.evaluation.evaluate import evaluate_run

        return evaluate_run(self, part, data)

    def threshold_for(self, precision: float) -> float:
        """Return the minimum confidence (0 to 1) at which the share `precision` (0 to 1) of predictions is correct, chosen on val.

        The upper 90% confidence bound of the error on val keeps the target. Raises RunError if no threshold does, or if the run has no
        predictions of val.
        """
        from seewhy.evaluation.calibration import threshold_for

        file = self.path / "predictions_val.csv"
        try:
            with file.open(newline="", encoding="utf-8") as lines:
                rows = [(float(row["prob"]), row["true"] == row["predicted"]) for row in csv.DictReader(lines)]
            confidence, correct = map(np.array, zip(*rows, strict=True))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(f"{file}: missing, damaged or empty; train the run again, or choose a threshold yourself") from error
        threshold = threshold_for(confidence, correct, precision)
        if threshold is None:
            raise RunError(
                f"{self.path}: no threshold keeps a precision of {precision:.1%} on its {len(rows)} validation images; "
                "lower the precision, or validate on more images (--set val_fraction=0.2)"
            )
        return threshold

    def predict(self, images: Images, skip_bad: bool = False) -> Predictions:
        """Predict calibrated class probabilities and out-of-distribution flags.

        skip_bad: skip unreadable images (they are listed in the result) instead of raising ImageError.
        """
        from seewhy.inference.predict import predict

        return predict(self, _as_list(images), skip_bad)

    def explain(
        self,
        images: Images,
        method: str = "gradcam",
        target: str | Sequence[str] | None = None,
        contrast: str | Sequence[str] | None = None,
        layers: Sequence[str] = (),
        smooth: int = 1,
    ) -> Explanation:
        """Compute heatmaps (0 to 1) of the evidence for a class.

        method: gradcam, gradcam++, hirescam, xgradcam, layercam, eigencam, ablationcam, scorecam, integrated_gradients or occlusion.
        target: class to explain, or one per image (default: the predicted class). contrast: explain why the target and not this class.
        layers: dotted names of layers, whose maps are fused (default: the last feature maps). smooth: 1 to 8, average over
        smooth x smooth shifted copies.
        """
        from seewhy.explain.explainer import explain

        return explain(self, _as_list(images), method, target, contrast, layers, smooth)

    def score_methods(
        self, images: Images, methods: Sequence[str] | None = None, layers: Sequence[str] = (), smooth: int = 1
    ) -> pd.DataFrame:
        """Measure how faithful the heatmaps of each method are (default: all but the slow ones), with baselines and 95% intervals.

        Returns one row per method and score.
        """
        from seewhy.explain.method_comparison import DEFAULT_METHODS, score_methods

        return score_methods(self, _as_list(images), methods or DEFAULT_METHODS, layers=layers, smooth=smooth)

    def sanity_check(self, images: Images, methods: Sequence[str] | None = None, layers: Sequence[str] = ()) -> pd.DataFrame:
        """Correlate heatmaps with those of the network randomised from the classifier down (arXiv:1810.03292), with 95% intervals.

        Returns one row per method (default: all but the slow ones) and stage; near 0 is good.
        """
        from seewhy.explain.method_comparison import DEFAULT_METHODS, sanity_check

        return sanity_check(self, _as_list(images), methods or DEFAULT_METHODS, layers=layers)

    def export(self, path: Path | str | None = None, kind: str = "onnx") -> Path:
        """Export the run to one file that predicts and explains without seewhy, and return its path.

        path: default `model.onnx` or `model.pt2` in the run's folder. kind: "onnx" or "pt2" (torch.export).
        Raises OutputError if the file's predictions differ from the run's on test images; nothing is written then.
        """
        from seewhy.deploy.export import export_file

        return export_file(self, path, kind)[0]

    def push(self, destination: str | Path, public: bool = False) -> str:
        """Copy the run to a new folder or to hf://USER/NAME, and return its path or URL; `seewhy.pull` fetches it.

        public: let anyone see the repository. Raises OutputError if the destination holds something or cannot be written.
        """
        return hub.push(self, destination, public)


def _as_list(images: Images) -> Sequence[str | Path]:
    return [images] if isinstance(images, str | Path) else images


@lines_in_notebook()
def train(data: str | Path, *, out: Path | str | None = None, resume: bool = False, devices: int = 1, **options: Any) -> Run:
    """Train a classifier, evaluate it on held-out images, and return the saved run.

    data: "caltech101", "scenes", a folder of class folders, or tar or parquet shards. out: the run's folder (default: runs/NAME).
    resume: resume an unfinished run of the same options. devices: GPUs (or CPU processes) to train on. options: fields of `TrainConfig`.
    Raises ConfigError for unknown or contradictory options, DataError if the images cannot be used, OutputError if `out` holds something.
    """
    config, folder = make_config(data=str(data), **options), Path(out) if out is not None else None
    if devices > 1:
        from seewhy.training.launch import launch

        return load(launch(config, folder, resume, devices))
    from seewhy.training.pipeline import train_run

    return as_run(train_run(config, folder, resume))


def load(path: Path | str) -> Run:
    """Load the run in a folder, on any machine, without network access and without pickle.

    Raises RunError if the folder is missing, incomplete, damaged or of another version.
    """
    return as_run(saved_run.load(path))


def pull(source: str | Path, out: Path | str | None = None, report: bool = False) -> Run:
    """Fetch a pushed run, completely or not at all, with all of `load`'s checks.

    source: a folder, or hf://USER/NAME[@REVISION]. out: the run's folder (default: runs/NAME). report: also fetch report.html, a page
    that can run scripts of its author.
    Raises RunError if the source is not a run or cannot be fetched, OutputError if `out` holds something or cannot be written.
    """
    return as_run(hub.pull(source, out, report))


def as_run(saved: SavedRun) -> Run:
    """Return a saved run as a `Run`."""
    return Run(**vars(saved))
