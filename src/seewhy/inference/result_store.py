"""Store results as part files, in a folder or a bucket, so that an interrupted batch resumes; then merge them into one table."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from seewhy.core.files import locked
from seewhy.core.parallel import Bad
from seewhy.data.remote import is_address, join_path, list_names, open_file, remove_file, without_options, write_atomic
from seewhy.errors import OutputError
from seewhy.inference.predictions import WRITERS, Columns, check_table_suffix, open_table, unreadable_error
from seewhy.inference.work_units import MANIFEST

ERRORS_TABLE = "_errors.parquet"  # readers of parquet folders skip names that begin with _
PART = re.compile(r"part-([0-9a-f]{16})-(\d{5})(-last)?\.(?:parquet|json)")
ARROW_TYPES = {str: "string", float: "float64", int: "int64", bool: "bool_", bytes: "binary"}
MAX_ROWS, MAX_CHUNK_BYTES = 8192, 32_000_000  # of one part file


@dataclass
class Chunk:
    """Result rows in the order of the images, columns by name, and the images that could not be used, with reasons."""

    columns: Columns = field(default_factory=dict)
    bad: Bad = field(default_factory=list)

    @property
    def rows(self) -> int:
        return len(self.columns.get("path", ()))


@dataclass(frozen=True)
class ChunkResult:
    """A finished chunk. source: index of its source. number: index of the chunk in its source. last: whether it is the source's last."""

    source: int
    number: int
    last: bool
    chunk: Chunk


def merge_chunks(chunks: Iterator[Chunk]) -> Iterator[Chunk]:
    """Merge consecutive chunks until each holds MAX_ROWS images or MAX_CHUNK_BYTES of values."""
    merged, size = Chunk(), 0
    for chunk in chunks:
        for name, values in chunk.columns.items():
            merged.columns.setdefault(name, []).extend(values)
            size += sum(len(value) for value in values if isinstance(value, bytes))
        merged.bad += chunk.bad
        if merged.rows + len(merged.bad) >= MAX_ROWS or size >= MAX_CHUNK_BYTES:
            yield merged
            merged, size = Chunk(), 0
    if merged.rows or merged.bad:
        yield merged


def encode_chunk(chunk: Chunk, types: Mapping[str, type], suffix: str) -> bytes:
    """Encode a chunk as a part file. types: of its columns.

    .parquet: rows, with the bad images as metadata. .json, which needs no pyarrow: a line of row count and bad images, a line of columns.
    """
    if suffix == ".json":
        header = {"rows": chunk.rows, "bad": chunk.bad}
        return b"\n".join(json.dumps(line).encode() for line in (header, chunk.columns))
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, getattr(pa, ARROW_TYPES[kind])()) for name, kind in types.items()], {"bad": json.dumps(chunk.bad)})
    file = io.BytesIO()
    pq.write_table(pa.table({name: chunk.columns.get(name, []) for name in types}, schema=schema), file)
    return file.getvalue()


def decode_chunk(path: str) -> Chunk:
    """Read a part file."""
    with open_file(path) as file:
        data = file.read()
    if path.endswith(".json"):
        header, columns = map(json.loads, data.split(b"\n"))
        return Chunk(columns, _pairs(header["bad"]))
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(data))
    return Chunk(table.to_pydict(), _pairs(json.loads(table.schema.metadata[b"bad"])))


def read_header(path: str) -> tuple[int, Bad]:
    """Return the row count and the bad images of a part file without reading its rows: heatmaps are large."""
    with open_file(path) as file:
        if path.endswith(".json"):
            header = json.loads(file.readline())
            return header["rows"], _pairs(header["bad"])
        import pyarrow.parquet as pq

        footer = pq.read_metadata(file)
    return footer.num_rows, _pairs(json.loads(footer.metadata[b"bad"]))


def _pairs(lists: Sequence[Sequence[str]]) -> Bad:
    return [(name, reason) for name, reason in lists]


