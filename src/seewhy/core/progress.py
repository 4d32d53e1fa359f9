"""Work under way -> what a person sees of it: a bar on a terminal, a line in a notebook's cell, log lines; the lines in a file, too."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seewhy.errors import one_line

CONSOLE = Console(stderr=True)  # one for bars and lines, so that they do not overwrite each other
LOG = logging.getLogger("seewhy")
LINE_S = 10.0  # between two lines of the same work where no bar can be drawn
CELL_S = 0.5  # between two states of the same line in a notebook


class _ConsoleLines(logging.Handler):
    """Prints each record as a line: above the bars, unwrapped, or in the cell of a notebook, on stdout since stderr is red there."""

    def emit(self, record: logging.LogRecord) -> None:
        if CONSOLE.is_jupyter:
            print(one_line(record.getMessage()))
            return
        CONSOLE.print(one_line(record.getMessage()), soft_wrap=True, markup=False, highlight=False)


class _FileLines(logging.Handler):
    """Lines with their time. A log that cannot be written, on a full disk say, does not end what it tells of."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        # Opened for each line: a folder with an open file in it cannot be renamed everywhere.
        with suppress(OSError), self.file.open("a", encoding="utf-8") as file:
            plain = logging.makeLogRecord({**vars(record), "msg": one_line(record.getMessage()), "args": None})
            file.write(self.format(plain) + "\n")


def show_log_lines() -> None:
    """Prints seewhy's log lines on stderr; the command line and the two scripts do, a library should not."""
    if not any(isinstance(handler, _ConsoleLines) for handler in LOG.handlers):
        LOG.addHandler(_ConsoleLines(logging.INFO))
        LOG.setLevel(logging.INFO)


@contextmanager
def lines_in_notebook() -> Iterator[None]:
    """In a notebook, prints seewhy's log lines in the cell meanwhile, unless the caller has asked for them already."""
    if not CONSOLE.is_jupyter or LOG.isEnabledFor(logging.INFO):
        yield
        return
    handler, before = _ConsoleLines(logging.INFO), LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.INFO)
    try:
        yield
    finally:
        LOG.setLevel(before)
        LOG.removeHandler(handler)


@contextmanager
def log_to(file: Path) -> Iterator[None]:
    """Appends seewhy's log lines to a file too, with their times; an error that ends the work is written with its traceback."""
    handler = _FileLines(file)
    before = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(logging.DEBUG)
    try:
        yield
    except KeyboardInterrupt:
        LOG.debug("interrupted")
        raise
    except BaseException as error:
        LOG.debug(f"ended by {type(error).__name__}: {error}", exc_info=True)
        raise
    finally:
        LOG.setLevel(before)
        LOG.removeHandler(handler)


@contextmanager
def silent() -> Iterator[None]:
    """No bars and no lines meanwhile."""
    before = CONSOLE.quiet, LOG.level
    CONSOLE.quiet = True
    LOG.setLevel(logging.ERROR)
    try:
        yield
    finally:
        CONSOLE.quiet = before[0]
        LOG.setLevel(before[1])


@contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields advance(count). A bar on a terminal, a line that changes in a notebook; elsewhere a line every LINE_S seconds.

    Log files have those lines in any case.
    """
    if total == 0:
        yield lambda count: None
    elif CONSOLE.is_jupyter and not CONSOLE.quiet:
        with _cell_line(label, total) as advance:
            yield advance
    elif CONSOLE.is_terminal:
        with _bar(label, total) as advance:
            yield advance
    else:
        yield _lines(label, total, logging.INFO)


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    advance_line = _lines(label, total, logging.DEBUG)
    with Progress(*columns, console=CONSOLE, transient=True) as bar:
        task = bar.add_task(label, total=total, rate="")

        def advance(count: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=count, rate=f"{speed:.0f}/s" if speed else "")
            advance_line(count)

        yield advance


@contextmanager
def _cell_line(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """One output of the notebook's cell, rewritten every CELL_S seconds: rich's own bar needs ipywidgets to be rewritten."""
    from IPython.display import display

    advance_line = _lines(label, total, logging.DEBUG)
    began = shown = time.monotonic()
    done = 0
    cell: Any = None

    def show(now: float) -> None:
        nonlocal cell, shown
        shown, text = now, {"text/plain": _state(label, done, total, now - began)}
        if cell is None:
            cell = display(text, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            cell.update(text, raw=True)

    def advance(count: int) -> None:
        nonlocal done
        done += count
        advance_line(count)
        if (now := time.monotonic()) - shown >= CELL_S:
            show(now)

    try:
        yield advance
    finally:
        if cell is not None:
            show(time.monotonic())


def _lines(label: str, total: int, level: int) -> Callable[[int], None]:
    """advance(count) that logs now and then how far the work is."""
    began = told = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal told, done
        done += count
        now = time.monotonic()
        if now - told >= LINE_S and done < total:
            told = now
            LOG.log(level, _state(label, done, total, now - began))

    return advance


def _state(label: str, done: int, total: int, seconds: float) -> str:
    """How far the work is after `seconds`, how fast, and how long the rest will take; h:mm:ss."""
    line = f"{label}: {done:,} of {total:,} ({done / total:.0%})"
    if 0 < done < total:  # nothing done: no rate yet
        return f"{line}, {done / seconds:.3g}/s, {timedelta(seconds=round((total - done) * seconds / done))} left"
    return f"{line} in {timedelta(seconds=round(seconds))}"
