"""Test that an exported file predicts like its run, without torch; errors are one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import distribution, packages_distributions, requires
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from seewhy.api import Run
from seewhy.errors import ConfigError, ImageError, RunError
from seewhy.inference.onnx_model import load_onnx, predict_onnx
from seewhy.inference.predictions import Predictions

REPOSITORY = Path(__file__).parents[2]


def test_same_table_as_the_run(demo_run: Run, demo_onnx: Path, demo_images: list[Path]) -> None:
    expected = demo_run.predict(demo_images)
    (found,) = predict_onnx(load_onnx(demo_onnx), demo_images)
    assert found.classes == expected.classes
    np.testing.assert_allclose(found.probs, expected.probs, atol=1e-4)
    assert found.table(1)["class_1"].tolist() == expected.table(1)["class_1"].tolist()
    assert np.mean(found.ood == expected.ood) >= 0.95


def installed_by(requirements: Path) -> set[str]:
    """Normalised names of the distributions that a requirements file brings, with what these need."""
    todo = re.findall(r"^([\w-]+)", requirements.read_text(), flags=re.MULTILINE)
    found: set[str] = set()
    while todo:
        name = canonicalize_name(todo.pop())
        if name in found:
            continue
        found.add(name)
        needs = [Requirement(text) for text in requires(name) or []]
        todo += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def test_nothing_but_the_light_requirements(demo_run: Run, demo_onnx: Path, demo_images: list[Path], tmp_path: Path) -> None:
    """The command in a process that can import no distribution but those that requirements-runtime.txt brings."""
    light = installed_by(REPOSITORY / "requirements-runtime.txt")
    blocked = [
        module
        for module, names in packages_distributions().items()
        if module != "seewhy" and not light & {canonicalize_name(name) for name in names} and module not in sys.stdlib_module_names
    ]
    assert {"torch", "scipy", "timm", "sklearn", "pandas", "matplotlib"} <= set(blocked)
    code = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        f"from seewhy.cli.guard import run_guarded\nfrom seewhy.cli.main import call\n"
        f"asked = ['predict', {str(demo_onnx)!r}, *{[str(path) for path in demo_images]!r}]\n"
        f"run_guarded(lambda: call([*asked, '--out', {str(tmp_path / 'answers.csv')!r}]))\n"
        f"sys.exit(run_guarded(lambda: call([*asked, '--json'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    output, records = done.stdout.splitlines()
    assert output == f"{len(demo_images)} images -> {tmp_path / 'answers.csv'}"
    answers = json.loads(records)
    expected = demo_run.predict(demo_images).records()
    assert pd.read_csv(tmp_path / "answers.csv")["class_1"].tolist() == [e["top"][0]["class"] for e in expected]
    assert [a["top"][0]["class"] for a in answers] == [e["top"][0]["class"] for e in expected]


def test_the_light_requirements_stay_light() -> None:
    """Under 300 MB with everything they bring (pip itself is some 10 MB more)."""
    light = installed_by(REPOSITORY / "requirements-runtime.txt")
    sizes = {}
    for name in light:
        files = [Path(str(file.locate())) for file in distribution(name).files or []]
        sizes[name] = sum(file.stat().st_size for file in files if file.is_file())
    assert sum(sizes.values()) > 50_000_000  # what is counted is really there
    assert sum(sizes.values()) < 290_000_000, sorted(sizes.items(), key=lambda item: -item[1])[:5]


def test_noise_is_flagged_and_thresholds_come_with_the_file(demo_onnx: Path, demo_run: Run, tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    model = load_onnx(demo_onnx)
    (found,) = predict_onnx(model, [tmp_path])
    assert found.ood.tolist() == [True]
    chosen = {row["precision"]: row["threshold"] for row in demo_run.manifest["calibration"]["selective"] if row["threshold"] is not None}
    for precision, threshold in chosen.items():
        assert model.threshold_for(precision) == threshold
    with pytest.raises(ConfigError, match=r"has no threshold for precision 0\.123; use one of .*, or --min-confidence"):
        model.threshold_for(0.123)


def test_bad_images_are_left_out_or_named(demo_onnx: Path, demo_images: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    model = load_onnx(demo_onnx)
    with pytest.raises(ImageError, match=r"1 of 2 images cannot be used: .*bad\.jpg \(not an image\); pass --skip-bad"):
        list(predict_onnx(model, [tmp_path / "bad.jpg", demo_images[0]]))
    (found,) = predict_onnx(model, [tmp_path / "bad.jpg", demo_images[0]], skip_bad=True)
    assert isinstance(found, Predictions)
    assert (found.paths, found.bad) == ((str(demo_images[0]),), ((str(tmp_path / "bad.jpg"), "not an image"),))


def test_wrong_files_are_one_line(demo_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no such file"):
        load_onnx(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no graph")
    with pytest.raises(RunError, match="not a readable ONNX file"):
        load_onnx(tmp_path / "text.onnx")
    stranger = onnx.load(demo_onnx)
    del stranger.metadata_props[:]
    onnx.save(stranger, tmp_path / "stranger.onnx")
    with pytest.raises(RunError, match="not one of `seewhy export`"):
        load_onnx(tmp_path / "stranger.onnx")
    onnx.helper.set_model_props(stranger, {"seewhy_format": "99"})
    onnx.save(stranger, tmp_path / "newer.onnx")
    with pytest.raises(RunError, match="format 99, this seewhy reads format 3"):
        load_onnx(tmp_path / "newer.onnx")
