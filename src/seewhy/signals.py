"""Ctrl-C and SIGTERM -> KeyboardInterrupt, so that an interrupted command keeps what is finished."""

from __future__ import annotations

import os
import signal
from typing import Any


def stop_on_signals() -> None:
    """Raise KeyboardInterrupt at the first SIGINT or SIGTERM; end the process at once at the second."""

    def stop(number: int, frame: Any) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, lambda number, frame: os._exit(128 + number))
        raise KeyboardInterrupt

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, stop)
