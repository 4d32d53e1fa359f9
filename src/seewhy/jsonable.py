"""Content -> what JSON can hold: numbers that are not finite become null, whatever depth they lie at."""

from __future__ import annotations

import math
from typing import Any


def finite(content: Any) -> Any:
    """The same content with None for nan and infinities; JSON has neither, and strict readers refuse a file that does."""
    if isinstance(content, float):
        return content if math.isfinite(content) else None
    if isinstance(content, dict):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return content
