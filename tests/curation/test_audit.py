"""The audit of a small set whose faults are known: copies, a copy under another label, a wrong label, a dark image."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from seewhy.curation.audit import Audit, audit_images, measure_leak
from seewhy.data.image_set import open_images
from seewhy.reports.audit_report import save_audit


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory, demo_set: Path) -> Path:
    """Four classes of the demo set, 20 images each, with faults put in."""
    root = tmp_path_factory.mktemp("faulty") / "images"
    source = demo_set / "images"
    for name in ("boat", "car", "fish", "tree"):
        (root / name).mkdir(parents=True)
        for path in sorted((source / name).iterdir())[:20]:
            shutil.copy(path, root / name)
    first = sorted((root / "boat").iterdir())
    Image.open(first[0]).resize((150, 150)).save(root / "boat" / "smaller.jpg", quality=85)
    shutil.copy(first[1], root / "boat" / "copy.jpg")
    shutil.copy(first[2], root / "fish" / "boat-under-fish.jpg")
    shutil.move(str(sorted((root / "car").iterdir())[3]), root / "tree" / "a-car.jpg")
    dark = np.asarray(Image.open(sorted((root / "tree").iterdir())[5]).convert("RGB")) // 20
    Image.fromarray(dark).save(root / "tree" / "dark.jpg")
    return root


@pytest.fixture(scope="module")
def audit(faulty: Path) -> Audit:
    return audit_images(open_images(str(faulty)), seeds=2)


def test_faults_are_found(audit: Audit) -> None:
    pairs = audit.pairs_table()
    names = {(Path(a).name, Path(b).name): kind for a, b, kind in zip(pairs["path_a"], pairs["path_b"], pairs["kind"], strict=True)}
    assert names["000.jpg", "smaller.jpg"] in ("hash", "features")
    assert names["001.jpg", "copy.jpg"] == "exact"
    crossing = pairs[audit.across_labels]
    assert any("boat-under-fish" in path for path in [*crossing["path_a"], *crossing["path_b"]])
    doubtful = audit.labels_table().head(6)
    moved = doubtful[doubtful["path"].str.endswith("a-car.jpg")]
    assert moved[["label", "suggested"]].to_numpy().tolist() == [["tree", "car"]]
    assert any("dark.jpg" in path for path in audit.image_issues.query("issue == 'dark'")["path"])


def test_files_say_the_same(audit: Audit, tmp_path: Path) -> None:
    written = save_audit(audit, tmp_path / "out")
    assert {file.name for file in written} == {path.name for path in (tmp_path / "out").iterdir()}
    summary = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert summary == json.loads(json.dumps(audit.summary()))
    assert summary["images"] == len(audit.images) == 84
    assert summary["pairs"]["exact"] == 2
    assert len(pd.read_csv(tmp_path / "out" / "labels.csv")) == 84
    groups = pd.read_csv(tmp_path / "out" / "groups.csv")
    assert groups["path"].str.match(r"\w+/").all()
    page = (tmp_path / "out" / "audit.html").read_text()
    assert "http" not in page.replace("http-equiv", "")
    assert "boat-under-fish.jpg" in page
    assert len(page) < 5e6


def test_odd_sets_have_an_answer(make_folder: Callable[..., Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three images a class, one of them grey with transparency; given parts are no random split."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a fork of a process with threads may hang"))
    folder = make_folder({"cat": 3, "dog": 3})
    Image.open(folder / "cat" / "0.png").convert("LA").save(folder / "cat" / "0.png")
    found = audit_images(open_images(str(folder)), seeds=2)
    assert found.leak is None
    save_audit(found, tmp_path / "out")
    text = (tmp_path / "out" / "audit.json").read_text()
    assert "NaN" not in text
    json.loads(text)


def test_leak_is_that_of_a_random_split_where_parts_are_given() -> None:
    from tests.curation.test_split import image_set

    rng = np.random.default_rng(0)
    images = image_set([(name, f"{name}{n}", "train" if n < 60 else "test") for name in "ab" for n in range(100)])
    vectors = np.repeat(rng.normal(size=(100, 80)), 2, axis=0).astype(np.float32)
    leak = measure_leak(images, vectors, np.arange(200) // 2, 3)
    assert leak is not None
    assert np.mean(leak.plain) > np.mean(leak.grouped) + 0.1


def test_leak_of_a_set_where_every_image_has_a_copy() -> None:
    """Vectors without any meaning, each occurring twice: a plain split remembers, a grouped one cannot."""
    from tests.curation.test_split import image_set

    rng = np.random.default_rng(0)
    images = image_set([(name, f"{name}{n}", "") for name in "ab" for n in range(100)])
    vectors = np.repeat(rng.normal(size=(100, 80)), 2, axis=0).astype(np.float32)
    groups = np.arange(200) // 2
    leak = measure_leak(images, vectors, groups, 4)
    assert leak is not None
    assert np.mean(leak.leaked) > 0.6
    assert np.mean(leak.plain) > np.mean(leak.grouped) + 0.15
    assert np.mean(leak.on_leaked) > np.mean(leak.on_others)
