"""An exported state_dict in torchvision's own ResNet-18."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision

from seewhy.api import Run
from seewhy.deploy.export import export_state_dict
from seewhy.errors import OutputError
from tests.cheap_run import CLASSES, cheap_run


@pytest.fixture(scope="module")
def run() -> Run:
    return cheap_run()


def test_state_dict_gives_the_same_logits_in_torchvision(run: Run, tmp_path: Path) -> None:
    written = export_state_dict(run, tmp_path / "models" / "best.pth")
    content = torch.load(written, weights_only=True)
    assert content["classes"] == list(CLASSES)
    theirs = torchvision.models.resnet18(num_classes=len(CLASSES)).eval()
    theirs.load_state_dict(content["state_dict"])  # strict: no name missing, none left over
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        ours, found = run.backbone.model(images), theirs(images)
    assert ours.abs().max() > 0.1
    np.testing.assert_allclose(found.numpy(), ours.numpy(), rtol=1e-5, atol=1e-5)


def test_replaces_an_older_file_and_leaves_nothing_else(run: Run, tmp_path: Path) -> None:
    target = tmp_path / "best.pth"
    target.write_text("old")
    export_state_dict(run, str(target))
    assert set(torch.load(target, weights_only=True)) == {"state_dict", "classes"}
    assert [path.name for path in tmp_path.iterdir()] == ["best.pth"]


@pytest.mark.parametrize("name", ["file/best.pth", "file/deeper/best.pth", "folder", "."])
def test_unwritable_place_is_one_line_and_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "file").write_text("a regular file")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OutputError, match=r"cannot be written.*choose another path") as caught:
        export_state_dict(run, name)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder"]


def test_full_disk_is_an_output_error(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("PytorchStreamWriter failed writing file:\nfile write failed")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="PytorchStreamWriter failed writing file: file write failed"):
        export_state_dict(run, tmp_path / "best.pth")
    assert list(tmp_path.iterdir()) == []
