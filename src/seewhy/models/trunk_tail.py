"""Split a backbone into a frozen trunk and a trainable tail that share its parameters."""

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

    trunk: frozen, maps (N, 3, H, W) normalised images to features; None if the whole network trains.
    tail: maps features (or images) to (N, classes) logits.
    cut_point: name of the last unit of the trunk, 'pooled' after the pooling, or 'input'.
    """

    trunk: nn.Module | None
    tail: nn.Module
    cut_point: str


def _without(model: nn.Module, units: Sequence[str]) -> nn.Module:
    """Copy the modules, sharing all parameters, with `units` replaced by identities."""
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
    """Map images to the output of the last frozen unit, or to the pooled vector."""

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
    """Map features to logits by the unfrozen units and the head."""

    def __init__(self, model: nn.Module, units: Sequence[str], all_units: Sequence[str]) -> None:
        super().__init__()
        self.units = nn.Sequential(*(model.get_submodule(unit) for unit in units))
        self.head = _without(model, all_units)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = cast(Any, self.head).forward_head(self.units(features))
        return logits


def split_backbone(backbone: Backbone, unfreeze: int | str) -> TrunkTail:
    """Freeze all but the `unfreeze` deepest stages and the classifier, by requires_grad, and split there.

    Raises ConfigError for more stages than there are, BackboneError if trunk and tail do not compute what the network does.
    """
    model, stages = backbone.model, backbone.stages
    model.requires_grad_(unfreeze == "all")
    classifier = cast(nn.Module, cast(Any, model).get_classifier())
    classifier.requires_grad_(True)
    if unfreeze == "all":
        return TrunkTail(None, model, "input")
    if unfreeze == 0:
        trained = [*classifier_names(model), *(name for name, module in model.named_modules() if module is classifier)]
        return _checked(backbone, TrunkTail(_Trunk(_without(model, trained), pooled=True), classifier, "pooled"))
    count = int(unfreeze)
    if count >= len(stages):
        raise ConfigError(f"--unfreeze {count}: {backbone.name} has {len(stages)} stages; use 0 to {len(stages) - 1}, or all")
    units = [unit for stage in stages for unit in stage]
    first = sum(len(stage) for stage in stages[:-count])
    containers = {unit.split(".")[0] for unit in units}
    head = [name for name, _ in model.named_children() if name not in containers]  # not run by forward_features: pooling, norm, classifier
    for name in (*units[first:], *head):
        model.get_submodule(name).requires_grad_(True)
    # The trunk contains only frozen weights, since their hash is its key in the cache.
    trunk = _Trunk(_without(model, [*units[first:], *head]), pooled=False)
    return _checked(backbone, TrunkTail(trunk, _Tail(model, units[first:], units), units[first - 1]))


class WithPenultimate(nn.Module):
    """Map the input of `tail` to (N, C + K): C logits, then the K inputs of the classifier."""

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
    """Wrap the tail, or the network itself, so that it also returns the classifier's input; None if the head has another structure."""
    model = backbone.model
    wrapped = WithPenultimate(model, model).eval()
    return WithPenultimate(model, tail).eval() if _same_logits(backbone, wrapped) else None


@torch.inference_mode()
def _same_logits(backbone: Backbone, network: nn.Module) -> bool:
    """Whether the first columns of the network's output are the backbone's logits, on a random image."""
    size = backbone.preprocessing.size
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    try:
        logits, output = backbone.model.eval()(image), network.eval()(image)
        return output.ndim == 2 and torch.allclose(logits, output[:, : logits.shape[1]], rtol=1e-4, atol=1e-5)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, AssertionError):
        return False


def _checked(backbone: Backbone, cut: TrunkTail) -> TrunkTail:
    """Raise BackboneError unless tail(trunk(x)) == model(x); a skip connection around the cut point breaks this."""
    if not _same_logits(backbone, nn.Sequential(cast(nn.Module, cut.trunk), cut.tail)):
        remedy = "use --unfreeze 1 or all" if cut.cut_point == "pooled" else "use --unfreeze 0 or all"
        raise BackboneError(f"{backbone.name} cannot be split after {cut.cut_point!r} (it is not a sequence of units there); {remedy}")
    return cut


def parameter_stages(backbone: Backbone) -> dict[str, int]:
    """Depth of each trainable parameter below the classifier, by name: 0 = head, 1 = deepest stage, ..."""
    depth = {unit: len(backbone.stages) - s for s, stage in enumerate(backbone.stages) for unit in stage}
    depths = {}
    for name, parameter in backbone.model.named_parameters():
        if parameter.requires_grad:
            unit = next((u for u in depth if under(name, (u,))), None)
            # Parameters of the network itself (class token, positions) belong to its first stage.
            at_root = "." not in name
            depths[name] = depth[unit] if unit else (len(backbone.stages) if at_root else 0)
    return depths
