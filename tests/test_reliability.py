"""What docs/concepts/reliability.md promises: killed, interrupted, on a full disk, two at once; benchmarks/crashes.py repeats it."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import seewhy
from seewhy.data.image_set import ImageSet, open_images
from seewhy.errors import OutputError, RunError
from seewhy.models.feature_store import FeatureStore, as_keys

SMALL = {"backbone": "test_resnet.r160_in1k", "weights": "none", "epochs": 3, "batch_size": 8, "workers": 0, "runtime": "torch"}
WORDS = [word for name, value in SMALL.items() for word in ("--set", f"{name}={value}")]
SEEWHY = [sys.executable, "-m", "seewhy.cli"]


@pytest.fixture
def folder(make_folder: Callable[..., Path], cache: Path) -> Path:
    return make_folder({"ant": 10, "bee": 10, "cow": 12})


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.01)


def epochs_told(work: Path) -> int:
    log = work / "log.txt"
    return log.read_text().count("epoch ") if log.exists() else 0


def assert_same_weights(one: Path, two: Path) -> None:
    a, b = (load_file(path / "model.safetensors") for path in (one, two))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- killed and interrupted


def test_killed_and_interrupted_then_resumed_has_the_same_bits(folder: Path, tmp_path: Path) -> None:
    """kill -9 in the first epoch or after it, then Ctrl-C in a later one, each time resumed."""
    options = {**SMALL, "epochs": 30, "patience": 30}
    words = [*WORDS, "--set", "epochs=30", "--set", "patience=30"]
    seewhy.train(folder, out=tmp_path / "whole", **options)
    work = tmp_path / ".run.partial"
    command = ["train", str(folder), *words, "--out", str(tmp_path / "run")]
    first = subprocess.Popen([*SEEWHY, *command], text=True, stderr=subprocess.PIPE)
    wait_for(lambda: epochs_told(work) >= 1, first)
    first.kill()
    first.communicate()
    assert not (tmp_path / "run").exists()
    with pytest.raises(RunError, match="an unfinished run; repeat its train command with --resume"):
        seewhy.load(work)
    told = epochs_told(work)
    second = subprocess.Popen([*SEEWHY, *command, "--resume"], text=True, stderr=subprocess.PIPE)
    wait_for(lambda: epochs_told(work) > told, second)
    second.send_signal(signal.SIGINT)
    _, error = second.communicate()
    assert second.returncode == 130
    said = error.splitlines()[-1]
    assert said.startswith("seewhy: interrupted; resume with: seewhy train ")
    again = shlex.split(said.partition("resume with: ")[2])
    assert again[1:] == [*command, "--resume"]
    third = subprocess.run([*SEEWHY, *again[1:], "--json"], capture_output=True, text=True, check=True)
    assert json.loads(third.stdout)["run"] == str(tmp_path / "run")
    assert_same_weights(tmp_path / "whole", tmp_path / "run")
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("seewhy 0.") == 3
    assert "interrupted" in log
    assert "test accuracy" in log


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_signal_ends_at_once(number: signal.Signals, status: int) -> None:
    code = (
        "import time\nfrom seewhy.core.signals import stop_on_signals\nstop_on_signals()\n"
        "try:\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "except KeyboardInterrupt:\n    print('saving', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    for line in ("ready\n", "saving\n"):
        assert process.stdout.readline() == line
        process.send_signal(number)
    assert process.wait(timeout=20) == status


def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    """`seewhy ... | head` ends quietly."""
    process = subprocess.Popen(
        [*SEEWHY, "cache", "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "SEEWHY_CACHE": str(tmp_path)}
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    assert process.wait() == 1


# ---------------------------------------------------------------- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """small_disk(SIZE) -> a file system of that size; again: it has that size from now on."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: str) -> Path:
        how = ["-o", f"remount,size={size}"] if os.path.ismount(place) else ["-t", "tmpfs", "-o", f"size={size}"]
        done = subprocess.run(["mount", *how, "tmpfs", str(place)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"no file system can be mounted here ({done.stderr.strip()})")
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", "-l", str(place)], check=True)


def used_bytes(place: Path) -> int:
    found = os.statvfs(place)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def test_a_full_cache_loses_nothing(
    folder: Path, tmp_path: Path, small_disk: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SEEWHY_CACHE", str(small_disk("1m") / "cache"))
    # 46 views of 25,600 bytes do not fit
    with pytest.raises(OutputError, match=r"cannot write features \(No space left on device\); free some space or set SEEWHY_CACHE"):
        seewhy.train(folder, out=tmp_path / "run", group_by="exact", **SMALL)
    assert not (tmp_path / "run").exists()
    assert list(tmp_path.glob(".run*")) == []
    (rows,) = (tmp_path / "disk" / "cache" / "features").glob("*/rows.bin")
    assert rows.stat().st_size == 0  # what had not been finished is given back
    small_disk("50m")
    run = seewhy.train(folder, out=tmp_path / "run", group_by="exact", **SMALL)
    assert run.metrics["test"]["n"] == 6


def test_a_full_disk_under_the_run_is_one_line_and_resumes(folder: Path, tmp_path: Path, small_disk: Callable[[str], Path]) -> None:
    place = small_disk("300k")
    seewhy.train(folder, out=tmp_path / "whole", **SMALL)
    with pytest.raises(OutputError, match=r"No space left on device.*(--resume|--out)") as caught:
        seewhy.train(folder, out=place / "run", **SMALL)
    assert "\n" not in str(caught.value)
    assert not (place / "run").exists()
    assert [path for path in place.rglob("*") if path.is_file() and "-" in path.name and path.name.startswith(".")] == []
    small_disk("100m")
    seewhy.train(folder, out=place / "run", resume=True, **SMALL)
    assert_same_weights(tmp_path / "whole", place / "run")
    assert list(place.glob(".run*")) == []


def limit_files() -> None:
    """The child may write files of 100,000 bytes at most, as a quota would have it."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_a_quota_is_one_line(folder: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [*SEEWHY, "train", str(folder), *WORDS, "--group-by", "exact", "--out", str(tmp_path / "run")],
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=limit_files,
    )
    assert done.returncode == 2
    assert "File too large" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp_path.glob("run")) == []


def test_images_that_vanish_are_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network drive that goes away after the images were checked."""
    original = open_images

    def gone(*arguments: Any) -> ImageSet:
        images = original(*arguments)
        folder.rename(tmp_path / "elsewhere")
        return images

    monkeypatch.setattr("seewhy.training.pipeline.open_images", gone)
    with pytest.raises(seewhy.ImageError, match=r"\.png: no such file"):
        seewhy.train(folder, out=tmp_path / "run", group_by="exact", **SMALL)
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- two at once


def test_two_at_once_share_a_cache_and_get_names_of_their_own(folder: Path, tmp_path: Path, cache: Path) -> None:
    command = [*SEEWHY, "train", str(folder), *WORDS, "--group-by", "exact"]
    both = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], errors
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == ["images-test_resnet.r160_in1k-unfreeze1-seed0", "images-test_resnet.r160_in1k-unfreeze1-seed0-2"]
    assert_same_weights(*(tmp_path / "runs" / name for name in names))
    (store,) = (cache / "features").iterdir()
    keys = np.fromfile(store / "keys.bin", dtype=np.uint8).reshape(-1, 32)
    assert len(np.unique(keys, axis=0)) == len(keys) == 22 * 2 + 4 * 1 + 6 * 1 + (4 + 6) * 1


def test_a_power_cut_leaves_no_key_without_its_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is not synced may be lost: when keys are written, their rows have been synced before."""
    synced: list[int] = []
    fsync = os.fsync
    rows = tmp_path / "rows.bin"

    def spy(place: int) -> None:
        fsync(place)
        synced.append(rows.stat().st_size)

    monkeypatch.setattr(os, "fsync", spy)
    monkeypatch.setattr("seewhy.models.feature_store.SYNC_S", -1.0)
    store = FeatureStore(tmp_path, (3,))
    seen = []

    def batches() -> Iterator[tuple[list[bytes], np.ndarray]]:
        for n in range(4):
            seen.append(((tmp_path / "keys.bin").stat().st_size // 32, synced[-1] // 12 if synced else 0))
            yield [bytes([n]) * 32], np.full((1, 3), n, dtype=np.float32)

    store.append(batches())
    assert seen == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert store.find(as_keys([bytes([n]) * 32 for n in range(4)])).tolist() == [0, 1, 2, 3]
