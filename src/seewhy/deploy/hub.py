"""Run <-> a place to share it: a folder in Hugging Face's layout, which timm reads too, or a repository of a Hugging Face hub."""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from seewhy.core.files import atomic_folder, locked, write_json
from seewhy.errors import OutputError, RunError, SeewhyError, WeightsError, reason_of
from seewhy.models.manifest import MAX_BYTES, read_manifest
from seewhy.models.saved_run import SavedRun, load
from seewhy.models.weights import read_weights

GB = 10**9
# What is shared of a run, and the most bytes that are taken of each. Not: what it has told whom (log.txt, tensorboard/, mlflow.json) and
# exported files, which `seewhy export` makes again.
NEEDED = {"run.json": MAX_BYTES, "model.safetensors": 20 * GB}
FILES = {
    **NEEDED,
    "ood_reference.safetensors": GB,
    "metrics.json": GB,
    "split.json": GB,
    "history.csv": GB,
    "predictions_val.csv": GB,
    "predictions_test.csv": GB,
    "README.md": 10**7,
    **{f"figures/{name}.png": 10**8 for name in ("training_curves", "confusion_matrix", "heatmaps")},
}
REPORT = {"report.html": GB}  # a page runs what its writer wrote, so it is taken on request alone
HUB = "hf://"
NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
WITH_TIMM = """
## Elsewhere

`seewhy pull hf://USER/NAME` (or a folder like this one) makes it a run again. `timm.create_model("hf-hub:USER/NAME", pretrained=True)`, or
`"local-dir:FOLDER"`, is its network with its classifier; `config.json` holds names and preprocessing.
"""


# ---------------------------------------------------------------- the two ways


def push(run: SavedRun, place: str | Path, public: bool = False) -> str:
    """Copies a run to `place`, whole or not at all, and says where it is now. Nothing is replaced.

    place: a folder that is not there yet, or hf://USER/NAME. public: whether a repository may be seen by everybody; private without.
    Raises RunError for a run that is not whole, OutputError where the place holds something or cannot be written.
    """
    if hub_name(place) is not None:
        return _push_to_hub(run, str(place), public)
    target = Path(place)
    with locked(target, "choose another place"), atomic_folder(target) as work:
        write_layout(run, work)
    return str(target)


def pull(place: str | Path, out: str | Path | None = None, report: bool = False) -> SavedRun:
    """A run that somebody has pushed -> a run of one's own, checked as `load` checks it; `out` is there whole or not at all.

    place: a folder, or hf://USER/NAME[@REVISION]. out: the run's folder (default: runs/NAME). report: take report.html too, a page that
    runs what its writer wrote when it is opened. Only files that a run has are taken, no links, none larger than one can need.
    Raises RunError for what is no run or cannot be fetched, OutputError where `out` holds something or cannot be written.
    """
    hub = hub_name(place)
    name = (hub[0] if hub else str(Path(place).absolute())).rstrip("/").rpartition("/")[2]
    target = Path(out) if out is not None else Path("runs") / re.sub(r"[^\w.-]", "_", name)
    if hub is None and not Path(place).is_dir():
        raise RunError(f"{place}: no such folder; name a folder that `seewhy push` has written, or hf://USER/NAME")
    wanted = FILES | (REPORT if report else {})
    with locked(target), atomic_folder(target, "choose another --out") as work:
        if hub is None:
            take_files(Path(place), work, wanted)
        else:
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as fetched:
                _fetch(*hub, Path(fetched), wanted)
                take_files(Path(fetched), work, wanted)
        try:
            found = load(work)
        except RunError as error:
            raise RunError(str(error).replace(str(work), str(place))) from error
    return replace(found, path=target)


def hub_name(place: str | Path) -> tuple[str, str | None] | None:
    """'hf://USER/NAME@REVISION' -> (USER/NAME, REVISION); None for a folder. Raises OutputError for another scheme or no such name."""
    text = str(place)
    if isinstance(place, Path) or "://" not in text:
        return None
    name, _, revision = text.removeprefix(HUB).partition("@")
    if not text.startswith(HUB) or not NAME.fullmatch(name) or not re.fullmatch(r"[\w./-]*", revision, re.ASCII):
        raise OutputError(f"{text}: no place that seewhy knows; name a folder, or hf://USER/NAME")
    return name, revision or None


# ---------------------------------------------------------------- the layout


def write_layout(run: SavedRun, folder: Path) -> None:
    """The files of a run, its card, and a config.json for timm, into an empty folder. Raises RunError where they are not this run's."""
    take_files(run.path, folder, FILES | REPORT)
    read_manifest(folder)
    own = run.backbone.model.state_dict()
    try:
        state = read_weights(folder / "model.safetensors")
    except WeightsError:
        state = {}
    if state.keys() != own.keys() or not all(torch.equal(state[name], own[name].cpu()) for name in own):
        raise RunError(f"{run.path / 'model.safetensors'}: damaged, or not what this run was loaded from; load it again")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {run.path.name}\n"
    if WITH_TIMM not in text:
        card.write_text(text + WITH_TIMM, encoding="utf-8")
    write_json(folder / "config.json", timm_config(run))


