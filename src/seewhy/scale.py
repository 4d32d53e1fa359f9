"""Sources x a job -> parts on the disk or in a cloud, by this process or by many -> one table; what is finished is not done again."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import Timeout

from seewhy.errors import ImageError, OutputError
from seewhy.jobs import Piece, Request, asked_hash, make_work
from seewhy.predictions import check_table, open_table
from seewhy.progress import LOG, progress
from seewhy.sources import RECORD, Source, read_source
from seewhy.storage import inside, is_address, names_in, open_file, remove_file, write_whole
from seewhy.version import __version__
from seewhy.writing import claim

BAD_TABLE = "_bad.parquet"  # readers of folders of parquet pass over names that begin with _
PART = re.compile(r"part-([0-9a-f]{16})-(\d{5})(-last)?\.parquet")
KINDS = {"path": "string", "answer": "string", "predicted": "string", "unknown": "bool_", "prob": "float64", "heatmap": "binary"}
KINDS |= {"sha256": "string", "problem": "string", "phash": "string", "width": "int64", "height": "int64", "grey": "bool_"}


@dataclass(frozen=True)
class Outcome:
    """A piece that a worker has finished. source: position among those asked for. number: of the piece in its source, from 0.

    last: whether it is the source's last one.
    """

    source: int
    number: int
    last: bool
    piece: Piece


Engine = Callable[[Request, Sequence[Source]], Iterator[Outcome]]


def outcomes_here(request: Request, sources: Sequence[Source]) -> Iterator[Outcome]:
    """All pieces of all sources, one after the other, by this process."""
    import torch

    work = make_work(request, torch.get_num_threads())
    for number, source in enumerate(sources):
        yield from outcomes_of(work, number, source)


def outcomes_of(work: Callable[[Any], Iterator[Piece]], number: int, source: Source) -> Iterator[Outcome]:
    """The pieces of one source, the last one marked; an empty one where it holds no pictures."""
    held, count = Piece(), 0
    for count, piece in enumerate(work(read_source(source))):
        if count:
            yield Outcome(number, count - 1, False, held)
        held = piece
    yield Outcome(number, count, True, held)


# ---------------------------------------------------------------- parts


def as_parquet(piece: Piece, columns: Sequence[str]) -> bytes:
    """A piece as a file: its rows, and in the metadata, as JSON, what was left out of it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([(name, getattr(pa, _kind_of(name))()) for name in columns], {"bad": json.dumps(piece.bad)})
    table = pa.table({name: piece.columns.get(name, []) for name in columns}, schema=schema)
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def _kind_of(name: str) -> str:
    return KINDS.get(name) or {"prob_": "float64", "class": "string"}[name[:5]]


@dataclass
class Store:
    """Where parts are kept: a hidden folder beside a table, or the folder of the dataset itself.

    place: path or address. request: what all parts in it answer. columns: their names.
    finished: keys of sources -> how many parts they have.
    """

    place: str
    request: dict[str, Any]
    columns: list[str]
    finished: dict[str, int] = field(default_factory=dict)

    def open(self, own: bool) -> None:
        """Reads what is there. own: whether parts of another request may be thrown away; else OutputError."""
        names = names_in(self.place)
        known: Any = None
        if RECORD in names:
            with suppress(ValueError), open_file(inside(self.place, RECORD)) as file:
                known = json.loads(file.read())
        if known != self.request:
            if own:
                shutil.rmtree(self.place, ignore_errors=True)
            elif names:
                what = "answers to another request" if known else "other files"
                raise OutputError(f"{self.place}: holds {what}; choose another --out, or remove it")
            write_whole(inside(self.place, RECORD), json.dumps(self.request).encode())
            return
        counts: dict[str, set[int]] = {}
        ends: dict[str, int] = {}
        for name in names:
            if match := PART.fullmatch(name):
                key, number = match[1], int(match[2])
                counts.setdefault(key, set()).add(number)
                if match[3]:
                    ends[key] = number + 1
        self.finished = {key: end for key, end in ends.items() if counts[key] >= set(range(end))}

    def add(self, key: str, outcome: Outcome) -> None:
        """Keeps a piece; the same one again takes its own place."""
        name = self.name(key, outcome.number, outcome.last)
        write_whole(inside(self.place, name), as_parquet(outcome.piece, self.columns))
        if outcome.last:
            self.finished[key] = outcome.number + 1

    @staticmethod
    def name(key: str, number: int, last: bool) -> str:
        return f"part-{key}-{number:05d}{'-last' if last else ''}.parquet"

    def parts(self, keys: Sequence[str]) -> Iterator[tuple[Any, list[tuple[str, str]]]]:
        """Rows (a pyarrow table) and what was left out, of each part of these sources, in order."""
        import pyarrow.parquet as pq

        for place in self._places(keys):
            with open_file(place) as file:
                table = pq.read_table(io.BytesIO(file.read()))
            yield table, _left_out(table.schema.metadata)

    def counts(self, keys: Sequence[str]) -> Iterator[tuple[int, list[tuple[str, str]]]]:
        """The number of rows, and what was left out, of the same, by the ends of the files alone: heatmaps are large."""
        import pyarrow.parquet as pq

        for place in self._places(keys):
            with open_file(place) as file:
                footer = pq.read_metadata(file)
            yield footer.num_rows, _left_out(footer.metadata)

    def drop_others(self, keys: Sequence[str]) -> None:
        """Away with parts that no longer belong to what was asked for."""
        wanted = set(self._places(keys))
        for name in names_in(self.place):
            if PART.fullmatch(name) and inside(self.place, name) not in wanted:
                remove_file(inside(self.place, name))

    def _places(self, keys: Sequence[str]) -> Iterator[str]:
        for key in keys:
            for number in range(self.finished[key]):
                yield inside(self.place, self.name(key, number, number == self.finished[key] - 1))


