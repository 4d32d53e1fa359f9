"""Write a folder for any web host: the page, the model, and onnxruntime-web, which runs it in the browser."""

from __future__ import annotations

import gzip
import json
import shutil
import subprocess
import tarfile
import zlib
from pathlib import Path

from seewhy.core.cache import cache_dir
from seewhy.core.files import atomic_folder, nan_to_none
from seewhy.errors import OutputError, reason_of
from seewhy.inference.onnx_model import describe_model, load_onnx

WEB = Path(__file__).parent / "web"
PAGE = {"index.html": "index.html", "page.css": "page.css", "page.js": "page.js", "heat.js": "heat.js", "engine_browser.js": "engine.js"}
RUNTIME = "onnxruntime-web-1.30.0"
RUNTIME_FILES = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def write_static_site(model: Path, folder: Path) -> Path:
    """Write the folder, completely or not at all. Raises OutputError if it exists, cannot be written, or onnxruntime-web is unavailable."""
    facts = nan_to_none(describe_model(load_onnx(model)))
    archive = fetch_runtime()
    with atomic_folder(folder, "choose another --web") as work:
        (work / "ort").mkdir()
        for name, target in PAGE.items():
            shutil.copyfile(WEB / name, work / target)
        shutil.copyfile(model, work / "model.onnx")
        (work / "model.json").write_text(json.dumps(facts, ensure_ascii=False, allow_nan=False), encoding="utf-8")
        unpack_runtime(archive, work / "ort")
    return folder


def fetch_runtime() -> Path:
    """Return the npm package of onnxruntime-web, from the cache or fetched with npm. Raises OutputError."""
    archive = cache_dir() / f"{RUNTIME}.tgz"
    if archive.is_file():
        return archive
    npm = shutil.which("npm")
    advice = f"install Node.js, or save the npm package as {archive}"
    if npm is None:
        raise OutputError(f"npm, which fetches onnxruntime-web, is not installed; {advice}")
    package, _, version = RUNTIME.rpartition("-")
    command = [npm, "pack", "--silent", "--pack-destination", str(archive.parent), f"{package}@{version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not archive.is_file():
        reason = reason_of(done.stderr or "no output", 120)
        raise OutputError(f"npm could not fetch onnxruntime-web ({reason}); {advice}")
    return archive


def unpack_runtime(archive: Path, folder: Path) -> None:
    """Extract the files that a browser loads, and the README with the licence. Raises OutputError for a damaged archive."""
    names = [*(f"package/dist/{name}" for name in RUNTIME_FILES), "package/README.md"]
    try:
        with tarfile.open(archive) as package:
            for member in map(package.getmember, names):
                member.name = Path(member.name).name
                package.extract(member, folder, filter="data")
    except (KeyError, tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise OutputError(f"{archive}: damaged or incomplete ({reason_of(error)}); delete it and export again") from error
