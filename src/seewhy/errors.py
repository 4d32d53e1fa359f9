"""Every error a user can meet, each one line: what, where, and the next step.

SeewhyError
|-- ConfigError     an option or a config file is wrong
|-- DataError       a dataset, folder or class is missing or unusable
|   `-- ImageError  images that cannot be used
|-- StorageUnavailableError      what is there cannot be read at the moment
|-- SplitError      the images cannot be divided as asked
|-- BackboneError   an unknown network, or one that cannot be cut as asked
|   `-- WeightsError  weights that are missing or do not fit
|-- RunError        a saved run is missing, half-written or of another version
`-- OutputError     something cannot be written

The command line prints the message alone and exits with status 2.
"""

from __future__ import annotations

import re
from collections import abc
from importlib.util import find_spec


def one_line(text: str) -> str:
    """Text without line ends and other control characters, which names of files may hold and a terminal would obey."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)


def reason_of(error: BaseException | str, most: int = 160) -> str:
    """The first `most` characters of what an error of another library says, in one line; its type where it says nothing."""
    return one_line(" ".join(str(error).split()))[:most] or type(error).__name__


class SeewhyError(Exception):
    """Root of every error that seewhy raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(SeewhyError):
    """An option or a config file is wrong."""


def require(extra: str, what: str, *packages: str) -> None:
    """Raise ConfigError naming the extra of seewhy that brings `packages` where one of these top-level modules is not installed."""
    missing = next((name for name in packages if not _is_installed(name)), None)
    if missing is not None:
        raise ConfigError(f'{what} needs {missing}, which is not installed; pip install "seewhy[{extra}]"')


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:
        return False


class DataError(SeewhyError):
    """A dataset, folder or class is missing or unusable."""


class ImageError(DataError):
    """Images that cannot be used; `bad` lists (path, reason)."""

    def __init__(self, message: str, bad: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.bad = bad

    @staticmethod
    def of(bad: abc.Sequence[tuple[str, str]], total: int, advice: str, count: int | None = None) -> ImageError:
        """Name the first five of `bad`, (path, reason) each, of `total` images, and the next step.

        count: of all unusable images, where `bad` holds only the first of them.
        """
        count = len(bad) if count is None else count
        shown = ", ".join(f"{path} ({reason})" for path, reason in bad[:5])
        more = f", and {count - 5} more" if count > 5 else ""
        return ImageError(f"{count} of {total} images cannot be used: {shown}{more}; {advice}", tuple(bad))


class StorageUnavailableError(SeewhyError):
    """What is there cannot be read at the moment: a network, a disk or credentials failed."""


class SplitError(SeewhyError):
    """The images cannot be divided as asked."""


class BackboneError(SeewhyError):
    """An unknown network, or one that cannot be cut as asked."""


class WeightsError(BackboneError):
    """Weights that are missing or do not fit the network."""


class RunError(SeewhyError):
    """A saved run is missing, half-written or of another version."""


class OutputError(SeewhyError):
    """Something cannot be written."""
