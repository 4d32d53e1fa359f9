"""A parquet file, as Hugging Face writes it or any other -> its images, their classes, and their bytes by row group."""

from __future__ import annotations

import bisect
import errno
import itertools
import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from seewhy.core.retry import permanent_failure
from seewhy.data.shard_index import IMAGES, LABELS, Index, plain_label, plain_name, refuse_large, why_not
from seewhy.errors import DataError, one_line

MAX_GROUP = 1_000_000_000  # bytes of a row group, unpacked: it is held whole
GROUPS_HELD = 2  # the row group that is read, and the next, which other threads have begun
STREAMED_ROWS = 16
NAMES = ("name", "filename", "file_name", "path", "file", "key", "__key__")  # columns, the first that is there and fits
CONTENTS = ("image", "img", "image", "jpg", "jpeg", "png", "webp", "bytes", "content", "data")
# What pyarrow raises for damaged files: its errors are Python's, too.
DAMAGE = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)

Key = tuple[str, int, int, int, int]  # a shard's path, device, number, size and time

_GROUPS: OrderedDict[tuple[Key, int], Any] = OrderedDict()  # (shard, row group) -> its column of images


def _open_parquet(file: BinaryIO, shown: str) -> Any:
    try:
        import pyarrow.parquet as pq  # slow to import, and answering with an ONNX file does without
    except ImportError as error:
        raise DataError(f"{shown}: parquet files need pyarrow; pip install pyarrow") from error
    with _damage(shown):
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        rows = parquet.metadata.num_rows
        held = sum(_group_rows(parquet))
        if rows != held or rows > max(1000, file.seek(0, os.SEEK_END)):
            raise ValueError(f"it promises {rows:,} rows")
    return parquet


@contextmanager
def _damage(shown: str) -> Iterator[None]:
    """What pyarrow raises for damaged files -> DataError. Errors of a disk pass."""
    try:
        yield
    except DAMAGE as error:
        if _of_disk(error):
            raise
        raise DataError(f"{shown}: not a whole parquet file ({one_line(str(error))[:160]}); make or copy it again") from error


def _of_disk(error: Exception) -> bool:
    """Whether the system says that it cannot read: its errors have a number, pyarrow's none."""
    return isinstance(error, OSError) and error.errno is not None and not permanent_failure(error)


