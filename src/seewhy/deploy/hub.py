"""Push runs to, and pull them from, a folder or a Hugging Face repository, in a layout that timm reads too."""

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
# Files of a run that are shared, and their maximum sizes in bytes. Logs and trackers' files stay private; exports can be made again.
REQUIRED = {"run.json": MAX_BYTES, "model.safetensors": 20 * GB}
FILES = {
    **REQUIRED,
    **{f"{name}.csv": GB for name in ("history", "predictions_val", "predictions_test")},
    **dict.fromkeys(("ood_reference.safetensors", "metrics.json", "split.json"), GB),
    "README.md": 10**7,
    **{f"figures/{name}.png": 10**8 for name in ("training_curves", "confusion_matrix", "heatmaps")},
}
REPORT = {"report.html": GB}  # pulled on request only: a page can run scripts of its author
HUB = "hf://"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
LOGIN = "run `hf auth login`, or set $HF_TOKEN"
USAGE = """
## Elsewhere

`seewhy pull hf://USER/NAME` (or a folder like this one) makes it a run again. `timm.create_model("hf-hub:USER/NAME", pretrained=True)`, or
`"local-dir:FOLDER"`, loads its network with its classifier; `config.json` holds class names and preprocessing.
"""


# ---------------------------------------------------------------- push and pull


def push(run: SavedRun, destination: str | Path, public: bool = False) -> str:
    """Copy a run to `destination`, completely or not at all, and return its new path or URL. Nothing is replaced.

    destination: a new folder, or hf://USER/NAME. public: whether anyone may see the repository.
    Raises RunError if the run is incomplete, OutputError if the destination holds something or cannot be written.
    """
    hub = parse_hub_address(destination)
    if hub is not None:
        return _push_to_hub(run, *hub, public)
    target = Path(destination)
    with locked(target, "choose another destination"), atomic_folder(target, "choose another destination") as work:
        write_layout(run, work)
    return str(target)


def pull(source: str | Path, out: str | Path | None = None, report: bool = False) -> SavedRun:
    """Fetch a pushed run into `out`, completely or not at all, and load it with all of `load`'s checks.

    source: a folder, or hf://USER/NAME[@REVISION]. out: the run's folder (default: runs/NAME). report: also fetch report.html, a page
    that can run scripts of its author. Only the files of a run are taken, no links, and none above its maximum size.
    Raises RunError if the source is not a run or cannot be fetched, OutputError if `out` holds something or cannot be written.
    """
    hub = parse_hub_address(source)
    name = (hub[0] if hub else str(Path(source).absolute())).rstrip("/").rpartition("/")[2]
    target = Path(out) if out is not None else Path("runs") / re.sub(r"[^\w.-]", "_", name)
    if hub is None and not Path(source).is_dir():
        raise RunError(f"{source}: no such folder; name a folder that `seewhy push` has written, or hf://USER/NAME")
    files = FILES | (REPORT if report else {})
    with locked(target), atomic_folder(target, "choose another --out") as work:
        if hub is None:
            copy_files(Path(source), work, files)
        else:
            with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as download:
                _fetch(*hub, Path(download), files)
                copy_files(Path(download), work, files)
        try:
            run = load(work)
        except RunError as error:
            raise RunError(str(error).replace(str(work), str(source))) from error
    return replace(run, path=target)


def parse_hub_address(address: str | Path) -> tuple[str, str | None] | None:
    """Return (USER/NAME, REVISION or None) of 'hf://USER/NAME[@REVISION]', None for a folder. Raises OutputError for other addresses."""
    text = str(address)
    if isinstance(address, Path) or "://" not in text:
        return None
    name, _, revision = text.removeprefix(HUB).partition("@")
    if not text.startswith(HUB) or not REPOSITORY.fullmatch(name) or not re.fullmatch(r"[\w./-]*", revision, re.ASCII):
        raise OutputError(f"{text}: unknown kind of address; name a folder, or hf://USER/NAME")
    return name, revision or None


# ---------------------------------------------------------------- the layout


def write_layout(run: SavedRun, folder: Path) -> None:
    """Write a run's files, its card and timm's config.json into an empty folder. Raises RunError if the files are not those of `run`."""
    copy_files(run.path, folder, FILES | REPORT)
    read_manifest(folder)
    expected = run.backbone.model.state_dict()
    try:
        state = read_weights(folder / "model.safetensors")
    except WeightsError:
        state = {}
    if state.keys() != expected.keys() or not all(torch.equal(state[name], expected[name].cpu()) for name in expected):
        raise RunError(f"{run.path / 'model.safetensors'}: damaged, or changed since this run was loaded; load it again")
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else f"# {run.path.name}\n"
    if USAGE not in text:
        card.write_text(text + USAGE, encoding="utf-8")
    write_json(folder / "config.json", timm_config(run))


