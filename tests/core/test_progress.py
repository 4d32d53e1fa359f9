"""Long work is told of: on a terminal by a bar, elsewhere by lines with rate and time left, and in a file."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import pytest
from rich.console import Console

from seewhy.core import progress as module
from seewhy.core.progress import LOG, lines_in_notebook, log_to, progress


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_lines_with_rate_and_time_left(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "seewhy"), progress("features", 1000) as advance:
        for _ in range(10):
            clock.now += 4
            advance(100)
    # 25 images a second; a line when 10 s have gone by, none at the end
    assert [record.getMessage() for record in caplog.records] == [
        "features: 300 of 1,000 (30%), 25/s, 0:00:28 left",
        "features: 600 of 1,000 (60%), 25/s, 0:00:16 left",
        "features: 900 of 1,000 (90%), 25/s, 0:00:04 left",
    ]


def test_work_of_which_nothing_is_done_yet_has_no_rate(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    """Every piece of a shard but its last advances by 0; after 10 s of them there was a division by zero."""
    with caplog.at_level(logging.INFO, "seewhy"), progress("predict, shards", 5) as advance:
        for count in (0, 0, 1):
            clock.now += 3661
            advance(count)
    assert [record.getMessage() for record in caplog.records] == [
        "predict, shards: 0 of 5 (0%) in 1:01:01",
        "predict, shards: 0 of 5 (0%) in 2:02:02",
        "predict, shards: 1 of 5 (20%), 9.1e-05/s, 12:12:12 left",  # 4 of 5 at 3 x 3,661 s each
    ]


def test_a_bar_on_a_terminal_starts_with_nothing_done(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(module, "CONSOLE", Console(file=screen, force_terminal=True, width=100))
    with progress("predict, shards", 5) as advance:
        for count in (0, 0, 1, 4):
            clock.now += 11
            advance(count)
    assert "predict, shards" in screen.getvalue()


class Cell:
    """What IPython's `display` returns, with all that it has shown."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def update(self, data: dict[str, str], raw: bool) -> None:
        self.texts.append(data["text/plain"])


def test_in_a_notebook_one_output_is_rewritten(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "seewhy")  # what a process has that did not ask for lines
    monkeypatch.setattr(LOG, "handlers", [])
    cells: list[Cell] = []

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Cell:
        cells.append(Cell())
        cells[-1].update(data, raw)
        return cells[-1]

    monkeypatch.setattr("IPython.display.display", display)
    monkeypatch.setattr(module, "CONSOLE", Console(force_jupyter=True))
    with progress("quick", 9) as advance:
        clock.now += 0.4
        advance(9)
    assert cells == []
    with lines_in_notebook(), progress("features", 100) as advance:
        LOG.info("resnet18: [first]\nstage")
        for count in (0, 1, 49, 50):
            clock.now += 2.5
            advance(count)
    LOG.info("after it")
    (cell,) = cells
    assert cell.texts == [
        "features: 0 of 100 (0%) in 0:00:02",
        "features: 1 of 100 (1%), 0.2/s, 0:08:15 left",
        "features: 50 of 100 (50%), 6.67/s, 0:00:08 left",
        "features: 100 of 100 (100%) in 0:00:10",
        "features: 100 of 100 (100%) in 0:00:10",
    ]
    assert capsys.readouterr().out == "resnet18: [first] stage\n"
    assert (LOG.handlers, LOG.level) == ([], logging.WARNING)


def test_short_work_says_nothing(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "seewhy"):
        with progress("features", 3) as advance:
            clock.now += 9
            advance(1)
        with progress("features", 0) as advance:
            clock.now += 90
            advance(1)
    assert not caplog.records


def divide_by_zero() -> float:
    LOG.info("first")
    return 1 / 0


def test_a_log_file_holds_lines_and_the_end(tmp_path: Path) -> None:
    before = (list(LOG.handlers), LOG.level)
    with pytest.raises(ZeroDivisionError), log_to(tmp_path / "log.txt"):
        divide_by_zero()
    with pytest.raises(KeyboardInterrupt), log_to(tmp_path / "log.txt"):
        raise KeyboardInterrupt
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[0].endswith(" first")
    assert lines[1].endswith("ended by ZeroDivisionError: division by zero")
    assert lines[2] == "Traceback (most recent call last):"
    assert lines[-1].endswith("interrupted")
    assert (list(LOG.handlers), LOG.level) == before


def test_a_log_that_cannot_be_written_ends_nothing(tmp_path: Path) -> None:
    with log_to(tmp_path / "missing" / "log.txt"):
        LOG.info("first")
