"""Hash all that decides what a network computes: the structure, attributes and tensors of its modules."""

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

# What decides nothing in eval mode: PyTorch's own state of a module, the record of where weights came from, and the number of
# classes, which shows in the classifier, and a trunk has none.
NOT_HASHED = {*vars(nn.Module()), "num_batches_tracked", "num_classes", "default_cfg", "pretrained_cfg", "pretrained_model_args"}


def network_hash(network: nn.Module) -> str:
    """sha256 of all that decides what `network` computes in eval mode: classes, attributes and tensors of its modules, versions of code.

    `repr(network)` would not do: it hides activations held as plain functions, and numbers such as an attention's scale.
    """
    facts = [version("torch"), version("timm"), _facts_of(network, {})]
    return hashlib.sha256(repr(facts).encode()).hexdigest()


def _facts_of(value: Any, seen: dict[int, int]) -> Any:
    """`value` as nested lists of texts, equal for equal values in any process. seen: id -> number of each object met so far."""
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
    local = isinstance(value, types.FunctionType) and "<" in value.__qualname__  # <lambda>, <locals>: others may have the name too
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
    held = {name: item for name, item in vars(value).items() if not name.endswith(("cache", "cache_map"))}  # made from the rest
    if isinstance(value, nn.Module):
        held = dict(sorted(held.items())) | value._parameters | value._buffers | value._modules
    return [_facts_of(type(value), seen), _facts_of(held, seen)]
