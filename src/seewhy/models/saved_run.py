"""Save and load runs: safetensors weights and a run.json manifest, written atomically, loaded without pickle."""

from __future__ import annotations

import math
import platform
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save

from seewhy.config import TrainConfig, dump_config, make_config
from seewhy.core.files import move_folder, remove_tree, write_json
from seewhy.errors import RunError, SeewhyError, reason_of
from seewhy.models.backbones import Backbone, rebuild_backbone
from seewhy.models.executors import Executor
from seewhy.models.manifest import AGAIN, FORMAT, read_manifest
from seewhy.models.ood import KNNReference
from seewhy.models.transforms import Preprocessing
from seewhy.models.trunk_tail import TrunkTail, split_backbone

RECORDED_PACKAGES = ("torch", "torchvision", "timm", "lightning", "numpy", "pillow", "onnxruntime")


@dataclass(frozen=True, eq=False)
class SavedRun:
    """A fitted classifier with its manifest.

    path: its folder. classes: C names, in the order of the logits. manifest: content of `run.json`.
    references: training images for the OOD score; None if the network has no vector to compare.
    executors: cache of `get_executor`, by use; filled by `predict` and `explain`.
    """

    path: Path
    config: TrainConfig
    classes: tuple[str, ...]
    backbone: Backbone
    cut: TrunkTail
    manifest: dict[str, Any]
    references: KNNReference | None = None
    executors: dict[str, dict[tuple[str, int], Executor]] = field(default_factory=lambda: defaultdict(dict))

    def __repr__(self) -> str:
        accuracy = self.metrics.get("test", {}).get("accuracy")
        suffix = f", test accuracy {accuracy:.1%}" if accuracy is not None else ""
        return f"{type(self).__name__}({str(self.path)!r}, {self.config.backbone}, {len(self.classes)} classes{suffix})"

    @property
    def metrics(self) -> dict[str, Any]:
        """Content of `metrics.json`: {"test": {"accuracy": ..., "n": ..., ...}, "val": {...}}."""
        metrics: dict[str, Any] = self.manifest["metrics"]
        return metrics

    @property
    def temperature(self) -> float:
        """Divisor of the logits that calibrates the probabilities (temperature scaling), fitted on val."""
        return float(self.manifest["calibration"]["temperature"])

    @property
    def ood_threshold(self) -> float:
        """OOD score above which an image is out of distribution; infinite if `references` is None."""
        return float(self.manifest.get("ood", {}).get("threshold", math.inf))


def installed_versions() -> dict[str, str]:
    """Versions of seewhy, Python and the packages that influence results."""
    versions = {"python": platform.python_version()}
    for name in ("seewhy", *RECORDED_PACKAGES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def make_manifest(config: TrainConfig, classes: Sequence[str], backbone: Backbone, facts: dict[str, Any]) -> dict[str, Any]:
    """Build the content of `run.json`. facts: further entries (data, split, metrics, ...)."""
    return {
        "format": FORMAT,
        "config": dump_config(config),
        "classes": list(classes),
        "backbone": {"name": backbone.name, "timm": backbone.timm_name, "weights": backbone.weights},
        "preprocessing": backbone.preprocessing.as_dict(),
        "versions": installed_versions(),
        **facts,
    }


def save_weights(backbone: Backbone, folder: Path) -> None:
    """Write all weights of the network, under timm's names, to model.safetensors."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in backbone.model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(state))  # save_file makes files that only their owner can read


def save_references(references: KNNReference, folder: Path) -> None:
    """Write ood_reference.safetensors."""
    state = {"centre": torch.from_numpy(references.centre), "unit_features": torch.from_numpy(references.unit_features)}
    (folder / "ood_reference.safetensors").write_bytes(save(state))


def finish(work: Path, target: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest and rename the folder, so that `target` is complete from its first moment, even after a power cut.

    The files for a resume are removed after the rename, so that a failure before it can be resumed.
    """
    write_json(work / "run.json", manifest)
    move_folder(work, target)
    clean_up(target)


def load(path: Path | str) -> SavedRun:
    """Load a run folder, without network access or pickle.

    Raises RunError if the folder is missing, unfinished, damaged or of another version.
    """
    path = Path(path)
    manifest = read_manifest(path)
    state = _tensors(path / "model.safetensors")
    try:
        config = make_config(**manifest["config"])
        names = manifest["backbone"]
        classes = tuple(manifest["classes"])
        # Not timm's preprocessing, whose defaults depend on the version.
        preprocessing = Preprocessing.from_dict(manifest["preprocessing"])
        backbone = rebuild_backbone(names["name"], names["timm"], len(classes), state, preprocessing, names["weights"])
        cut = split_backbone(backbone, config.unfreeze)
        references = _load_references(path, manifest, backbone)
    except RunError:
        raise
    except SeewhyError as error:
        raise RunError(f"{path}: cannot be rebuilt: {error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(f"{path / 'run.json'}: damaged ({error}); {AGAIN}") from error
    backbone.model.requires_grad_(False)
    return SavedRun(path, config, classes, backbone, cut, manifest, references)


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a safetensors file. Raises RunError if it is damaged or holds values that are not finite."""
    if not file.is_file():
        raise RunError(f"{file}: missing; {AGAIN}")
    try:
        state: dict[str, torch.Tensor] = load_file(file)
    except Exception as error:  # safetensors raises its own type for any damage
        raise RunError(f"{file}: damaged ({reason_of(error, 80)}); {AGAIN}") from error
    if invalid := [name for name, tensor in state.items() if not torch.isfinite(tensor).all()]:
        raise RunError(f"{file}: damaged ({invalid[0][:60]} has values that are not finite); {AGAIN}")
    return state


def _load_references(path: Path, manifest: dict[str, Any], backbone: Backbone) -> KNNReference | None:
    if manifest.get("ood") is None:
        return None
    file = path / "ood_reference.safetensors"
    state = _tensors(file)
    centre, unit_features = (state.get(name, torch.empty(0)) for name in ("centre", "unit_features"))
    width = getattr(cast(Any, backbone.model).get_classifier(), "in_features", None)
    if centre.ndim != 1 or unit_features.ndim != 2 or not len(unit_features) or not len(centre) == unit_features.shape[1] == width:
        raise RunError(f"{file}: damaged (vectors of other lengths than the network's); {AGAIN}")
    return KNNReference(centre.float().numpy(), unit_features.half().numpy())


def clean_up(folder: Path) -> None:
    """Remove the files for a resume from a finished run, if a kill has left them."""
    remove_tree(folder / "checkpoints")
    for name in ("config.json", "search.json"):  # run.json has their content
        with suppress(OSError):
            (folder / name).unlink(missing_ok=True)


def hardware() -> dict[str, Any]:
    """Processor, memory, GPU and threads of this machine."""
    import psutil

    return {
        "cpu": _cpu_name(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else psutil.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
