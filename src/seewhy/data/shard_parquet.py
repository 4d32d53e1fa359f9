"""Index and stream the images of a parquet file, with their classes, as Hugging Face or others write it."""

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
from seewhy.data.shard_index import IMAGES, LABELS, Index, name_problem, plain_label, plain_name, refuse_large
from seewhy.errors import DataError, reason_of

MAX_GROUP = 1_000_000_000  # bytes of an uncompressed row group, which is read whole
CACHED_GROUPS = 2  # the current row group, and the next of other threads
STREAMED_ROWS = 16
NAMES = ("name", "filename", "file_name", "path", "file", "key", "__key__")  # columns of file names; the first valid one counts
CONTENTS = ("image", "img", "picture", "jpg", "jpeg", "png", "webp", "bytes", "content", "data")
# Raised by pyarrow for damaged files; its own errors derive from these.
DAMAGE = (ArithmeticError, LookupError, MemoryError, OSError, RuntimeError, TypeError, ValueError)

Key = tuple[str, int, int, int, int]  # path, device, inode, size and modification time of a shard

_GROUPS: OrderedDict[tuple[Key, int], Any] = OrderedDict()  # (shard, row group): column of images


def _open_parquet(file: BinaryIO, shard: str) -> Any:
    try:
        import pyarrow.parquet as pq  # slow to import, and not a requirement of the ONNX runtime
    except ImportError as error:
        raise DataError(f"{shard}: parquet files need pyarrow; pip install pyarrow") from error
    with _damage(shard):
        parquet = pq.ParquetFile(file, pre_buffer=False, buffer_size=1 << 20)
        rows = parquet.metadata.num_rows
        if rows != sum(_group_rows(parquet)) or rows > max(1000, file.seek(0, os.SEEK_END)):
            raise ValueError(f"{rows:,} rows are not plausible")
    return parquet


@contextmanager
def _damage(shard: str) -> Iterator[None]:
    """Raise DataError for errors of damaged files, but not for errors of the disk."""
    try:
        yield
    except DAMAGE as error:
        if _is_disk_error(error):
            raise
        raise DataError(f"{shard}: not a complete parquet file ({reason_of(error)}); copy it again") from error


def _is_disk_error(error: Exception) -> bool:
    """Whether the operating system raised the error; pyarrow's errors have no errno."""
    return isinstance(error, OSError) and error.errno is not None and not permanent_failure(error)


def _group_rows(parquet: Any) -> list[int]:
    return [parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups)]


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of the columns, or {}."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _image_column(schema: Any, shard: str) -> str:
    """Column of the images; 'image.bytes' for Hugging Face's struct of bytes and path."""
    import pyarrow as pa

    def is_binary(kind: Any) -> bool:
        return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))

    candidates: dict[str, str] = {}
    for column in schema:
        if is_binary(column.type):
            candidates[column.name] = column.name
        elif pa.types.is_struct(column.type) and any(inner.name == "bytes" and is_binary(inner.type) for inner in column.type):
            candidates[column.name] = f"{column.name}.bytes"
    described = [name for name, feature in _features(schema).items() if feature.get("_type") == "Image"]
    for name in (*described, *CONTENTS):
        if name in candidates:
            return candidates[name]
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    raise DataError(f"{shard}: no column of images; expected a binary one named {', '.join(CONTENTS)}")


def _labels(parquet: Any) -> list[str | None]:
    """Class names from a column named like LABELS or described as ClassLabel, else None for each row."""
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
        named = dict(enumerate(classes)) | {-1: None}  # -1: no label
        values = [named.get(value, value) for value in values]
    return [plain_label(value) for value in values]


def _names(parquet: Any, column: str) -> list[str]:
    """Names from a column or the paths beside the bytes if all are present, valid and unique; else row numbers."""
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
        if not all(plain) or any(name_problem(name) for name in plain):
            continue
        plain = [name if PurePosixPath(name).suffix.lower() in IMAGES else f"{name}.jpg" for name in plain]
        if len(set(plain)) == len(plain):
            return plain
    return [f"{row:06d}.jpg" for row in range(parquet.metadata.num_rows)]


def _describe(parquet: Any, shard: str) -> tuple[str, list[str], list[str | None]]:
    """Column of the images, names and labels; no image is read."""
    with _damage(shard):
        column = _image_column(parquet.schema_arrow, shard)
        return column, _names(parquet, column), _labels(parquet)


def index_parquet(file: BinaryIO, shard: str) -> Index:
    """List the images of a parquet file without reading them. Raises DataError."""
    parquet = _open_parquet(file, shard)
    column, names, labels = _describe(parquet, shard)
    with _damage(shard):
        for group in range(parquet.metadata.num_row_groups):
            size = parquet.metadata.row_group(group).total_byte_size  # not by column, whose damaged metadata crash the process (pyarrow 26)
            if size > MAX_GROUP:
                raise DataError(f"{shard}: row group {group} has {size / 1e9:.1f} GB, read whole for one image; write groups of 100 rows")
        first_rows = tuple(itertools.accumulate(_group_rows(parquet), initial=0))[:-1]
    return Index(names, labels, column=column, first_rows=first_rows)


def read_row(file: BinaryIO, shard: str, key: Key, index: Index, row: int) -> bytes:
    """Read the image of a row; its row group stays in memory. Not thread-safe. Raises OSError."""
    group = bisect.bisect_right(index.first_rows, row) - 1
    group_key = key, group
    try:
        if group_key not in _GROUPS:
            while len(_GROUPS) >= CACHED_GROUPS:
                _GROUPS.popitem(last=False)
            _GROUPS[group_key] = _open_parquet(file, shard).read_row_group(group, columns=[index.column], use_threads=False).column(0)
        _GROUPS.move_to_end(group_key)
        cell = _GROUPS[group_key][row - index.first_rows[group]]
    except (DataError, *DAMAGE) as error:
        if _is_disk_error(error):
            raise
        raise OSError(errno.EINVAL, f"row group {group} of the shard is damaged") from error
    return _content(cell)


def _content(cell: Any) -> bytes:
    """Bytes of a cell, b'' if null."""
    if cell.is_valid and not hasattr(cell, "as_buffer"):
        cell = cell["bytes"]
    if not cell.is_valid:
        return b""
    buffer = cell.as_buffer()
    refuse_large(buffer.size)
    return bytes(buffer.to_pybytes())


def stream_parquet(file: BinaryIO, shard: str) -> Iterator[tuple[str, bytes, str | None]]:
    """Yield (name, bytes, label) of each image. Raises DataError."""
    parquet = _open_parquet(file, shard)
    column, names, labels = _describe(parquet, shard)
    members = zip(names, labels, strict=True)
    batches = parquet.iter_batches(batch_size=STREAMED_ROWS, columns=[column], use_threads=False)
    while True:
        with _damage(shard):
            batch = next(batches, None)
            if batch is None and next(members, None):
                raise ValueError("truncated")
        if batch is None:
            return
        for cell, (name, label) in zip(batch.column(0), members, strict=False):
            try:
                data = _content(cell)
            except OSError as error:
                raise DataError(f"{shard}: {name} has {error.strerror}; remove it") from error
            yield name, data, label
