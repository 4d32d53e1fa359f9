"""Work under way -> what a person sees of it: a bar with rate and time left, and log lines, both on stderr; the lines in a file, too."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seewhy.errors import one_line

CONSOLE = Console(stderr=True)  # one for bars and lines, so that they do not overwrite each other
LOG = logging.getLogger("seewhy")
LINE_S = 10.0  # between two lines of the same work where no bar can be drawn


class _ConsoleLines(logging.Handler):
    """Prints each record as a line above the bars, unwrapped."""

    def emit(self, record: logging.LogRecord) -> None:
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
    """Yields advance(count). A bar on a terminal; elsewhere, and in log files, a line every LINE_S seconds."""
    if total == 0:
        yield lambda count: None
        return
    advance_line = _lines(label, total)
    if not CONSOLE.is_terminal:
        yield advance_line
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
            advance_line(count)

        yield advance


def _lines(label: str, total: int) -> Callable[[int], None]:
    """advance(count) that tells now and then how far the work is, how fast, and how long it will take."""
    began = told = time.monotonic()
    done = 0

    def advance(count: int) -> None:
        nonlocal told, done
        done += count
        now = time.monotonic()
        if now - told >= LINE_S and done < total:
            told = now
            rate = done / (now - began)
            minutes, seconds = divmod(round((total - done) / rate), 60)
            line = f"{label}: {done:,} of {total:,} ({done / total:.0%}), {rate:.3g}/s, {minutes}:{seconds:02d} left"
            LOG.log(logging.DEBUG if CONSOLE.is_terminal else logging.INFO, line)

    return advance
