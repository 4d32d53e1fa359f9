"""Read pretrained weights (timm's, a file, a package) and load them into a network, with one line for what does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from seewhy.errors import WeightsError, reason_of

State = dict[str, Tensor]


def read_weights(path: Path) -> State:
    """Tensors of a .safetensors or torch file; nothing in it is ever executed.

    A dict of tensors, or one under 'state_dict' or 'model'.
    """
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and header errors alike: the file is not what it says
        reason = reason_of(error, 100)
        raise WeightsError(f"{path}: cannot be read as weights ({reason}); pass a safetensors file or a plain state_dict") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise WeightsError(f"{path}: holds no plain state_dict; save one with torch.save(model.state_dict(), ...)")
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def load_state(model: nn.Module, state: State, source: str) -> None:
    """Copies a state of the same architecture into `model`; its classifier stays new.

    Raises WeightsError with the difference of names and shapes where they do not match.
    """
    head = classifier_names(model)
    own = {k: v for k, v in model.state_dict().items() if not under(k, head)}
    given = {k: v for k, v in state.items() if not under(k, head)}
    missing = sorted(own.keys() - given.keys())
    unexpected = sorted(given.keys() - own.keys())
    shapes = [f"{k} {tuple(given[k].shape)} for {tuple(v.shape)}" for k, v in own.items() if k in given and given[k].shape != v.shape]
    # torchvision's and timm's own files may lack the batch counters, which evaluation never uses.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    problems = [
        f"{len(found)} {what} ({', '.join(found[:2])}{', ...' if len(found) > 2 else ''})"
        for what, found in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if found
    ]
    if problems:
        architecture = type(model).__name__
        raise WeightsError(f"{source}: weights of another architecture than this {architecture}: {'; '.join(problems)}")
    model.load_state_dict({k: v.to(own[k].dtype) for k, v in given.items()}, strict=False)


def classifier_names(model: nn.Module) -> tuple[str, ...]:
    names = cast(Any, model).pretrained_cfg.get("classifier") or ()
    return (names,) if isinstance(names, str) else tuple(names)


def under(key: str, prefixes: Sequence[str]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
