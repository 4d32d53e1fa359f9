"""Backbone x how much to train -> Cut: a frozen trunk and a tail that share its parameters."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from seewhy.errors import BackboneError, ConfigError
from seewhy.models.backbones import Backbone
from seewhy.models.weights import classifier_names, under


@dataclass(frozen=True)
class TrunkTail:
    """One network as two that share its parameters: tail(trunk(x)) == model(x) in eval mode.

    trunk: (N, 3, H, W) -> features, frozen; None when everything trains.
    tail: features (or images) -> (N, classes) logits.
    place: name of the last trunk unit, 'pooled' behind the pooling, or 'input'.
    """

    trunk: nn.Module | None
    tail: nn.Module
    place: str


def _without(model: nn.Module, units: Sequence[str]) -> nn.Module:
    """A shallow copy that shares all parameters, with `units` replaced by identities."""
    clone = _shallow(model)
    for unit in units:
        *containers, name = unit.split(".")
        owner = clone
        for container in containers:
            inner = _shallow(cast(nn.Module, owner._modules[container]))
            owner._modules[container] = inner
            owner = inner
        owner._modules[name] = nn.Identity()
    return clone


def _shallow(module: nn.Module) -> nn.Module:
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone


class _Trunk(nn.Module):
    """Images -> the output of the last frozen unit, or the pooled vector."""

    def __init__(self, network: nn.Module, pooled: bool) -> None:
        super().__init__()
        self.network = network
        self.pooled = pooled

    def forward(self, images: Tensor) -> Tensor:
        network = cast(Any, self.network)
        features: Tensor = network.forward_features(images)
        if self.pooled:
            features = network.forward_head(features, pre_logits=True)
        return features


class _Tail(nn.Module):
    """Features -> logits through the unfrozen units and the head."""

    def __init__(self, model: nn.Module, units: Sequence[str], all_units: Sequence[str]) -> None:
        super().__init__()
        self.units = nn.Sequential(*(model.get_submodule(unit) for unit in units))
        self.head = _without(model, all_units)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = cast(Any, self.head).forward_head(self.units(features))
        return logits


def split_backbone(backbone: Backbone, unfreeze: int | str) -> TrunkTail:
    """Freezes all but the `unfreeze` deepest stages and the classifier; sets requires_grad accordingly.

    Raises ConfigError for more stages than there are, BackboneError where the network is no chain at that place.
    """
    model, stages = backbone.model, backbone.stages
    model.requires_grad_(unfreeze == "all")
    classifier = cast(nn.Module, cast(Any, model).get_classifier())
    classifier.requires_grad_(True)
    if unfreeze == "all":
        return TrunkTail(None, model, "input")
    if unfreeze == 0:
        trained = [*classifier_names(model), *(name for name, module in model.named_modules() if module is classifier)]
        cut = TrunkTail(_Trunk(_without(model, trained), pooled=True), classifier, "pooled")
        _check_cut(backbone, cut)
        return cut
    count = int(unfreeze)
    if count >= len(stages):
        raise ConfigError(f"--unfreeze {count}: {backbone.name} has {len(stages)} stages; use 0 to {len(stages) - 1}, or all")
    units = [unit for stage in stages for unit in stage]
    first = sum(len(stage) for stage in stages[:-count])
    for unit in units[first:]:
        model.get_submodule(unit).requires_grad_(True)
    head = _head_modules(model, units)
    for head_module in head.values():
        head_module.requires_grad_(True)
    # The trunk holds frozen weights alone: they are its identity in the cache.
    cut = TrunkTail(_Trunk(_without(model, [*units[first:], *head]), pooled=False), _Tail(model, units[first:], units), units[first - 1])
    _check_cut(backbone, cut)
    return cut


class WithPenultimate(nn.Module):
    """What feeds `cut.tail` (or images, for all of a network) -> (N, C + K): logits, then the vector that the classifier reads."""

    def __init__(self, model: nn.Module, tail: nn.Module) -> None:
        super().__init__()
        self.classifier = cast(nn.Module, cast(Any, model).get_classifier())
        self.tail = tail

    def forward(self, inputs: Tensor) -> Tensor:
        tail = cast(Any, self.tail)
        if self.tail is self.classifier:
            vector = inputs
        elif isinstance(self.tail, _Tail):
            vector = tail.head.forward_head(tail.units(inputs), pre_logits=True)
        else:
            vector = tail.forward_head(tail.forward_features(inputs), pre_logits=True)
        return torch.cat([self.classifier(vector), vector], dim=1)


def with_penultimate(backbone: Backbone, tail: nn.Module) -> WithPenultimate | None:
    """The tail (or the network itself) with the classifier's input beside its logits; None where its head is of another kind."""
    model, size = backbone.model, backbone.preprocessing.size
    wrapped = WithPenultimate(model, model).eval()
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.inference_mode():
            logits, found = model.eval()(image), wrapped(image)
        same = found.ndim == 2 and torch.allclose(logits, found[:, : logits.shape[1]], rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError):
        same = False
    return WithPenultimate(model, tail).eval() if same else None


def _head_modules(model: nn.Module, units: Sequence[str]) -> dict[str, nn.Module]:
    """Children that `forward_features` does not run: pooling, last norm, classifier."""
    owners = {unit.split(".")[0] for unit in units}
    return {name: child for name, child in model.named_children() if name not in owners}


@torch.inference_mode()
def _check_cut(backbone: Backbone, cut: TrunkTail) -> None:
    """The two halves must do what the whole does; networks with side roads around the cut do not."""
    size = backbone.preprocessing.size
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        whole = backbone.model.eval()(image)
        halves = cut.tail.eval()(cast(nn.Module, cut.trunk).eval()(image))
        same = torch.allclose(whole, halves, rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError):
        same = False
    if not same:
        way_out = "use --unfreeze 1 or all" if cut.place == "pooled" else "use --unfreeze 0 or all"
        raise BackboneError(f"{backbone.name} cannot be cut behind {cut.place!r} (it is no plain chain); {way_out}")


def parameter_stages(backbone: Backbone) -> dict[str, int]:
    """Trainable parameter name -> how many stages below the classifier it lies (0 = head, 1 = deepest stage, ...)."""
    depth = {unit: len(backbone.stages) - s for s, stage in enumerate(backbone.stages) for unit in stage}
    found = {}
    for name, parameter in backbone.model.named_parameters():
        if parameter.requires_grad:
            unit = next((u for u in depth if under(name, (u,))), None)
            # Parameters of the network itself (class token, positions) belong to its first stage.
            at_root = "." not in name
            found[name] = depth[unit] if unit else (len(backbone.stages) if at_root else 0)
    return found
