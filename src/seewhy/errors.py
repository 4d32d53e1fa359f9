"""Define the errors for users: one line that says what, where, and the next step.

SeewhyError
|-- ConfigError      an option or a config file is wrong
|-- DataError        a dataset, folder or class is missing or unusable
|   `-- ImageError   images cannot be used
|-- StorageUnavailableError  a network, a disk or credentials failed
|-- SplitError       the images cannot be split as requested
|-- BackboneError    the network is unknown, or cannot be split into trunk and tail
|   `-- WeightsError weights are missing or do not fit the network
|-- RunError         a saved run is missing, incomplete or of another version
`-- OutputError      a file or folder cannot be written

The command line prints the message and exits with status 2.
"""

from __future__ import annotations

import re
from collections import abc
from importlib.util import find_spec


def one_line(text: str) -> str:
    """Replace line ends and other control characters, which file names may hold and terminals obey, by spaces."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+", " ", text)


def reason_of(error: BaseException | str, max_chars: int = 160) -> str:
    """Return the start of another library's error message in one line, or the error's type if the message is empty."""
    return one_line(" ".join(str(error).split()))[:max_chars] or type(error).__name__


def require(extra: str, feature: str, *packages: str) -> None:
    """Raise ConfigError, naming the extra of seewhy to install, if one of these top-level modules is missing."""
    missing = next((name for name in packages if find_spec(name) is None), None)
    if missing is not None:
        raise ConfigError(f'{feature} needs {missing}, which is not installed; pip install "seewhy[{extra}]"')


class SeewhyError(Exception):
    """Base class of the errors that seewhy raises on purpose."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))


class ConfigError(SeewhyError):
    """An option or a config file is wrong."""


class DataError(SeewhyError):
    """A dataset, folder or class is missing or unusable."""


class ImageError(DataError):
    """Images cannot be used; `bad` lists (path, reason)."""

    def __init__(self, message: str, bad: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(message)
        self.bad = bad

    @staticmethod
    def of(bad: abc.Sequence[tuple[str, str]], total: int, advice: str, count: int | None = None) -> ImageError:
        """Make the error for `bad`, (path, reason) each, of `total` images; the message names the first five.

        count: of all unusable images, if `bad` holds only the first of them.
        """
        count = len(bad) if count is None else count
        listed = ", ".join(f"{path} ({reason})" for path, reason in bad[:5])
        more = f", and {count - 5} more" if count > 5 else ""
        return ImageError(f"{count} of {total} images cannot be used: {listed}{more}; {advice}", tuple(bad))


class StorageUnavailableError(SeewhyError):
    """A network, a disk or credentials failed; a later retry may succeed."""


class SplitError(SeewhyError):
    """The images cannot be split as requested."""


class BackboneError(SeewhyError):
    """The network is unknown, or cannot be split into trunk and tail."""


class WeightsError(BackboneError):
    """Weights are missing or do not fit the network."""


class RunError(SeewhyError):
    """A saved run is missing, incomplete or of another version."""


class OutputError(SeewhyError):
    """A file or folder cannot be written."""
