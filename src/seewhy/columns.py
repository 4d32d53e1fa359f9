"""Columns of a table of pictures -> sequences of str, Path and the like that take the bytes of their values and little more."""

from __future__ import annotations

import itertools
import os
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, overload

import numpy as np
import numpy.typing as npt

from seewhy.spill import spilled, spilled_zeros

T = TypeVar("T")
Positions = npt.NDArray[np.integer[Any]]

ENCODING = ("utf-8", "surrogateescape")  # of names as the system gives them


class Column(Sequence[T]):
    """A sequence that makes its values when they are asked for; equal to any sequence of equal values. Slices are columns, too."""

    @abstractmethod
    def at(self, i: int) -> T:
        """The value at 0 <= i < len."""

    @abstractmethod
    def take(self, positions: Positions) -> Self:
        """A column of the values at these positions, each from 0 on."""

    @overload
    def __getitem__(self, where: int) -> T: ...
    @overload
    def __getitem__(self, where: slice) -> Self: ...
    def __getitem__(self, where: int | slice) -> T | Self:
        if isinstance(where, slice):
            chosen = range(len(self))[where]
            return self if chosen == range(len(self)) else self.take(np.array(chosen, dtype=np.int64))
        return self.at(range(len(self))[where])

    def __iter__(self) -> Iterator[T]:
        return (self.at(i) for i in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str | bytes):
            return NotImplemented
        return len(self) == len(other) and all(mine == theirs for mine, theirs in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # equal to lists, which have none

    def __repr__(self) -> str:
        shown = ", ".join(map(repr, self[:3]))
        return f"{type(self).__name__}({len(self):,}: {shown}{', ...' if len(self) > 3 else ''})"


class Texts(Column[str]):
    """N texts that begin alike. prefix: how. text: (bytes,) uint8, what follows, one behind the other. ends: (N,) where each ends."""

    def __init__(self, prefix: str, text: npt.NDArray[np.uint8], ends: Positions) -> None:
        self.prefix, self.text = prefix, spilled(text)
        self.ends = spilled(ends.astype(np.min_scalar_type(len(text)), copy=False))

    @staticmethod
    def of(texts: Iterable[str], prefix: str = "") -> Texts:
        found = TextsBuilder(prefix)
        for text in texts:
            found.add(text)
        return found.done()

    def __len__(self) -> int:
        return len(self.ends)

    def at(self, i: int) -> str:
        return self.prefix + self._own(i).decode(*ENCODING)

    def _own(self, i: int) -> bytes:
        return self.text[self.ends.item(i - 1) if i else 0 : self.ends.item(i)].tobytes()

    def take(self, positions: Positions) -> Texts:
        chosen = TextsBuilder(self.prefix)
        for i in positions.tolist():
            chosen.add_own(self._own(i))
        return chosen.done()


class TextsBuilder:
    """Texts as they come -> Texts. Made once: `done` ends it."""

    def __init__(self, prefix: str = "") -> None:
        self.prefix, self.text, self.ends = prefix, bytearray(), array("q")

    def add(self, text: str) -> None:
        if not text.startswith(self.prefix):
            raise ValueError(f"{text!r} does not begin with {self.prefix!r}")
        self.add_own(text[len(self.prefix) :].encode(*ENCODING))

    def add_own(self, own: bytes) -> None:
        """A text without its prefix, encoded."""
        self.text += own
        self.ends.append(len(self.text))

    def done(self) -> Texts:
        return Texts(self.prefix, np.frombuffer(self.text, dtype=np.uint8), np.frombuffer(self.ends, dtype=np.int64))


class Paths(Column[Path]):
    """N paths. texts: the same as str."""

    def __init__(self, texts: Texts) -> None:
        self.texts = texts

    @staticmethod
    def of(paths: Sequence[Path], folder: Path | None = None) -> Paths:
        """folder: one that all of them lie in, whose name is then kept once."""
        return paths if isinstance(paths, Paths) else Paths(Texts.of(map(str, paths), below(folder) if folder else ""))

    def __len__(self) -> int:
        return len(self.texts)

    def at(self, i: int) -> Path:
        return Path(self.texts.at(i))

    def take(self, positions: Positions) -> Paths:
        return Paths(self.texts.take(positions))


def below(folder: Path) -> str:
    """What the paths of all files in a folder begin with."""
    return "" if folder == Path() else os.path.join(folder, "")


class Hashes(Column[str]):
    """N sha256, each 64 hexadecimal digits. digests: (N, 32) uint8."""

    def __init__(self, digests: npt.NDArray[np.uint8]) -> None:
        self.digests = digests

    @staticmethod
    def of(hashes: Sequence[str]) -> Hashes:
        if isinstance(hashes, Hashes):
            return hashes
        return Hashes(np.frombuffer(bytes.fromhex("".join(hashes)), dtype=np.uint8).reshape(len(hashes), 32))

    def __len__(self) -> int:
        return len(self.digests)

    def at(self, i: int) -> str:
        return bytes(self.digests[i]).hex()

    def take(self, positions: Positions) -> Hashes:
        chosen = spilled_zeros((len(positions), 32), np.uint8)
        np.take(self.digests, positions, axis=0, out=chosen, mode="clip")  # to "raise" would take as much memory again
        return Hashes(chosen)

    @property
    def keys(self) -> npt.NDArray[np.bytes_]:
        """(N,) of 32 bytes: to compare and to sort, which gives the order of the texts. A view."""
        return np.ascontiguousarray(self.digests).view("S32").reshape(len(self))


class Choices(Column[T]):
    """N values of which few differ. table: these. codes: (N,) the place of each in the table, as small integers as will do."""

    def __init__(self, codes: Positions, table: Sequence[T]) -> None:
        self.codes, self.table = codes.astype(np.min_scalar_type(max(len(table) - 1, 0)), copy=False), tuple[T, ...](table)

    @staticmethod
    def of(values: Sequence[T]) -> Choices[T]:
        if isinstance(values, Choices):
            return values
        found = ChoicesBuilder[T]()
        for value in values:
            found.add(value)
        return found.done()

    @staticmethod
    def same(value: T, count: int) -> Choices[T]:
        """`count` times the same."""
        return Choices(np.zeros(count, dtype=np.uint8), (value,))

    def __len__(self) -> int:
        return len(self.codes)

    def at(self, i: int) -> T:
        return self.table[int(self.codes[i])]

    def take(self, positions: Positions) -> Choices[T]:
        return Choices(self.codes[positions], self.table)

    def where(self, value: T) -> npt.NDArray[np.bool_]:
        """(N,) which are equal to it."""
        wanted: npt.NDArray[np.bool_] = np.array([known == value for known in self.table], dtype=bool)[self.codes]
        return wanted

    @property
    def used(self) -> list[T]:
        """The values that occur, as the table has them."""
        return [self.table[code] for code in np.unique(self.codes).tolist()]


class ChoicesBuilder(Generic[T]):
    """Values as they come -> Choices."""

    def __init__(self) -> None:
        self.table: dict[T, int] = {}
        self.codes = array("i")

    def add(self, value: T, count: int = 1) -> None:
        """So many times the value."""
        self.codes.extend(itertools.repeat(self.table.setdefault(value, len(self.table)), count))

    def done(self) -> Choices[T]:
        return Choices(np.frombuffer(self.codes, dtype=np.int32), tuple(self.table))
