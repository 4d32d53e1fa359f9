"""Work under way -> what a person sees of it: a bar with rate and time left, and log lines, both on stderr."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

CONSOLE = Console(stderr=True)  # one for bars and lines, so that they do not overwrite each other
LOG = logging.getLogger("seewhy")


class _ConsoleLines(logging.Handler):
    """Prints each record as a line above the bars, unwrapped."""

    def emit(self, record: logging.LogRecord) -> None:
        CONSOLE.print(record.getMessage(), soft_wrap=True, markup=False, highlight=False)


def show_log_lines() -> None:
    """Prints seewhy's log lines on stderr; the command line and the two scripts do, a library should not."""
    if not LOG.handlers:
        LOG.addHandler(_ConsoleLines())
        LOG.setLevel(logging.INFO)


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields advance(count). Draws nothing without a terminal or for no work."""
    if total == 0 or not CONSOLE.is_terminal:
        yield lambda count: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=CONSOLE, transient=True) as bar:
        task = bar.add_task(label, total=total, rate="")

        def advance(count: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=count, rate=f"{speed:.0f}/s" if speed else "")

        yield advance
