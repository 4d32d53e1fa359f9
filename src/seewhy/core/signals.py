"""Turn SIGINT and SIGTERM into KeyboardInterrupt, so that finished work is kept."""

from __future__ import annotations

import os
import signal
from typing import Any


def stop_on_signals() -> None:
    """Ctrl-C, or SIGTERM, once: KeyboardInterrupt, so that what is finished is kept; twice: the end, at once."""

    def stop(number: int, frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, frame: os._exit(128 + number))
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
