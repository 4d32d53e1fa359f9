"""The classic way in: Caltech-101 -> data/, models/best_model.pth and results/*.png, from the same job as `seewhy train caltech101`.

python train.py                                  ResNet-18, early layers frozen, deeper ones trained
python train.py --weights resnet18.safetensors   any option of `seewhy train`
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from seewhy import export_state_dict
from seewhy.cli.guard import run_guarded
from seewhy.cli.main import train_from_arguments
from seewhy.core.distributed import launched_as_main
from seewhy.core.signals import stop_on_signals

FIGURES = {"training_curves": "training_curves", "heatmaps": "gradcam_examples", "confusion_matrix": "confusion_matrix"}


def main() -> None:
    run = train_from_arguments(["caltech101", *sys.argv[1:]])
    if not launched_as_main():  # under torchrun, one process writes
        return
    export_state_dict(run, "models/best_model.pth")
    Path("models/run.txt").write_text(f"{run.path}\n")  # where predict.py finds the run
    Path("results").mkdir(exist_ok=True)
    for ours, classic in FIGURES.items():
        shutil.copy(run.path / "figures" / f"{ours}.png", f"results/{classic}.png")
    print("models/best_model.pth", *(f"results/{name}.png" for name in FIGURES.values()), sep="\n")


if __name__ == "__main__":
    stop_on_signals()
    sys.exit(run_guarded(main, ["python", *sys.argv]))
