"""Store the paths and hashes of millions of images in Arrow arrays, as sequences of Path and str."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

T = TypeVar("T")


class Column(Sequence[T]):
    """Sequence over `values`, a pyarrow.Array of N; slices and `take` return columns."""

    def __init__(self, values: Any) -> None:
        self.values = values

    @abstractmethod
    def decode(self, stored: Any) -> T:
        """Convert an element of the array."""

    def _with_values(self, values: Any) -> Self:
        column = copy(self)
        column.values = values
        return column

    def take(self, indices: npt.NDArray[np.int64]) -> Self:
        """Select elements by index, 0 <= i < N each."""
        return self._with_values(self.values.take(indices))

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> T | Self:
        if isinstance(index, slice):  # not Arrow's slices, which overflow with steps that NumPy's take
            return self.take(np.arange(len(self))[index])
        return self.decode(self.values[index].as_py())


class PathColumn(Column[Path]):
    """N files below `folder`, which is stored once."""

    def __init__(self, folder: Path, values: Any) -> None:
        super().__init__(values)
        self.folder = folder

    @staticmethod
    def of(paths: Iterable[str], folder: Path) -> PathColumn:
        """paths: UTF-8, relative to `folder`."""
        import pyarrow as pa  # not a requirement of the ONNX runtime

        return PathColumn(folder, pa.array(paths, type=pa.large_string()))

    def decode(self, stored: str) -> Path:
        return self.folder / stored


class DigestColumn(Column[str]):
    """N sha256 of 64 hexadecimal digits, stored as 32 bytes each."""

    @staticmethod
    def of(digests: Iterable[str]) -> DigestColumn:
        import pyarrow as pa

        return DigestColumn(pa.array(map(bytes.fromhex, digests), type=pa.binary(32)))

    def decode(self, stored: bytes) -> str:
        return stored.hex()
