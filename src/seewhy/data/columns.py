"""Arrow arrays -> sequences of Path and str: a million images cost the bytes of their names and hashes and little more."""

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
    """values: pyarrow.Array of N. A slice, or `take`, gives a column."""

    def __init__(self, values: Any) -> None:
        self.values = values

    @abstractmethod
    def value_of(self, stored: Any) -> T:
        """What stands for one of Arrow's values."""

    def like(self, values: Any) -> Self:
        """The same kind of column, of other values."""
        found = copy(self)
        found.values = values
        return found

    def take(self, indices: npt.NDArray[np.int64]) -> Self:
        """The values at these indices, 0 <= i < N each."""
        return self.like(self.values.take(indices))

    def __len__(self) -> int:
        return len(self.values)

    @overload
    def __getitem__(self, where: int) -> T: ...
    @overload
    def __getitem__(self, where: slice) -> Self: ...
    def __getitem__(self, where: int | slice) -> T | Self:
        found = self.values[where]
        return self.like(found) if isinstance(where, slice) else self.value_of(found.as_py())


class Paths(Column[Path]):
    """N files below `folder`, whose name is kept once."""

    def __init__(self, folder: Path, values: Any) -> None:
        super().__init__(values)
        self.folder = folder

    @staticmethod
    def of(texts: Iterable[str], folder: Path) -> Paths:
        """texts: UTF-8 paths relative to `folder`."""
        import pyarrow as pa  # here, since answering with an ONNX file does without

        return Paths(folder, pa.array(texts, type=pa.large_string()))

    def value_of(self, stored: str) -> Path:
        return self.folder / stored


class Hashes(Column[str]):
    """N sha256, each of 64 hexadecimal digits, kept as 32 bytes."""

    @staticmethod
    def of(hashes: Iterable[str]) -> Hashes:
        import pyarrow as pa

        return Hashes(pa.array(map(bytes.fromhex, hashes), type=pa.binary(32)))

    def value_of(self, stored: bytes) -> str:
        return stored.hex()
