"""Path -> a work file beside it, which takes its place when all of it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from seewhy.errors import OutputError


@contextmanager
def whole_file(path: Path, advice: str = "choose another place") -> Iterator[Path]:
    """Where to write; `path` is there afterwards, whole, and as it was before if anything is raised.

    Raises OutputError, which ends with `advice`, where the place cannot be written.
    """
    work = path.parent / f".{path.name}-{os.getpid()}"  # not by tempfile, whose files their owner alone may read
    new_parent = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield work
        os.replace(work, path)
    except BaseException as error:
        with suppress(OSError):  # where the folder could not be made, neither is there a file to remove
            work.unlink()
        if new_parent:
            with suppress(OSError):
                path.parent.rmdir()
        if isinstance(error, OSError):
            raise OutputError(f"{path}: cannot be written ({error.strerror or error}); {advice}") from error
        raise
