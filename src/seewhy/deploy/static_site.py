"""Exported file -> a folder for any web host: the page, the model, and onnxruntime-web to run it in the browser."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path

from seewhy.core.cache import cache_dir
from seewhy.core.files import atomic_folder, nan_to_none
from seewhy.errors import OutputError, reason_of
from seewhy.inference.onnx_model import about, load_onnx

WEB = Path(__file__).parent / "web"
PARTS = {"index.html": "index.html", "page.css": "page.css", "page.js": "page.js", "heat.js": "heat.js", "engine_browser.js": "engine.js"}
RUNTIME = "onnxruntime-web-1.30.0"
RUNTIME_PARTS = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def write_website(model: Path, folder: Path, precision: float | None = None) -> Path:
    """Writes the folder, whole or not at all. OutputError where it exists or cannot be written, or onnxruntime-web cannot be had."""
    facts = nan_to_none(about(load_onnx(model), precision))
    archive = fetch_runtime()
    with atomic_folder(folder, "choose another place with --web") as work:
        (work / "ort").mkdir()
        for name, written in PARTS.items():
            shutil.copyfile(WEB / name, work / written)
        shutil.copyfile(model, work / "model.onnx")
        (work / "model.json").write_text(json.dumps(facts, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        unpack_runtime(archive, work / "ort")
    return folder


def fetch_runtime() -> Path:
    """The npm package of onnxruntime-web, from the cache or by npm."""
    archive = cache_dir() / f"{RUNTIME}.tgz"
    if archive.is_file():
        return archive
    npm = shutil.which("npm")
    advice = f"install Node.js, or put the npm package as {archive}"
    if npm is None:
        raise OutputError(f"onnxruntime-web is fetched by npm, and there is none; {advice}")
    package, _, version = RUNTIME.rpartition("-")
    command = [npm, "pack", "--silent", "--pack-destination", str(archive.parent), f"{package}@{version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not archive.is_file():
        reason = reason_of(done.stderr or "nothing came", 120)
        raise OutputError(f"onnxruntime-web could not be fetched by npm ({reason}); {advice}")
    return archive


def unpack_runtime(archive: Path, folder: Path) -> None:
    """The parts that a browser loads, and the page that names the licence. OutputError for an archive that lacks them."""
    try:
        with tarfile.open(archive) as package:
            for name in (*(f"dist/{part}" for part in RUNTIME_PARTS), "README.md"):
                with suppress(KeyError):  # what is missing is named below
                    file = package.extractfile(f"package/{name}")
                    if file is not None:
                        (folder / Path(name).name).write_bytes(file.read())
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise OutputError(f"{archive}: damaged ({error}); remove it and export again") from error
    if missing := [part for part in RUNTIME_PARTS if not (folder / part).is_file()]:
        raise OutputError(f"{archive}: lacks {missing[0]}; remove it and export again")
