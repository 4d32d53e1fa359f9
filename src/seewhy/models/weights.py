"""Read pretrained weights from a file and load them into a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from seewhy.errors import WeightsError, reason_of

State = dict[str, Tensor]


def read_weights(path: Path) -> State:
    """Read the state dict of a .safetensors or torch file, at top level or under 'state_dict' or 'model', without unpickling code.

    Raises WeightsError.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and header errors
        raise WeightsError(
            f"{path}: cannot be read as weights ({reason_of(error, 100)}); pass a safetensors file or a state dict"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"{path}: has no state dict of tensors; save one with torch.save(model.state_dict(), ...)")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def load_state(model: nn.Module, state: State, source: str) -> None:
    """Copy the state of a network of the same architecture into `model`, all but its classifier.

    Raises WeightsError that names the tensors that differ.
    """
    head = classifier_names(model)
    own = {k: v for k, v in model.state_dict().items() if not under(k, head)}
    new = {k: v for k, v in state.items() if not under(k, head)}
    # torchvision's and timm's files may lack the batch counters, which evaluation does not use.
    missing = sorted(name for name in own.keys() - new.keys() if not name.endswith("num_batches_tracked"))
    unexpected = sorted(new.keys() - own.keys())
    shapes = [f"{k} {tuple(new[k].shape)} for {tuple(v.shape)}" for k, v in own.items() if k in new and new[k].shape != v.shape]
    problems = [
        f"{len(names)} {problem} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})"
        for problem, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise WeightsError(f"{source}: weights of another architecture than this {type(model).__name__}: {'; '.join(problems)}")
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in new.items()}, strict=False)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    """Names of the classifier's modules in a timm network."""
    names = cast(Any, model).pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def under(key: str, prefixes: Sequence[str]) -> bool:
    """Whether `key` names a module in `prefixes` or something inside one."""
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
