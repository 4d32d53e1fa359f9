"""Long work is told of: on a terminal by a bar, elsewhere by lines with rate and time left, and in a file."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from seewhy import progress as module
from seewhy.progress import LOG, log_to, progress


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
    # 25 pictures a second; a line when 10 s have gone by, none at the end
    assert [record.getMessage() for record in caplog.records] == [
        "features: 300 of 1,000 (30%), 25/s, 0:28 left",
        "features: 600 of 1,000 (60%), 25/s, 0:16 left",
        "features: 900 of 1,000 (90%), 25/s, 0:04 left",
    ]


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
