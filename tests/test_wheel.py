"""The wheel and the sdist hold all of the package and nothing else, and what is unpacked of the wheel runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import seewhy

REPOSITORY = Path(__file__).parents[1]
PACKAGE = sorted(
    path.relative_to(REPOSITORY / "src").as_posix()
    for path in (REPOSITORY / "src" / "seewhy").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)


def run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(wheel, sdist) of a copy of the checkout, by the build backend that pyproject.toml names; without network."""
    copy, out = tmp_path_factory.mktemp("checkout"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, copy)
    shutil.copytree(REPOSITORY / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    shutil.copytree(REPOSITORY / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r}); build_meta.build_wheel({str(out)!r})"
    run(sys.executable, "-c", code, cwd=copy)
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    assert built[0].name == f"seewhy-{seewhy.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(built[0]) as wheel:
        names = wheel.namelist()
        facts = f"seewhy-{seewhy.__version__}.dist-info/"
        assert sorted(name for name in names if not name.startswith(facts)) == PACKAGE
        assert {"seewhy/py.typed", "seewhy/reports/templates/report.html", "seewhy/deploy/web/page.css"} <= set(names)
        metadata = wheel.read(f"{facts}METADATA").decode()
        assert "seewhy = seewhy.cli.main:main" in wheel.read(f"{facts}entry_points.txt").decode()
    assert f"{facts}licenses/LICENSE" in names
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist: ") and "extra ==" not in line]
    assert any(line.startswith("Requires-Dist: torch>=") for line in required)
    assert not any("fastapi" in line or "optuna" in line for line in required)


def test_the_sdist_has_all_that_the_wheel_is_built_from(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", *(f"src/{name}" for name in PACKAGE)} <= names


def test_what_is_unpacked_of_it_runs(built: tuple[Path, Path], tmp_path: Path) -> None:
    """With the packages of this environment, but away from the checkout."""
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(tmp_path / "installed")
    where = {"PYTHONPATH": str(tmp_path / "installed")}
    place = run(sys.executable, "-P", "-c", "import seewhy; print(seewhy.__file__)", cwd=tmp_path, **where)
    assert Path(place.strip()) == tmp_path / "installed" / "seewhy" / "__init__.py"
    assert run(sys.executable, "-P", "-m", "seewhy.cli", "--version", cwd=tmp_path, **where) == f"seewhy {seewhy.__version__}\n"
    assert "--dry-run" in run(sys.executable, "-P", "-m", "seewhy.cli", "train", "--help", cwd=tmp_path, COLUMNS="200", **where)
