"""Change the process for the duration of a call: logger levels, warnings, environment variables."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet(*loggers: str, level: int = logging.ERROR, warnings_of: str | None = None) -> Iterator[None]:
    """Raise the levels of loggers and ignore warnings from modules that match the regular expression `warnings_of`."""
    before = {name: logging.getLogger(name).level for name in loggers}
    with warnings.catch_warnings():
        if warnings_of is not None:
            warnings.filterwarnings("ignore", module=warnings_of)
        for name in loggers:
            logging.getLogger(name).setLevel(level)
        try:
            yield
        finally:
            for name in loggers:
                logging.getLogger(name).setLevel(before[name])


@contextmanager
def environment(**values: str) -> Iterator[None]:
    """Set environment variables that the caller has not set."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
