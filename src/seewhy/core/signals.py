"""Turn SIGINT and SIGTERM into KeyboardInterrupt, so that finished work is kept."""

from __future__ import annotations

import os
import signal
from typing import Any


def stop_on_signals() -> None:
    """Raise KeyboardInterrupt on the first SIGINT or SIGTERM, exit at once on the second."""

    def stop(number: int, frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, frame: os._exit(128 + number))
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