def timm_config(run: SavedRun) -> dict[str, Any]:
    """Return timm's config.json: architecture, classes and preprocessing.

    timm's resizing rounds differently. With tta_flip, a run's logits are the mean of two of timm's (image and mirror image).
    """
    preprocessing, network = run.backbone.preprocessing, run.backbone.model
    architecture, _, tag = run.backbone.timm_name.partition(".")
    original = dict(getattr(network, "pretrained_cfg", {}) or {})
    names = ("first_conv", "classifier", "pool_size", "fixed_input_size", "license")  # of the architecture, not of its ImageNet weights
    squash = preprocessing.resize == "squash"
    return {
        "architecture": architecture,
        "num_classes": len(run.classes),
        "num_features": getattr(network, "num_features", None),
        "label_names": list(run.classes),
        "pretrained_cfg": {
            **{name: original[name] for name in names if original.get(name) is not None},
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


def copy_files(source: Path, folder: Path, files: Mapping[str, int]) -> None:
    """Copy those of `files` (name: maximum bytes) that exist. Raises RunError for links, other special files and larger ones."""
    for name, max_bytes in files.items():
        path = source / name
        for part in (*[source / parent for parent in Path(name).parents if parent.name], path):
            if part.is_symlink():
                raise RunError(f"{part}: a link; only regular files are copied, so replace it by what it points to")
        if path.exists():
            (folder / name).parent.mkdir(exist_ok=True)
            _copy(path, folder / name, max_bytes)
        elif name in REQUIRED:
            raise RunError(f"{source}: not a run (it has no {name}); name a folder that `seewhy push` has written")


def _copy(source: Path, target: Path, max_bytes: int) -> None:
    try:
        # The file may have been replaced by a link or a pipe since it was checked: neither is followed or waited for.
        descriptor = os.open(source, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise RunError(f"{source}: cannot be read ({error.strerror}); only regular files are copied") from error
    with open(descriptor, "rb") as read:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise RunError(f"{source}: not a regular file; only those are copied")
        _check_size(source, status.st_size, max_bytes)
        with target.open("xb") as written:
            shutil.copyfileobj(read, written, 1 << 20)


def _check_size(name: Path | str, size: int, max_bytes: int) -> None:
    if size > max_bytes:
        raise RunError(f"{name}: {size / 1e6:,.0f} MB, more than such a file of a run can have ({max_bytes / 1e6:,.0f} MB)")


# ---------------------------------------------------------------- Hugging Face


def _client() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)


def _push_to_hub(run: SavedRun, name: str, revision: str | None, public: bool) -> str:
    from huggingface_hub import get_token

    address = f"{HUB}{name}"
    if revision:
        raise OutputError(f"{address}@{revision}: runs are pushed to a repository, not to a revision; leave out @{revision}")
    if get_token() is None:
        raise OutputError(f"{address}: not logged in; {LOGIN}")
    with tempfile.TemporaryDirectory() as staged, _translate_errors(address, OutputError):
        client = _client()
        client.create_repo(name, private=not public, exist_ok=True)
        info = client.repo_info(name)
        existing = [file.rfilename for file in info.siblings or [] if file.rfilename in FILES and file.rfilename != "README.md"]
        if existing:
            raise OutputError(f"{address}: has {existing[0]} already; choose another name, or delete the repository first")
        if not public and not info.private:
            raise OutputError(f"{address}: the repository is public; add --public if the run may be, or make it private first")
        write_layout(run, Path(staged))
        client.upload_folder(repo_id=name, folder_path=staged, commit_message=f"{run.path.name}, pushed by seewhy")
        return f"{client.endpoint}/{name}"


def _fetch(name: str, revision: str | None, folder: Path, files: Mapping[str, int]) -> None:
    """Download those of `files` that one commit has, after checking their sizes."""
    address = f"{HUB}{name}" + (f"@{revision}" if revision else "")
    with _translate_errors(address, RunError):
        client = _client()
        info = client.repo_info(name, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or [] if file.rfilename in files}
        if missing := [file for file in REQUIRED if file not in sizes]:
            raise RunError(f"{address}: not a run (it has no {missing[0]}); name a repository that `seewhy push` has written")
        for file, size in sizes.items():
            _check_size(f"{address}: {file}", size, files[file])
        client.snapshot_download(name, revision=info.sha, local_dir=folder, allow_patterns=list(sizes))


@contextmanager
def _translate_errors(address: str, kind: type[SeewhyError]) -> Iterator[None]:
    """Turn the errors of the hub's client, which come from several libraries, into one line."""
    try:
        yield
    except SeewhyError:
        raise
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            text = f"access denied; {LOGIN}, and check the account's permissions"
        elif status == 404:
            text = f"no such repository, or a private one; check its name, or {LOGIN}"
        else:
            text = f"the hub cannot be reached ({reason_of(error)}); check the network, or name a folder"
        raise kind(f"{address}: {text}") from error