def _left_out(metadata: dict[bytes, bytes]) -> list[tuple[str, str]]:
    """What `as_parquet` put there."""
    return [(name, reason) for name, reason in json.loads(metadata[b"bad"])]


def is_folder(out: str) -> bool:
    """Whether answers stay a folder of parts: where it ends in '/' or is an address."""
    return is_address(out) or out.endswith("/")


def bad_place(out: str) -> str:
    """preds.parquet -> preds.bad.parquet; in a folder, BAD_TABLE."""
    return inside(out, BAD_TABLE) if is_folder(out) else str(Path(out).with_suffix(".bad.parquet"))


def answer_sources(request: Request, columns: Sequence[str], sources: Sequence[Source], out: str, engine: Engine) -> tuple[int, int]:
    """Answers of all sources into `out`, in order; how many rows it has, and how many pictures were left out.

    Those stand, with the reasons, in a table beside it. Whatever stops this, finished parts are kept, and the same request goes on.
    Raises OutputError for a place that cannot be written or holds something else, ImageError where no picture could be used.
    """
    record = {"seewhy": __version__, "asked": asked_hash(Path(request.asked)), "job": request.job, "options": request.options}
    with _claimed(out) as place:
        store = Store(place, record, list(columns))
        whole = False
        try:
            store.open(own=not is_folder(out))
            keys = _keys(sources)
            _work_off(request, sources, keys, store, engine)
            rows, bad = _finish(store, keys, out)
            whole = True
        finally:
            if not is_folder(out) and (whole or not store.finished):
                shutil.rmtree(place, ignore_errors=True)
    if bad and not rows:
        raise ImageError(f"none of {bad:,} pictures can be used; the reasons stand in {bad_place(out)}")
    return rows, bad


def _keys(sources: Sequence[Source]) -> list[str]:
    """A name for the parts of each source; the same files given twice are the same work, but two sources."""
    seen: dict[str, int] = {}
    keys = []
    for source in sources:
        again = seen[source.key] = seen.get(source.key, -1) + 1
        keys.append(hashlib.sha256(f"{source.key} {again}".encode()).hexdigest()[:16] if again else source.key)
    return keys


@contextmanager
def _claimed(out: str) -> Iterator[str]:
    """Where the parts are kept; one process at a time, where the place is on this machine."""
    if is_address(out):
        yield out
        return
    path = Path(out)
    if not is_folder(out):
        check_table(path)
    try:
        let_go = claim(path)
    except Timeout as error:
        raise OutputError(f"{out}: another process writes it right now; choose another --out") from error
    except OSError as error:
        raise OutputError(f"{out}: cannot be written ({error.strerror}); choose another --out") from error
    try:
        yield out.rstrip("/") if is_folder(out) else str(path.parent / f".{path.name}.parts")
    finally:
        let_go()


def _work_off(request: Request, sources: Sequence[Source], keys: Sequence[str], store: Store, engine: Engine) -> None:
    left = [number for number, key in enumerate(keys) if key not in store.finished]
    if len(left) < len(sources):
        LOG.info(f"going on: {len(sources) - len(left):,} of {len(sources):,} shards and blocks of files are done")
    if not left:
        return
    finished = False
    try:
        with progress(f"{request.job}, shards and blocks", len(left)) as advance:
            for outcome in engine(request, [sources[number] for number in left]):
                store.add(keys[left[outcome.source]], outcome)
                advance(int(outcome.last))
        finished = True
    finally:
        done = sum(key in store.finished for key in keys)
        if not finished and done:
            LOG.info(f"{done:,} of {len(sources):,} shards and blocks of files are done and kept; the same command goes on after them")


class _Empty(Exception):
    """There is no row to write."""


def _finish(store: Store, keys: Sequence[str], out: str) -> tuple[int, int]:
    """The parts as `out`, and the table of what was left out; rows of both."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows, bad = 0, []
    if is_folder(out):
        store.drop_others(keys)
        for count, left_out in store.counts(keys):
            rows += count
            bad += left_out
    else:
        with suppress(_Empty), open_table(out) as write:
            for table, left_out in store.parts(keys):
                if len(table):
                    write(table.to_pydict())
                rows += len(table)
                bad += left_out
            if not rows:
                raise _Empty  # so that no table appears
    place = bad_place(out)
    if not bad:
        remove_file(place)
    else:
        table = pa.table({"path": [name for name, _ in bad], "reason": [reason for _, reason in bad]})
        file = io.BytesIO()
        pq.write_table(table, file)
        write_whole(place, file.getvalue())
    return rows, len(bad)


def columns_of(job: str, options: dict[str, Any], classes: int) -> list[str]:
    """The columns of a job's table."""
    if job == "explain":
        return ["path", "class", "prob", "predicted", "heatmap"]
    top = [f"{name}_{k + 1}" for k in range(min(options["top_k"], classes)) for name in ("class", "prob")]
    return ["path", *top, "unknown", *(["answer"] if options["least"] is not None else [])]
