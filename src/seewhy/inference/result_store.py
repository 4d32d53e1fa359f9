"""Resumable results: chunks of rows kept as part files, in a folder or a bucket, until one table is made of them."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seewhy.core.files import locked
from seewhy.core.parallel import Bad
from seewhy.data.remote import is_address, join_path, list_names, open_file, remove_file, without_options, write_atomic
from seewhy.errors import OutputError
from seewhy.inference.predictions import WRITERS, Columns, check_table, open_table, unreadable_error
from seewhy.inference.work_units import RECORD

ERRORS_TABLE = "_errors.parquet"  # readers of folders of parquet pass over names that begin with _
PART = re.compile(r"part-([0-9a-f]{16})-(\d{5})(-last)?\.(?:parquet|json)")
ARROW = {str: "string", float: "float64", int: "int64", bool: "bool_", bytes: "binary"}
MOST_ROWS, MOST_BYTES = 8192, 32_000_000  # of a chunk, so that no part is too large


@dataclass
class Chunk:
    """Rows of answers in the order of the images, columns by name, and what was left out."""

    columns: Columns = field(default_factory=dict)
    bad: Bad = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.columns.get("path", ()))


@dataclass(frozen=True)
class ChunkResult:
    """A piece that a worker has finished. source: position among those asked for. number: of the piece in its source, from 0.

    last: whether it is the source's last one.
    """

    source: int
    number: int
    last: bool
    piece: Chunk


def gathered(small: Iterator[Chunk]) -> Iterator[Chunk]:
    """Merge pieces into ones of up to MOST_ROWS images or MOST_BYTES of values."""
    held, weight = Chunk(), 0
    for piece in small:
        for name, values in piece.columns.items():
            held.columns.setdefault(name, []).extend(values)
            weight += sum(len(value) for value in values if isinstance(value, bytes))
        held.bad += piece.bad
        if held.rows + len(held.bad) >= MOST_ROWS or weight >= MOST_BYTES:
            yield held
            held, weight = Chunk(), 0
    if held.rows or held.bad:
        yield held


# ---------------------------------------------------------------- part files


def encode(piece: Chunk, types: Mapping[str, type], suffix: str) -> bytes:
    """A piece as a part file. types: of its columns.

    .parquet: the rows, and as metadata what was left out. .json: a line of the number of rows and what was left out, a line of the columns;
    for tables that are written where pyarrow is not installed.
    """
    if suffix == ".json":
        head = {"rows": piece.rows, "bad": piece.bad}
        return b"\n".join(json.dumps(line).encode() for line in (head, piece.columns))
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, getattr(pa, ARROW[kind])()) for name, kind in types.items()], {"bad": json.dumps(piece.bad)})
    file = io.BytesIO()
    pq.write_table(pa.table({name: piece.columns.get(name, []) for name in types}, schema=schema), file)
    return file.getvalue()


def decode(place: str) -> Chunk:
    """The piece in a part file."""
    with open_file(place) as file:
        data = file.read()
    if place.endswith(".json"):
        head, columns = map(json.loads, data.split(b"\n"))
        return Chunk(columns, _pairs(head["bad"]))
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    return Chunk(table.to_pydict(), _pairs(json.loads(table.schema.metadata[b"bad"])))


def read_head(place: str) -> tuple[int, Bad]:
    """The number of rows of a part file, and what was left out, without reading its rows: heatmaps are large."""
    with open_file(place) as file:
        if place.endswith(".json"):
            head = json.loads(file.readline())
            return head["rows"], _pairs(head["bad"])
        import pyarrow.parquet as pq

        footer = pq.read_metadata(file)
    return footer.num_rows, _pairs(json.loads(footer.metadata[b"bad"]))


def _pairs(lists: Sequence[Sequence[str]]) -> Bad:
    return [(name, reason) for name, reason in lists]


# ---------------------------------------------------------------- the store


@dataclass
class Store:
    """Where parts are kept: a hidden folder beside a table, or the folder of the dataset itself.

    place: path or address. request: what all parts in it answer. types: of their columns. suffix: of the parts, .parquet or .json.
    finished: keys of sources -> how many parts they have.
    """

    place: str
    request: dict[str, Any]
    types: Mapping[str, type]
    suffix: str = ".parquet"
    finished: dict[str, int] = field(default_factory=dict)

    def open(self, own: bool) -> None:
        """Read what is there. own: whether parts of another request may be thrown away; else OutputError."""
        names = list_names(self.place)
        known: Any = None
        if RECORD in names:
            with suppress(ValueError), open_file(join_path(self.place, RECORD)) as file:
                known = json.loads(file.read())
        if known != self.request:
            if own:
                shutil.rmtree(self.place, ignore_errors=True)
            elif names:
                what = "answers to another request" if known else "other files"
                raise OutputError(f"{without_options(self.place)}: holds {what}; choose another --out, or remove it")
            write_atomic(join_path(self.place, RECORD), json.dumps(self.request).encode())
            return
        counts: dict[str, set[int]] = {}
        ends: dict[str, int] = {}
        for name in names:
            if (match := PART.fullmatch(name)) and name.endswith(self.suffix):
                key, number = match[1], int(match[2])
                counts.setdefault(key, set()).add(number)
                if match[3]:
                    ends[key] = number + 1
        self.finished = {key: end for key, end in ends.items() if counts[key] >= set(range(end))}

    def add(self, key: str, outcome: ChunkResult) -> None:
        """Keep a piece; the same one again takes its own place."""
        write_atomic(self._part(key, outcome.number, outcome.last), encode(outcome.piece, self.types, self.suffix))
        if outcome.last:
            self.finished[key] = outcome.number + 1

    def pieces(self, keys: Sequence[str]) -> Iterator[Chunk]:
        """All pieces of these sources, in order."""
        return map(decode, self._parts(keys))

    def heads(self, keys: Sequence[str]) -> Iterator[tuple[int, Bad]]:
        """The number of rows of each piece, and what was left out, in the same order."""
        return map(read_head, self._parts(keys))

    def drop_others(self, keys: Sequence[str]) -> None:
        """Remove parts that no longer belong to what was asked for."""
        wanted = set(self._parts(keys))
        for name in list_names(self.place):
            if PART.fullmatch(name) and join_path(self.place, name) not in wanted:
                remove_file(join_path(self.place, name))

    def _parts(self, keys: Sequence[str]) -> Iterator[str]:
        for key in keys:
            for number in range(self.finished[key]):
                yield self._part(key, number, number == self.finished[key] - 1)

    def _part(self, key: str, number: int, last: bool) -> str:
        return join_path(self.place, f"part-{key}-{number:05d}{'-last' if last else ''}{self.suffix}")


# ---------------------------------------------------------------- what becomes of the parts


def is_folder(out: str) -> bool:
    """Whether results stay a folder of parquet parts: where `out` is an address, ends in '/' or is a folder already."""
    return is_address(out) or out.endswith("/") or Path(out).is_dir()


def errors_path(out: str) -> str:
    """Where the images that were left out are listed: preds.csv -> preds.bad.csv; in a folder, ERRORS_TABLE."""
    return join_path(out, ERRORS_TABLE) if is_folder(out) else str(Path(out).with_suffix(f".bad{Path(out).suffix}"))


@contextmanager
def open_store(out: str, request: dict[str, Any], types: Mapping[str, type]) -> Iterator[Store]:
    """The store of `out` with what is finished of the same request, for one process at a time where the place is on this machine.

    Parts of a table are removed when it is whole, or where no source was finished; those of a folder are the result.
    Raises OutputError for a place that cannot be written or holds something else.
    """
    if is_address(out):
        store = Store(out, request, types)
        store.open(own=False)
        yield store
        return
    path, folder = Path(out), is_folder(out)
    if not folder:
        check_table(path)
    with locked(path):
        store = Store(str(path), request, types) if folder else Store(str(path.parent / f".{path.name}.parts"), request, types)
        if not folder and path.suffix != ".parquet":
            store.suffix = ".json"
        try:
            store.open(own=not folder)
            yield store
        finally:
            if not folder and not store.finished:
                shutil.rmtree(store.place, ignore_errors=True)


def write_results(store: Store, keys: Sequence[str], out: str, skip_bad: bool) -> tuple[int, int]:
    """Make `out` of the finished parts, in the order of `keys`; the numbers of its rows and of images that were left out.

    Those are listed with their reasons in a table beside it, in both cases.
    Raises ImageError where images were left out and not `skip_bad`, or where none could be used; parts with rows are kept.
    """
    rows = bad = 0
    first: Bad = []
    for count, left_out in store.heads(keys):
        rows, bad = rows + count, bad + len(left_out)
        first += left_out[: 5 - len(first)]
    place = errors_path(out)
    if bad:
        with _errors_table(place) as write:
            for _, left_out in store.heads(keys):
                if left_out:
                    write({"path": [name for name, _ in left_out], "reason": [reason for _, reason in left_out]})
    else:
        remove_file(place)
    if bad and (not skip_bad or not rows):
        if not rows:
            store.finished.clear()
        raise unreadable_error(first, rows + bad, rows, bad, without_options(place))
    if is_folder(out):
        store.drop_others(keys)
        return rows, bad
    with open_table(out) as write:
        for piece in store.pieces(keys):
            if piece.rows:
                write(piece.columns)
    store.finished.clear()  # the table is whole
    return rows, bad


@contextmanager
def _errors_table(place: str) -> Iterator[Any]:
    """A function that appends rows to a table at a path or an address."""
    if not is_address(place):
        with open_table(place) as write:
            yield write
        return
    file = io.BytesIO()
    with WRITERS[".parquet"](file) as write:
        yield write
    write_atomic(place, file.getvalue())


def keys_of(sources: Sequence[str]) -> list[str]:
    """A name for the parts of each source, by the sources' keys; the same files given twice are the same work, but two sources."""
    seen: dict[str, int] = {}
    keys = []
    for key in sources:
        again = seen[key] = seen.get(key, -1) + 1
        keys.append(hashlib.sha256(f"{key} {again}".encode()).hexdigest()[:16] if again else key)
    return keys
