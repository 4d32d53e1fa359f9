"""Show progress: a bar on a terminal, a line in a notebook's cell, else log lines; write the log lines to a file too."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from seewhy.core.process_state import quiet
from seewhy.errors import one_line

CONSOLE = Console(stderr=True)  # one for bars and lines, so that they do not overwrite each other
LOG = logging.getLogger("seewhy")
LINE_S = 10.0  # seconds between two log lines of the same work
CELL_S = 0.5  # seconds between two updates of a notebook's cell


class _ConsoleHandler(logging.Handler):
    """Print each record as a line, above the bars; in a notebook on stdout, since stderr is red there."""

    def emit(self, record: logging.LogRecord) -> None:
        line = one_line(record.getMessage())
        if CONSOLE.is_jupyter:
            print(line)
        else:
            CONSOLE.print(line, soft_wrap=True, markup=False, highlight=False)


class _FileHandler(logging.Handler):
    """Append each record to a file, with its time; a full disk does not stop the program."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.setFormatter(logging.Formatter("%(asctime)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        # Open the file for each line: on Windows a folder with an open file cannot be renamed.
        with suppress(OSError), self.file.open("a", encoding="utf-8") as file:
            plain = logging.makeLogRecord({**vars(record), "msg": one_line(record.getMessage()), "args": None})
            file.write(self.format(plain) + "\n")


def show_log_lines() -> None:
    """Print seewhy's log lines on stderr, for the command line and the scripts."""
    if not any(isinstance(handler, _ConsoleHandler) for handler in LOG.handlers):
        LOG.addHandler(_ConsoleHandler(logging.INFO))
        LOG.setLevel(logging.INFO)


@contextmanager
def _handler(handler: logging.Handler, level: int) -> Iterator[None]:
    before = LOG.level
    LOG.addHandler(handler)
    LOG.setLevel(level)
    try:
        yield
    finally:
        LOG.setLevel(before)
        LOG.removeHandler(handler)


@contextmanager
def lines_in_notebook() -> Iterator[None]:
    """Print seewhy's log lines in the notebook's cell, unless the caller shows them already."""
    needed = CONSOLE.is_jupyter and not LOG.isEnabledFor(logging.INFO)
    with _handler(_ConsoleHandler(logging.INFO), logging.INFO) if needed else nullcontext():
        yield


@contextmanager
def log_to(file: Path) -> Iterator[None]:
    """Append seewhy's log lines to a file, with their times and the traceback of an error that ends the block."""
    with _handler(_FileHandler(file), logging.DEBUG):
        try:
            yield
        except KeyboardInterrupt:
            LOG.debug("interrupted")
            raise
        except BaseException as error:
            LOG.debug(f"ended by {type(error).__name__}: {error}", exc_info=True)
            raise


@contextmanager
def silent() -> Iterator[None]:
    """Suppress bars and log lines."""
    before = CONSOLE.quiet
    CONSOLE.quiet = True
    with quiet(LOG.name):
        try:
            yield
        finally:
            CONSOLE.quiet = before


def progress(label: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Provide advance(count), which updates a bar on a terminal or a line in a notebook, else logs a line every LINE_S seconds."""
    if total == 0:
        return nullcontext(lambda count: None)
    if CONSOLE.is_jupyter and not CONSOLE.quiet:
        return _cell_line(label, total)
    return _bar(label, total) if CONSOLE.is_terminal else nullcontext(_log_lines(label, total, logging.INFO))


class _Meter:
    """Count finished items; call `show` with the state at most once every `interval_s` seconds."""

    def __init__(self, label: str, total: int, interval_s: float, show: Callable[[str], None]) -> None:
        self.label, self.total, self.interval_s, self.show = label, total, interval_s, show
        self.done = 0
        self.start = self.last_shown = time.monotonic()

    def advance(self, count: int) -> None:
        self.done += count
        if (now := time.monotonic()) - self.last_shown >= self.interval_s:
            self.last_shown = now
            self.show(self.state())

    def state(self) -> str:
        """Items done, items per second, and the time left as h:mm:ss."""
        done, total, seconds = self.done, self.total, time.monotonic() - self.start
        line = f"{self.label}: {done:,} of {total:,} ({done / total:.0%})"
        if 0 < done < total:
            return f"{line}, {done / seconds:.3g}/s, {timedelta(seconds=round((total - done) * seconds / done))} left"
        return f"{line} in {timedelta(seconds=round(seconds))}"


def _log_lines(label: str, total: int, level: int) -> Callable[[int], None]:
    """advance(count) that logs the state every LINE_S seconds until all is done."""
    meter = _Meter(label, total, LINE_S, lambda state: LOG.log(level, state) if meter.done < total else None)
    return meter.advance


@contextmanager
def _bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn()
    log_lines = _log_lines(label, total, logging.DEBUG)
    with Progress(*columns, console=CONSOLE, transient=True) as bar:
        task = bar.add_task(label, total=total, rate="")

        def advance(count: int) -> None:
            speed = bar.tasks[0].speed
            bar.update(task, advance=count, rate=f"{speed:.0f}/s" if speed else "")
            log_lines(count)

        yield advance


@contextmanager
def _cell_line(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """One output of a notebook's cell, rewritten every CELL_S seconds; rich's own bar would need ipywidgets."""
    from IPython.display import display

    cell: Any = None

    def show(state: str) -> None:
        nonlocal cell
        if cell is None:
            cell = display({"text/plain": state}, raw=True, display_id=True)  # type: ignore[no-untyped-call]
        else:
            cell.update({"text/plain": state}, raw=True)

    meter, log_lines = _Meter(label, total, CELL_S, show), _log_lines(label, total, logging.DEBUG)

    def advance(count: int) -> None:
        log_lines(count)
        meter.advance(count)

    try:
        yield advance
    finally:
        if cell is not None:
            show(meter.state())
