"""Train an image classifier on your own images in minutes on a laptop, and see why it predicts what it predicts."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from seewhy.version import __version__ as __version__

if TYPE_CHECKING:
    from seewhy.api import Run, load, pull, train
    from seewhy.config import TrainConfig
    from seewhy.curation.split import Split, split_images
    from seewhy.data.image_set import ImageSet, open_images
    from seewhy.deploy.export import export_state_dict
    from seewhy.errors import (
        BackboneError,
        ConfigError,
        DataError,
        ImageError,
        OutputError,
        RunError,
        SeewhyError,
        SplitError,
        StorageUnavailableError,
        WeightsError,
    )
    from seewhy.evaluation.evaluate import Evaluation
    from seewhy.explain.explainer import Explanation
    from seewhy.inference.predictions import Predictions

__all__ = [
    "BackboneError",
    "ConfigError",
    "DataError",
    "Evaluation",
    "Explanation",
    "ImageError",
    "ImageSet",
    "OutputError",
    "Predictions",
    "Run",
    "RunError",
    "SeewhyError",
    "Split",
    "SplitError",
    "StorageUnavailableError",
    "TrainConfig",
    "WeightsError",
    "export_state_dict",
    "load",
    "open_images",
    "pull",
    "split_images",
    "train",
]

# Importing torch and timm takes seconds, so each name is imported on first use.
_MODULES = {
    "api": ("Run", "load", "pull", "train"),
    "config": ("TrainConfig",),
    "errors": tuple(name for name in __all__ if name.endswith("Error")),
    "evaluation.evaluate": ("Evaluation",),
    "explain.explainer": ("Explanation",),
    "deploy.export": ("export_state_dict",),
    "data.image_set": ("ImageSet", "open_images"),
    "inference.predictions": ("Predictions",),
    "curation.split": ("Split", "split_images"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(f"seewhy.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'seewhy' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
