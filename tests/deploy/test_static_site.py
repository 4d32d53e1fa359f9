"""The folder for a web host: whole or not there; the npm package is fetched once."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest

from seewhy.deploy import static_site
from seewhy.errors import OutputError


def package(place: Path, names: tuple[str, ...]) -> Path:
    """Something with the layout of the npm package."""
    file = place / f"{static_site.RUNTIME}.tgz"
    with tarfile.open(file, "w:gz") as archive:
        for name in names:
            info = tarfile.TarInfo(f"package/dist/{name}")
            info.size = 4
            archive.addfile(info, io.BytesIO(b"wasm"))
    return file


def test_all_parts_are_there(demo_onnx: Path, cache: Path, tmp_path: Path) -> None:
    cache.mkdir()
    package(cache, static_site.RUNTIME_PARTS)
    folder = static_site.write_website(demo_onnx, tmp_path / "site")
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "engine.js",
        "heat.js",
        "index.html",
        "model.json",
        "model.onnx",
        *(f"ort/{name}" for name in sorted(static_site.RUNTIME_PARTS)),
        "page.css",
        "page.js",
    ]
    about = json.loads((folder / "model.json").read_text())
    assert {"boat", "house"} <= set(about["classes"])
    with pytest.raises(OutputError, match="exists already"):
        static_site.write_website(demo_onnx, folder)


def test_mistakes_leave_nothing(demo_onnx: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.mkdir()
    for names, words in [(("ort.wasm.min.mjs",), r"lacks ort-wasm-simd-threaded\.mjs; remove it"), (None, "damaged")]:
        package(cache, names) if names else (cache / f"{static_site.RUNTIME}.tgz").write_bytes(b"no archive")
        with pytest.raises(OutputError, match=words):
            static_site.write_website(demo_onnx, tmp_path / "site")
    (cache / f"{static_site.RUNTIME}.tgz").unlink()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(OutputError, match=r"install Node\.js, or put the npm package as"):
        static_site.write_website(demo_onnx, tmp_path / "site")
    monkeypatch.setattr(shutil, "which", lambda name: "/bin/false")
    with pytest.raises(OutputError, match=r"could not be fetched by npm \(nothing came\)"):
        static_site.write_website(demo_onnx, tmp_path / "site")
    assert not list(tmp_path.glob("*site*"))
