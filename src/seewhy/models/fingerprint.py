"""Hash what a network computes: the structure, attributes and tensors of its modules."""

from __future__ import annotations

import functools
import hashlib
import types
from enum import Enum
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Attributes without effect in eval mode: PyTorch's own, the origin of the weights, and the number of classes (the classifier shows it).
NOT_HASHED = {*vars(nn.Module()), "num_batches_tracked", "num_classes", "default_cfg", "pretrained_cfg", "pretrained_model_args"}


def network_hash(network: nn.Module) -> str:
    """Return the sha256 of the modules' classes, attributes and tensors, and of the versions of torch and timm.

    `repr(network)` is not enough: it hides activations that are plain functions, and numbers such as the scale of an attention.
    """
    facts = [version("torch"), version("timm"), _facts_of(network, {})]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _facts_of(value: Any, seen: dict[int, int]) -> Any:
    """`value` as nested lists of strings, equal for equal values in any process. seen: number of each object so far, by id."""
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        return [str(value.dtype), tuple(value.shape), hashlib.sha256(content).hexdigest()]
    if isinstance(value, dict):
        return [[repr(key), _facts_of(item, seen)] for key, item in value.items() if str(key) not in NOT_HASHED]
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_facts_of(item, seen) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(_facts_of(item, seen)) for item in value)
    if isinstance(value, functools.partial):
        return [_facts_of(item, seen) for item in (value.func, value.args, value.keywords)]
    if isinstance(value, types.MethodType):
        return [_facts_of(item, seen) for item in (value.__func__, value.__self__)]
    if isinstance(value, types.CodeType):
        return _facts_of((value.co_code, value.co_names, value.co_consts), seen)
    local = isinstance(value, types.FunctionType) and "<" in value.__qualname__  # <lambda> and <locals> are not unique
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) and not local:
        return f"{value.__module__}.{value.__qualname__}"
    if isinstance(value, Enum) or not hasattr(value, "__dict__"):
        return repr(value)
    if id(value) in seen:
        return f"object {seen[id(value)]}"
    seen[id(value)] = len(seen)
    if local:
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__module__, value.__qualname__, _facts_of((value.__code__, cells, value.__defaults__, value.__kwdefaults__), seen)]
    attributes = {name: item for name, item in vars(value).items() if not name.endswith(("cache", "cache_map"))}  # derived from the rest
    if isinstance(value, nn.Module):
        attributes = dict(sorted(attributes.items())) | value._parameters | value._buffers | value._modules
    return [_facts_of(type(value), seen), _facts_of(attributes, seen)]