@dataclass
class ResultStore:
    """A folder of part files: hidden beside a table, or the output folder itself.

    folder: path or address. manifest: the request that all parts answer. types: of their columns. suffix: .parquet or .json.
    finished: number of parts of each finished source, by the source's key.
    """

    folder: str
    manifest: dict[str, Any]
    types: Mapping[str, type]
    suffix: str = ".parquet"
    finished: dict[str, int] = field(default_factory=dict)

    def open(self, overwrite: bool) -> None:
        """List the parts. overwrite: delete the parts of another request instead of raising OutputError."""
        names = list_names(self.folder)
        manifest: Any = None
        if MANIFEST in names:
            with suppress(ValueError), open_file(join_path(self.folder, MANIFEST)) as file:
                manifest = json.loads(file.read())
        if manifest != self.manifest:
            if overwrite:
                shutil.rmtree(self.folder, ignore_errors=True)
            elif names:
                content = "answers to another request" if manifest else "other files"
                raise OutputError(f"{without_options(self.folder)}: holds {content}; choose another --out, or remove it")
            write_atomic(join_path(self.folder, MANIFEST), json.dumps(self.manifest).encode())
            return
        numbers: dict[str, set[int]] = {}
        ends: dict[str, int] = {}
        for name in names:
            if (match := PART.fullmatch(name)) and name.endswith(self.suffix):
                key, number = match[1], int(match[2])
                numbers.setdefault(key, set()).add(number)
                if match[3]:
                    ends[key] = number + 1
        self.finished = {key: end for key, end in ends.items() if numbers[key] >= set(range(end))}

    def add(self, key: str, result: ChunkResult) -> None:
        """Write a chunk; the same chunk written again replaces itself."""
        write_atomic(self._part(key, result.number, result.last), encode_chunk(result.chunk, self.types, self.suffix))
        if result.last:
            self.finished[key] = result.number + 1

    def chunks(self, keys: Sequence[str]) -> Iterator[Chunk]:
        """Yield all chunks of these sources, in order."""
        return map(decode_chunk, self._parts(keys))

    def headers(self, keys: Sequence[str]) -> Iterator[tuple[int, Bad]]:
        """Yield the row count and the bad images of each of these chunks."""
        return map(read_header, self._parts(keys))

    def remove_stale(self, keys: Sequence[str]) -> None:
        """Remove the parts of all other sources."""
        current = set(self._parts(keys))
        for name in list_names(self.folder):
            if PART.fullmatch(name) and join_path(self.folder, name) not in current:
                remove_file(join_path(self.folder, name))

    def _parts(self, keys: Sequence[str]) -> Iterator[str]:
        for key in keys:
            for number in range(self.finished[key]):
                yield self._part(key, number, number == self.finished[key] - 1)

    def _part(self, key: str, number: int, last: bool) -> str:
        return join_path(self.folder, f"part-{key}-{number:05d}{'-last' if last else ''}{self.suffix}")


def unique_keys(keys: Sequence[str]) -> list[str]:
    """Return a unique key for each source: files given twice are two sources with the same key."""
    seen: dict[str, int] = {}
    unique = []
    for key in keys:
        repeat = seen[key] = seen.get(key, -1) + 1
        unique.append(hashlib.sha256(f"{key} {repeat}".encode()).hexdigest()[:16] if repeat else key)
    return unique


def is_folder(out: str) -> bool:
    """Whether `out` is a folder of parquet parts: an address, a name that ends in '/', or an existing folder."""
    return is_address(out) or out.endswith("/") or Path(out).is_dir()


def errors_path(out: str) -> str:
    """Return the path of the table of unreadable images: preds.csv -> preds.errors.csv; ERRORS_TABLE in a folder."""
    return join_path(out, ERRORS_TABLE) if is_folder(out) else str(Path(out).with_suffix(f".errors{Path(out).suffix}"))


@contextmanager
def open_store(out: str, manifest: dict[str, Any], types: Mapping[str, type]) -> Iterator[ResultStore]:
    """Open the store of `out` with the finished parts of the same request; on this machine, for one process at a time.

    The parts of a table are removed if no source is finished; `write_results` clears `finished` when the table is complete.
    Raises OutputError if the path cannot be written or holds something else.
    """
    path, folder = Path(out), is_folder(out)
    if folder:
        store = ResultStore(out if is_address(out) else str(path), manifest, types)
    else:
        check_table_suffix(path)
        suffix = ".parquet" if path.suffix == ".parquet" else ".json"
        store = ResultStore(str(path.parent / f".{path.name}.parts"), manifest, types, suffix)
    with nullcontext() if is_address(out) else locked(path):
        try:
            store.open(overwrite=not folder)
            yield store
        finally:
            if not folder and not store.finished:
                shutil.rmtree(store.folder, ignore_errors=True)


def write_results(store: ResultStore, keys: Sequence[str], out: str, skip_bad: bool) -> tuple[int, int]:
    """Merge the finished parts into `out`, in the order of `keys`; return the numbers of its rows and of unreadable images.

    Unreadable images are listed with reasons at `errors_path`.
    Raises ImageError if there are any and not `skip_bad`, or if no image could be used; parts with rows are kept.
    """
    rows = bad = 0
    first: Bad = []
    for count, chunk_bad in store.headers(keys):
        rows, bad = rows + count, bad + len(chunk_bad)
        first += chunk_bad[: 5 - len(first)]
    errors = errors_path(out)
    if bad:
        with _open_errors_table(errors) as write:
            for _, chunk_bad in store.headers(keys):
                if chunk_bad:
                    write({"path": [name for name, _ in chunk_bad], "reason": [reason for _, reason in chunk_bad]})
    else:
        remove_file(errors)
    if bad and (not skip_bad or not rows):
        if not rows:
            store.finished.clear()
        raise unreadable_error(first, rows + bad, rows, bad, without_options(errors))
    if is_folder(out):
        store.remove_stale(keys)
        return rows, bad
    with open_table(out) as write:
        for chunk in store.chunks(keys):
            if chunk.rows:
                write(chunk.columns)
    store.finished.clear()
    return rows, bad


@contextmanager
def _open_errors_table(path: str) -> Iterator[Any]:
    """Yield a function that appends rows to a table at a path or an address."""
    if not is_address(path):
        with open_table(path) as write:
            yield write
        return
    file = io.BytesIO()
    with WRITERS[".parquet"](file) as write:
        yield write
    write_atomic(path, file.getvalue())