def timm_config(run: SavedRun) -> dict[str, Any]:
    """What timm reads as config.json beside the weights: the architecture, the classes and the way from image to input.

    timm's resizing differs from seewhy's in roundings; with tta_flip, a run's answers are means of two of timm's.
    """
    preprocessing, network = run.backbone.preprocessing, run.backbone.model
    architecture, _, tag = run.backbone.timm_name.partition(".")
    known = dict(getattr(network, "pretrained_cfg", {}) or {})
    # What the architecture says of itself; where ImageNet weights would come from is no fact about these.
    kept = {
        name: known[name]
        for name in ("first_conv", "classifier", "pool_size", "fixed_input_size", "license")
        if known.get(name) is not None
    }
    squash = preprocessing.resize == "squash"
    return {
        "architecture": architecture,
        "num_classes": len(run.classes),
        "num_features": getattr(network, "num_features", None),
        "label_names": list(run.classes),
        "pretrained_cfg": {
            **kept,
            **({"tag": tag} if tag else {}),
            "custom_load": False,
            "input_size": [3, preprocessing.size, preprocessing.size],
            "interpolation": preprocessing.interpolation,
            "crop_pct": 1.0 if squash else preprocessing.crop,
            "crop_mode": "squash" if squash else "center",
            "mean": list(preprocessing.mean),
            "std": list(preprocessing.std),
            "num_classes": len(run.classes),
        },
    }


def take_files(source: Path, folder: Path, wanted: Mapping[str, int]) -> None:
    """Copies the wanted files that are there, no larger than `wanted` says. Raises RunError for links and whatever is no plain file."""
    for name, most in wanted.items():
        file = source / name
        for place in (*[source / parent for parent in Path(name).parents if parent.name], file):
            if place.is_symlink():
                raise RunError(f"{place}: a link, which may lead anywhere; only plain files are taken, so copy what it leads to")
        if not file.exists():
            if name in NEEDED:
                raise RunError(f"{source}: not a run (it holds no {name}); name a folder that `seewhy push` has written")
            continue
        (folder / name).parent.mkdir(exist_ok=True)
        _copy(file, folder / name, most)


def _copy(source: Path, target: Path, most: int) -> None:
    try:
        # What was a plain file a moment ago may be a link or a pipe now: neither is followed or waited for.
        place = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise RunError(f"{source}: cannot be read ({error.strerror}); only plain files are taken") from error
    with open(place, "rb") as read:
        found = os.fstat(place)
        if not stat.S_ISREG(found.st_mode):
            raise RunError(f"{source}: no plain file; only those are taken")
        if found.st_size > most:
            raise RunError(f"{source}: {found.st_size / 1e6:,.0f} MB, more than a run can need of it ({most / 1e6:,.0f} MB)")
        with target.open("xb") as written:
            shutil.copyfileobj(read, written, 1 << 20)


# ---------------------------------------------------------------- the hub


def _hub() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _push_to_hub(run: SavedRun, place: str, public: bool) -> str:
    from huggingface_hub import get_token

    name, revision = hub_name(place) or ("", None)
    if revision:
        raise OutputError(f"{place}: a run is pushed to a repository, not to a revision of it; leave @{revision} out")
    if get_token() is None:
        raise OutputError(f"{place}: nobody is logged in; run `hf auth login`, or set $HF_TOKEN")
    with tempfile.TemporaryDirectory() as staged, _one_line(place, OutputError):
        api = _hub()
        api.create_repo(name, private=not public, exist_ok=True)
        there = api.repo_info(name)
        taken = [file.rfilename for file in there.siblings or [] if file.rfilename in FILES and file.rfilename != "README.md"]
        if taken:
            raise OutputError(f"{place}: holds {taken[0]} already; choose another name, or remove the repository first")
        if not public and not there.private:
            raise OutputError(f"{place}: a repository that everybody may see; pass --public if they may, or make it private first")
        write_layout(run, Path(staged))
        api.upload_folder(repo_id=name, folder_path=staged, commit_message=f"{run.path.name}, pushed by seewhy")
        return f"{api.endpoint}/{name}"


def _fetch(name: str, revision: str | None, folder: Path, wanted: Mapping[str, int]) -> None:
    """The wanted files of one commit, after a look at their sizes."""
    place = f"{HUB}{name}" + (f"@{revision}" if revision else "")
    with _one_line(place, RunError):
        api = _hub()
        info = api.repo_info(name, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if file.rfilename in wanted}
        if missing := [file for file in NEEDED if file not in sizes]:
            raise RunError(f"{place}: not a run (it holds no {missing[0]}); name a repository that `seewhy push` has written")
        for file, size in sizes.items():
            if size > wanted[file]:
                raise RunError(f"{place}: {file} has {size / 1e6:,.0f} MB, more than a run can need of it ({wanted[file] / 1e6:,.0f} MB)")
        api.snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=list(sizes))


@contextmanager
def _one_line(place: str, kind: type[SeewhyError]) -> Iterator[None]:
    """What the hub's client raises, of half a dozen libraries, as one line."""
    try:
        yield
    except SeewhyError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        login = "run `hf auth login`, or set $HF_TOKEN"
        if status in (401, 403):
            text = f"the hub does not allow it; {login}, and check that the account may"
        elif status == 404:
            text = f"no such repository, or a private one; check its name, or {login}"
        else:
            reason = reason_of(error)
            text = f"the hub cannot be asked ({reason}); check the network, or name a folder"
        raise kind(f"{place}: {text}") from error
