"""A run -> files for other tools: a torchvision state_dict with class names."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import torch

from seewhy.errors import OutputError
from seewhy.run import Run


def export_state_dict(run: Run, path: Path | str) -> Path:
    """Writes {"state_dict": ..., "classes": [...]} as `torch.load(weights_only=True)` reads it.

    The names are timm's; those of `resnet18` are torchvision's too, so that
    `torchvision.models.resnet18(num_classes=len(classes)).load_state_dict(...)` takes it.
    """
    path = Path(path)
    work = path.parent / f".{path.name}.tmp"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": run.backbone.model.state_dict(), "classes": list(run.classes)}, work)
        os.replace(work, path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with suppress(OSError):  # where the folder could not be made, neither is there a file to remove
            work.unlink()
        raise OutputError(f"{path}: cannot be written ({' '.join(str(error).split())}); choose another place") from error
    return path
