"""The main job on real images: train, measure, explain, save, use; the demo set always, Caltech-101 where present."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import seewhy
from seewhy.api import Run

REPOSITORY = Path(__file__).parents[1]
CLASSES = ("Leopards", "accordion", "dollar_bill", "grand_piano", "sunflower", "watch")
EACH = 32


@pytest.fixture(scope="module")
def subset(caltech_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first 32 images of 6 classes of Caltech-101, linked, in torchvision's layout."""
    root = tmp_path_factory.mktemp("data")
    for name in CLASSES:
        folder = root / "caltech101" / "101_ObjectCategories" / name
        folder.mkdir(parents=True)
        for n in range(1, EACH + 1):
            source = caltech_root / "caltech101" / "101_ObjectCategories" / name / f"image_{n:04d}.jpg"
            (folder / source.name).symlink_to(source.resolve())
    (root / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google").mkdir()
    return root


def test_demo_run_is_right_and_looks_at_the_object(demo_run: Run, demo_set: Path) -> None:
    assert demo_run.metrics["test"]["accuracy"] >= 0.9
    images = sorted((demo_set / "images").rglob("05?.jpg"))
    explanation = demo_run.explain(images, "gradcam++")
    inside = []
    for n, path in enumerate(images):
        mask = Image.open((demo_set / "masks" / path.relative_to(demo_set / "images")).with_suffix(".png"))
        small = np.asarray(mask.resize((7, 7), Image.Resampling.BOX)) > 25  # cells that hold a tenth of object
        inside.append(bool(small[np.unravel_index(explanation.maps[n].argmax(), (7, 7))]))
    assert len(inside) == 80
    assert np.mean(inside) >= 0.7  # objects cover about a sixth of an image


def test_frozen_lite0_on_real_images(subset: Path, tmp_path: Path) -> None:
    run = seewhy.train("caltech101", data_root=str(subset), backbone="efficientnet_lite0", unfreeze=0, out=tmp_path / "run")
    assert run.classes == CLASSES
    assert run.manifest["split"]["test"] == 6 * 6
    assert run.metrics["test"]["accuracy"] >= 0.94
    sunflower = subset / "caltech101/101_ObjectCategories/sunflower/image_0001.jpg"
    assert run.predict([sunflower]).table(1).loc[0, "class_1"] == "sunflower"


def test_last_stage_on_real_images_with_caltech30(subset: Path, tmp_path: Path) -> None:
    run = seewhy.train(
        "caltech101", data_root=str(subset), backbone="efficientnet_lite0", unfreeze=1, protocol="caltech30", epochs=2, out=tmp_path / "run"
    )
    split = run.manifest["split"]
    assert [split[part] for part in ("protocol", "train", "val", "test")] == ["caltech30", 162, 18, 12]
    assert split["grouped_images"] == 4  # two mirrored pairs among these 32 leopards
    assert run.metrics["test"]["mean_per_class_accuracy"] >= 0.75
    history = (tmp_path / "run" / "history.csv").read_text().splitlines()
    assert history[0] == "epoch,train_loss,train_accuracy,val_loss,val_accuracy,lr,seconds"
    assert len(history) == 3


def test_the_classic_scripts(subset: Path, resnet18_weights: Path, tmp_path: Path) -> None:
    """python train.py, python predict.py; best_model.pth loads into torchvision's resnet18 and says the same."""
    environment = {**os.environ, "SEEWHY_DATA": str(subset)}
    train = [sys.executable, REPOSITORY / "train.py", "--weights", str(resnet18_weights), "--epochs", "2"]
    subprocess.run(train, cwd=tmp_path, env=environment, check=True, capture_output=True)
    for name in ("training_curves", "gradcam_examples", "confusion_matrix"):
        with Image.open(tmp_path / "results" / f"{name}.png") as figure:
            assert min(figure.size) > 200
    image = subset / "caltech101/101_ObjectCategories/dollar_bill/image_0003.jpg"
    predict = [sys.executable, REPOSITORY / "predict.py", str(image)]
    answer = subprocess.run(predict, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True).stdout
    assert "dollar_bill" in answer.splitlines()[1].split()[1]

    from torchvision.models import resnet18

    saved = torch.load(tmp_path / "models" / "best_model.pth", weights_only=True)
    assert saved["classes"] == list(CLASSES)
    model = resnet18(num_classes=len(saved["classes"]))
    model.load_state_dict(saved["state_dict"])
    (path,) = (tmp_path / "runs").iterdir()
    run = seewhy.load(path)
    square = torch.rand(2, 3, 224, 224)
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(square), run.backbone.model(square), rtol=1e-5, atol=1e-5)


def test_predict_script_without_a_model_is_one_line(tmp_path: Path) -> None:
    answer = subprocess.run([sys.executable, REPOSITORY / "predict.py", "a.jpg"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert answer.stderr.startswith("seewhy: models/run.txt")
    assert answer.stderr.count("\n") == 1


def test_the_tour_runs(tmp_path: Path) -> None:
    """Executes notebooks/tour.ipynb in an empty folder; a cell that raises fails the test, and so does a figure that is not shown."""
    shutil.copy(REPOSITORY / "notebooks" / "tour.ipynb", tmp_path)
    notebook = nbformat.read(tmp_path / "tour.ipynb", as_version=4)
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = {n: cell.get("outputs", []) for n, cell in enumerate(notebook.cells)}
    kinds = {n: {kind for output in held for kind in output.get("data", {})} for n, held in outputs.items()}
    assert [n for n in kinds if "image/png" in kinds[n]] == [n for n in kinds if "plt.show" in notebook.cells[n].source] == [3, 6, 12]
    assert [n for n in kinds if "text/html" in kinds[n]] == [8, 10]  # tables
    texts = {n: "".join(output.get("text", "") for output in held) for n, held in outputs.items()}
    assert "test accuracy" in texts[8]
    for line in ("480 images, 8 classes; train 336", "val accuracy", "test accuracy"):  # what the stages of `train` say as they end
        assert line in texts[5]
