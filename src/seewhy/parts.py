"""Blocks of a long table -> parts on the disk -> one file; the same request goes on where an earlier one was stopped."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from seewhy.errors import OutputError
from seewhy.predictions import Columns, check_table, open_table
from seewhy.progress import LOG
from seewhy.shards import stamp
from seewhy.version import __version__
from seewhy.writing import claim, whole_file

Bad = Sequence[tuple[str, str]]


@dataclass
class Parts:
    """A hidden folder beside `out` with a file a finished block, named by the number of pictures that are done with it.

    done: pictures that need not be asked about again, in the order of the request. rows: those of them that could be answered.
    """

    out: Path
    folder: Path
    done: int = 0
    rows: int = 0

    def add(self, columns: Columns, bad: Bad) -> None:
        """A block: its rows, and (path, reason) of what was left out of it."""
        done = self.done + len(columns["path"]) + len(bad)
        with whole_file(
            self.folder / f"{done:012d}.json", f"free some space, and give the same command again: it goes on after {self.done:,}"
        ) as work:
            work.write_text(json.dumps({"columns": columns, "bad": list(bad)}), encoding="utf-8")
        self.done = done
        self.rows += len(columns["path"])

    def blocks(self) -> Iterator[tuple[Columns, Bad]]:
        """All finished blocks, in order."""
        for file in _finished(self.folder):
            block = json.loads(file.read_text(encoding="utf-8"))
            yield block["columns"], [(path, reason) for path, reason in block["bad"]]

    def join(self) -> int:
        """Writes `out`; the number of rows."""
        count = 0
        with open_table(self.out) as write:
            for columns, _ in self.blocks():
                if columns["path"]:
                    write(columns)
                count += len(columns["path"])
        return count


def request_of(asked: Path, paths: Sequence[Path], **options: Any) -> dict[str, Any]:
    """What decides a table: who is asked, about which files (by path, size and time), and how."""
    found = hashlib.sha256()
    for path in itertools.chain([asked / "run.json" if asked.is_dir() else asked], paths):  # no list: a Path takes 400 bytes
        with suppress(OSError):  # a file that is missing will be told of when it is read
            found.update(f"{stamp(path)}\n".encode())
    return {"seewhy": __version__, "files": found.hexdigest(), "pictures": len(paths), **options}


@contextmanager
def open_parts(out: Path, request: dict[str, Any]) -> Iterator[Parts]:
    """The parts of `out`, those of the same request that was stopped included; kept where this one is stopped, too.

    Raises OutputError where another process writes `out`, or its folder cannot be written.
    """
    check_table(out)
    parts = Parts(out, out.parent / f".{out.name}.partial")
    try:
        let_go = claim(out)
    except Timeout as error:
        raise OutputError(f"{out}: another process writes it right now; choose another --out") from error
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        _begin(parts, request)
        yield parts
        parts.rows = 0  # the table is whole
    finally:
        if parts.rows:
            LOG.info(f"{out}: {parts.done:,} of {request['pictures']:,} pictures are done and kept; the same command goes on after them")
        else:
            shutil.rmtree(parts.folder, ignore_errors=True)
        let_go()


def _begin(parts: Parts, request: dict[str, Any]) -> None:
    record = parts.folder / "request.json"
    with suppress(OSError, ValueError):
        if json.loads(record.read_text(encoding="utf-8")) == request:
            finished = _finished(parts.folder)
            parts.done = int(finished[-1].stem) if finished else 0
            parts.rows = sum(len(columns["path"]) for columns, _ in parts.blocks())
            if parts.done:
                LOG.info(f"going on after {parts.done:,} of {request['pictures']:,} pictures")
            return
    shutil.rmtree(parts.folder, ignore_errors=True)  # of another request, which nobody will go on with under this name
    with whole_file(record, "choose another --out") as work:
        work.write_text(json.dumps(request), encoding="utf-8")


def _finished(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.json") if file.stem.isdigit())
