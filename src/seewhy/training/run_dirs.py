"""Choose the folder of a run, and lock its work folder for one training at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import Timeout

from seewhy.config import TrainConfig, dump_config
from seewhy.core.files import acquire_lock, atomic_write, remove_tree, write_json
from seewhy.data.listing import DATASETS
from seewhy.errors import OutputError, RunError, SeewhyError


@dataclass(frozen=True)
class RunPaths:
    """Folders of a run: `tmp`, hidden, until it is complete, then `final`."""

    tmp: Path
    final: Path

    @staticmethod
    def of(final: Path) -> RunPaths:
        """Paths of the run that will be at `final`."""
        return RunPaths(final.parent / f".{final.name}.partial", final)


def resolve_run_dir(config: TrainConfig, out: Path | None, resume: bool, after: Path | None = None) -> RunPaths:
    """Return `out`, or the first free runs/NAME (after the name `after`); with `resume`, the unfinished run of this name if there is one.

    Raises OutputError if the folder exists.
    """
    final = out
    if final is None:
        data = config.data if config.data in DATASETS else Path(config.data).resolve().name
        name = re.sub(r"[^\w.-]", "_", f"{data}-{config.backbone}-unfreeze{config.unfreeze}-seed{config.seed}")
        candidates = [Path("runs", name), *(Path("runs", f"{name}-{number}") for number in range(2, 1000))]
        if resume:
            final = next((path for path in candidates if RunPaths.of(path).tmp.exists()), candidates[0])
        else:
            begin = candidates.index(after) + 1 if after is not None else 0
            final = next((path for path in candidates[begin:] if not path.exists()), None)
            if final is None:
                raise OutputError(f"{candidates[0]}: {len(candidates)} runs of this name exist already; choose another name with --out")
    if not resume and _occupied(final):
        raise OutputError(f"{final}: exists already; choose another --out or remove it")
    return RunPaths.of(final)


def _occupied(path: Path) -> bool:
    """Whether there is something other than an empty folder."""
    return path.exists() and (not path.is_dir() or any(path.iterdir()))


@contextmanager
def acquire_work_dir(paths: RunPaths, config: TrainConfig, resume: bool, named: bool) -> Iterator[RunPaths]:
    """Lock the run's folders, and create the work folder or reopen it with `resume`. Yields the paths, under the next free name if needed.

    named: whether the user chose the folder. Raises RunError if another training has the lock or the work folder has another config.
    """
    paths, release = _lock(paths, config, resume, named)
    try:
        _open_work_dir(paths, config, resume)
        yield paths
    finally:
        release()


def _lock(paths: RunPaths, config: TrainConfig, resume: bool, named: bool) -> tuple[RunPaths, Callable[[], None]]:
    while True:
        try:
            release = acquire_lock(paths.final, "choose another folder with --out")
            if not _occupied(paths.final):
                return paths, release
            release()
            reason: SeewhyError = OutputError(f"{paths.final}: exists already; choose another --out or remove it")
        except Timeout:
            reason = RunError(f"{paths.final}: another training is writing this run; choose another --out")
        if named or resume:
            raise reason
        paths = resolve_run_dir(config, None, False, after=paths.final)  # another training has just taken the name


def _open_work_dir(paths: RunPaths, config: TrainConfig, resume: bool) -> None:
    record, exists = paths.tmp / "config.json", paths.tmp.exists()
    if exists and not resume:
        raise RunError(f"{paths.final}: an unfinished run is in {paths.tmp}; pass --resume to continue it, or remove that folder")
    if record.is_file() and read_json(record) != dump_config(config):
        raise RunError(f"{paths.tmp}: an unfinished run with other options; repeat its options, or choose another --out")
    try:
        paths.tmp.mkdir(exist_ok=True)
        if not record.is_file():
            with atomic_write(record, "free some space, or choose another folder with --out") as work:
                write_json(work, dump_config(config))
    except BaseException as error:
        if not exists:
            remove_tree(paths.tmp)
        if isinstance(error, OSError):
            raise OutputError(f"{paths.tmp}: cannot be written ({error.strerror}); choose another folder with --out") from error
        raise


def read_json(file: Path) -> Any:
    """Read a JSON file of a work folder. Raises RunError if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: damaged ({error}); remove {file.parent} and train again") from error
