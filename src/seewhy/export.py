"""A run -> files for other tools: a torchvision state_dict with class names."""

from __future__ import annotations

from pathlib import Path

import torch

from seewhy.errors import OutputError, reason_of
from seewhy.saved_run import SavedRun
from seewhy.writing import whole_file


def export_state_dict(run: SavedRun, path: Path | str) -> Path:
    """Writes {"state_dict": ..., "classes": [...]} as `torch.load(weights_only=True)` reads it.

    The names are timm's; those of `resnet18` are torchvision's too, so that
    `torchvision.models.resnet18(num_classes=len(classes)).load_state_dict(...)` takes it.
    """
    path = Path(path)
    with whole_file(path) as work:
        try:
            torch.save({"state_dict": run.backbone.model.state_dict(), "classes": list(run.classes)}, work)
        except RuntimeError as error:  # so torch reports a full disk
            raise OutputError(f"{path}: cannot be written ({reason_of(error)}); choose another place") from error
    return path