def _group_rows(parquet: Any) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of the columns, {} where there is none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _image_column(schema: Any, shown: str) -> str:
    """The column as pyarrow's readers name it: 'image.bytes' for Hugging Face's struct of bytes and path."""
    import pyarrow as pa

    def is_binary(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    fitting: dict[str, str] = {}
    for column in schema:
        if is_binary(column.type):
            fitting[column.name] = column.name
        elif pa.types.is_struct(column.type) and any(inner.name == "bytes" and is_binary(inner.type) for inner in column.type):
            fitting[column.name] = f"{column.name}.bytes"
    described = [name for name, feature in _features(schema).items() if feature.get("_type") == "Image"]
    for name in (*described, *CONTENTS):
        if name in fitting:
            return fitting[name]
    if len(fitting) == 1:
        return next(iter(fitting.values()))
    raise DataError(f"{shown}: no column of images; looked for binary ones named {', '.join(CONTENTS)}")


def _labels(parquet: Any) -> list[str | None]:
    import pyarrow as pa

    schema, features = parquet.schema_arrow, _features(parquet.schema_arrow)
    described = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel" and name in schema.names]
    name = next((name for name in LABELS if name in schema.names), described[0] if len(described) == 1 else None)
    kind = schema.field(name).type if name else None
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    if kind is None or not (pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return [None] * parquet.metadata.num_rows
    values = parquet.read(columns=[name], use_threads=False).column(name).to_pylist()
    classes = features.get(name or "", {}).get("names")
    if isinstance(classes, list) and pa.types.is_integer(kind):
        named = dict(enumerate(classes)) | {-1: None}  # -1 is Hugging Face's word for none
        values = [named.get(value, value) for value in values]
    return [plain_label(value) for value in values]


def _names(parquet: Any, column: str) -> list[str]:
    """From a column of names or the paths beside the bytes, where all are there, unique and harmless; else the rows' numbers."""
    schema = parquet.schema_arrow
    struct = column.removesuffix(".bytes")
    columns = [name for name in NAMES if name in schema.names and name != column]
    if struct != column and any(inner.name == "path" for inner in schema.field(struct).type):
        columns.append(f"{struct}.path")
    for name in columns:
        values = parquet.read(columns=[name], use_threads=False).column(0).to_pylist()
        if name == f"{struct}.path":
            values = [value and value["path"] for value in values]
        if not all(isinstance(value, str) for value in values):
            continue
        plain = [plain_name(value) for value in values]
        if not all(plain) or any(why_not(name) for name in plain):
            continue
        plain = [name if PurePosixPath(name).suffix.lower() in IMAGES else f"{name}.jpg" for name in plain]
        if len(set(plain)) == len(plain):
            return plain
    return [f"{row:06d}.jpg" for row in range(parquet.metadata.num_rows)]


def _described(parquet: Any, shown: str) -> tuple[str, list[str], list[str | None]]:
    """The column of images, and the names and labels of the members; no image's bytes are read."""
    with _damage(shown):
        column = _image_column(parquet.schema_arrow, shown)
        return column, _names(parquet, column), _labels(parquet)


def index_parquet(file: BinaryIO, shown: str) -> Index:
    parquet = _open_parquet(file, shown)
    column, names, labels = _described(parquet, shown)
    with _damage(shown):
        for group in range(parquet.metadata.num_row_groups):
            size = parquet.metadata.row_group(group).total_byte_size  # not by column, whose damaged facts end the process (pyarrow 26)
            if size > MAX_GROUP:
                raise DataError(
                    f"{shown}: row group {group} has {size / 1e9:.1f} GB, all of it read for one image; write groups of 100 rows"
                )
        firsts = tuple(itertools.accumulate(_group_rows(parquet), initial=0))[:-1]
    return Index(names, labels, column=column, firsts=firsts)


def read_row(file: BinaryIO, shown: str, key: Key, index: Index, row: int) -> bytes:
    """A row's bytes, by way of its row group, of which GROUPS_HELD are kept; one caller at a time. Raises OSError."""
    group = bisect.bisect_right(index.firsts, row) - 1
    place = key, group
    try:
        if place not in _GROUPS:
            while len(_GROUPS) >= GROUPS_HELD:
                _GROUPS.popitem(last=False)
            _GROUPS[place] = _open_parquet(file, shown).read_row_group(group, columns=[index.column], use_threads=False).column(0)
        _GROUPS.move_to_end(place)
        cell = _GROUPS[place][row - index.firsts[group]]
    except (DataError, *DAMAGE) as error:
        if _of_disk(error):
            raise
        raise OSError(errno.EINVAL, f"row group {group} of the shard is damaged") from error
    return _content(cell)


def _content(cell: Any) -> bytes:
    """A cell's bytes, b'' where it holds none."""
    if cell.is_valid and not hasattr(cell, "as_buffer"):
        cell = cell["bytes"]
    if not cell.is_valid:
        return b""
    buffer = cell.as_buffer()
    refuse_large(buffer.size)
    return bytes(buffer.to_pybytes())


def stream_parquet(file: BinaryIO, shown: str) -> Iterator[tuple[str, bytes, str | None]]:
    parquet = _open_parquet(file, shown)
    column, names, labels = _described(parquet, shown)
    left = zip(names, labels, strict=True)
    batches = parquet.iter_batches(batch_size=STREAMED_ROWS, columns=[column], use_threads=False)
    while True:
        with _damage(shown):
            batch = next(batches, None)
            if batch is None and next(left, None):
                raise ValueError("it ends too early")
        if batch is None:
            return
        for cell, (name, label) in zip(batch.column(0), left, strict=False):
            try:
                data = _content(cell)
            except OSError as error:
                raise DataError(f"{shown}: {name} has {error.strerror}; remove it") from error
            yield name, data, label
