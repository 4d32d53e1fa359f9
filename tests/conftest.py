"""What the tests share: a cache of their own, small image folders, the real images where present."""

from __future__ import annotations

import os

if os.environ.get("PYTEST_XDIST_WORKER"):  # two of them share the cores; before torch is imported, and for the commands that tests start
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

if TYPE_CHECKING:
    from seewhy.api import Run

REPOSITORY = Path(__file__).parents[1]


def data_root() -> Path | None:
    """The folder that holds caltech101, from $SEEWHY_DATA or beside the checkout."""
    for place in (os.environ.get("SEEWHY_DATA"), REPOSITORY.parent / "shared"):
        if place and (Path(place) / "caltech101" / "101_ObjectCategories").is_dir():
            return Path(place)
    return None


@pytest.fixture(autouse=True, scope="session")
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests of this process, away from the user's and from those of others: what is in it decides what is computed."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["SEEWHY_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def for_all(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of this session share: what stands in it is made once, by the first that needs it, under a lock."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache for one test."""
    folder = tmp_path / "fresh-cache"
    monkeypatch.setenv("SEEWHY_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def caltech_root() -> Path:
    """The real images, or a skip."""
    root = data_root()
    if root is None:
        pytest.skip("Caltech-101 is not here: set SEEWHY_DATA to the folder that holds caltech101")
    return root


@pytest.fixture(scope="session")
def resnet18_weights() -> Path:
    """A weights file of ResNet-18, or a skip."""
    file = Path(os.environ.get("SEEWHY_RESNET18", REPOSITORY.parent / "shared/weights/resnet18_reconstructed.safetensors"))
    if not file.is_file():
        pytest.skip("no ResNet-18 weights here: set SEEWHY_RESNET18 to a weights file")
    return file


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For small networks: threads that wait for each other on a busy machine take many times as long as one."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """make_folder({"cat": 5, "dog": 4}) -> a folder of small images, each class in a colour of its own."""

    def make(classes: dict[str, int], name: str = "images", size: tuple[int, int] = (48, 40)) -> Path:
        root = tmp_path / name
        for c, (label, count) in enumerate(classes.items()):
            (root / label).mkdir(parents=True)
            for n in range(count):
                rng = np.random.default_rng([c, n])
                noise = rng.integers(0, 90, size=(size[1], size[0], 3))
                noise[..., c % 3] += 150
                Image.fromarray(noise.astype(np.uint8)).save(root / label / f"{n}.png")
        return root

    return make


@pytest.fixture(scope="session")
def demo_set(for_all: Path, session_cache: Path) -> Path:
    """The demo set in the session's cache, drawn once for all processes."""
    from seewhy.data.synthetic import draw_scenes

    with FileLock(for_all / "scenes.lock"):
        drawn = draw_scenes(for_all / "cache" / "scenes")
    return Path(shutil.copytree(drawn, session_cache / "scenes", dirs_exist_ok=True))


@pytest.fixture(scope="session")
def demo_run(for_all: Path, demo_set: Path, session_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run trained on the demo set, for every test that needs a finished one; once for all processes, with a copy for each."""
    import seewhy

    made, cache = for_all / "runs" / "demo", for_all / "cache"
    with FileLock(for_all / "demo.lock"), pytest.MonkeyPatch.context() as patch:
        if not made.exists():
            patch.setenv("SEEWHY_CACHE", str(cache))
            seewhy.train("scenes", backbone="efficientnet_lite0", unfreeze=0, out=made)
    for kept in (*cache.glob("features/*"), *cache.glob("executors/*.onnx")):  # what the training has left behind in its cache
        place = session_cache / kept.relative_to(cache)
        place.parent.mkdir(exist_ok=True)
        if kept.is_file():
            shutil.copy(kept, place)
        elif not place.exists():
            shutil.copytree(kept, place)
    return seewhy.load(shutil.copytree(made, tmp_path_factory.mktemp("runs") / "demo"))


@pytest.fixture(scope="session")
def demo_onnx(demo_run: Run, for_all: Path) -> Path:
    """The demo run as an exported file, likewise; read only."""
    from seewhy.deploy.onnx_export import build_onnx

    path = for_all / "exported" / "model.onnx"
    with FileLock(for_all / "exported.lock"):
        if not path.exists():
            path.parent.mkdir()
            path.write_bytes(build_onnx(demo_run).SerializeToString())
    return path


@pytest.fixture
def demo_images(demo_set: Path) -> list[Path]:
    """Three images of each class of the demo set."""
    return sorted((demo_set / "images").rglob("00[0-2].jpg"))


@pytest.fixture
def without_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """For trainings whose report nobody looks at: to draw it takes about half of a small training."""
    monkeypatch.setattr("seewhy.training.pipeline.write_report", lambda run, history, test, folder: None)
