"""TrainConfig x --out -> where a run is made and where it will stand, claimed for one training at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
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
    """Where a run is made (`work`, hidden until whole) and where it will stand (`target`)."""

    work: Path
    target: Path


def resolve_run_dir(config: TrainConfig, out: Path | None, resume: bool, after: Path | None = None) -> RunPaths:
    """`out`, or the first free runs/NAME (behind the name `after`); with `resume` the place of the run of this name, finished or not."""
    if out is not None:
        target = out
    else:
        data = config.data if config.data in DATASETS else Path(config.data).resolve().name
        name = re.sub(r"[^\w.-]", "_", f"{data}-{config.backbone}-unfreeze{config.unfreeze}-seed{config.seed}")
        target = Path("runs") / name
        candidates = [target] + [target.with_name(f"{name}-{number}") for number in range(2, 1000)]
        unfinished = [place for place in candidates if _work_of(place).exists()] if resume else []
        if unfinished:
            target = unfinished[0]
        elif not resume:
            first = candidates.index(after) + 1 if after is not None else 0
            free = next((place for place in candidates[first:] if not place.exists()), None)
            if free is None:
                raise OutputError(f"{target}: {len(candidates)} runs of this name are there already; name another place with --out")
            target = free
    if not resume and _taken(target):
        raise OutputError(f"{target}: exists already; choose another --out or remove it")
    return RunPaths(_work_of(target), target)


def _taken(target: Path) -> bool:
    """Whether something is there that a run must not replace."""
    return target.exists() and (not target.is_dir() or any(target.iterdir()))


def _work_of(target: Path) -> Path:
    return target.parent / f".{target.name}.partial"


def acquire_work_dir(places: RunPaths, config: TrainConfig, resume: bool, named_by_us: bool) -> tuple[RunPaths, Callable[[], None]]:
    """Makes or reopens the work folder and claims it, so that two trainings never share one; the place, and how to let go of it."""
    while True:
        try:
            let_go = acquire_lock(places.target, "choose another place with --out")
            if not _taken(places.target):
                break
            let_go()
            reason: SeewhyError = OutputError(f"{places.target}: exists already; choose another --out or remove it")
        except Timeout:
            reason = RunError(f"{places.target}: another training writes it right now; choose another --out")
        if not named_by_us or resume:
            raise reason
        places = resolve_run_dir(config, None, False, places.target)  # started in the same moment: the next free name
    record, begun = places.work / "config.json", places.work.exists()
    try:
        if begun:
            if not resume:
                raise RunError(f"{places.target}: an unfinished run is in {places.work}; pass --resume to go on, or remove that folder")
            if record.is_file() and read_json(record) != dump_config(config):
                raise RunError(f"{places.work}: holds an unfinished run with other options; repeat its options, or choose another --out")
        places.work.mkdir(exist_ok=True)
        if not record.is_file():
            with atomic_write(record, "free some space, or choose another place with --out") as work:
                write_json(work, dump_config(config))
    except BaseException as error:
        if not begun:
            remove_tree(places.work)
        let_go()
        if isinstance(error, OSError):
            raise OutputError(f"{places.work}: cannot be written ({error.strerror}); choose another place with --out") from error
        raise
    return places, let_go


def read_json(file: Path) -> Any:
    """What a file of a work folder holds; RunError where it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{file}: damaged ({error}); remove {file.parent} and train again") from error
