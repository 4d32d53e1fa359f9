"""Spilled arrays: the same values in files that nobody sees, in memory while that is little, and never in another's place."""

from __future__ import annotations

import gc
import json
import mmap
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import seewhy
from seewhy import spill
from seewhy.spill import spilled, spilled_zeros

pytestmark = pytest.mark.skipif(not spill.ABLE, reason="arrays stay in memory where files cannot be given room first")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Files of this test's own."""
    monkeypatch.setattr(spill, "_FILES", spill._Files())
    return monkeypatch


@pytest.fixture
def at_once(fresh: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nothing stays in memory."""
    fresh.setattr(spill, "IN_MEMORY", 0)
    fresh.setattr(spill, "LEAST", 0)
    fresh.setattr(spill, "SEGMENT", 1 << 16)
    return fresh


def file_of(array: Any) -> mmap.mmap | None:
    """The file that an array lies in, None where it is in memory."""
    while isinstance(array, np.ndarray):
        array = array.base
    found = array.obj if isinstance(array, memoryview) else array
    return found if isinstance(found, mmap.mmap) else None


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(arrays.arrays(arrays.scalar_dtypes() | st.just(np.dtype("S32")), arrays.array_shapes(max_side=40)), max_size=6))
def test_many_arrays_share_a_file_and_keep_their_values(at_once: pytest.MonkeyPatch, made: list[Any]) -> None:
    found = [spilled(array) for array in made]
    for before, after in zip(made, found, strict=True):
        assert file_of(after) is not None
        assert after.ctypes.data % spill.LINE == 0
        assert after.flags.writeable
        assert (after.dtype, after.shape) == (before.dtype, before.shape)
        assert after.tobytes() == before.tobytes()  # nan too
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(after)), before)
    for i in range(0, len(found), 2):  # what is written into one array stays out of its neighbours
        found[i].view(np.uint8)[...] = 255
    assert [array.tobytes() for array in found[1::2]] == [array.tobytes() for array in made[1::2]]


def test_the_first_megabytes_stay_in_memory_and_make_room_when_they_end(fresh: pytest.MonkeyPatch) -> None:
    fresh.setattr(spill, "IN_MEMORY", 20_000)
    first = np.arange(10_000, dtype=np.uint8)
    assert spilled(first) is first
    second = spilled_zeros((10_000,), np.uint8)
    assert file_of(second) is None
    third, small = spilled_zeros((5_000,), np.uint8), spilled_zeros((4_000,), np.uint8)
    assert file_of(third) is not None
    assert file_of(small) is None, "less than a page is not worth a place"
    assert spill._FILES.held == 20_000
    del second
    gc.collect()
    assert spill._FILES.held == 10_000
    assert file_of(spilled_zeros((5_000,), np.uint8)) is None


def test_files_are_of_bounded_size_and_large_arrays_have_their_own(at_once: pytest.MonkeyPatch) -> None:
    small = [spilled_zeros((20_000,), np.uint8) for _ in range(4)]
    large = spilled_zeros((100_000,), np.uint8)
    files = [file_of(array) for array in small]
    assert files[0] is files[1] is files[2] is not files[3]  # 3 x 20,000 of 65,536
    assert len(file_of(large) or b"") == 100_000
    assert file_of(spilled_zeros((100,), np.uint8)) is files[3]


def test_nothing_is_seen_on_the_disk_and_nothing_is_left_open(at_once: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at_once.setenv("TMPDIR", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    made = [spilled_zeros((50_000,), np.uint8) for _ in range(5)]
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before + 5
    at_once.setattr(spill, "_FILES", spill._Files())
    del made
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == before


def full(*_: int) -> None:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("why", ["full", "no folder"])
def test_without_room_on_the_disk_it_is_memory(at_once: pytest.MonkeyPatch, why: str) -> None:
    if why == "full":
        at_once.setattr(os, "posix_fallocate", full)
    else:
        at_once.setenv("TMPDIR", "/dev/null/nowhere")
    values = np.arange(9_000)
    assert spilled(values) is values
    assert spilled_zeros((3, 2), np.int64).tolist() == [[0, 0]] * 3


def test_what_is_on_the_disk_is_not_copied_again(at_once: pytest.MonkeyPatch) -> None:
    array = spilled(np.arange(2000))
    assert spilled(array) is array
    half = array[:1000].reshape(10, 100)
    assert spilled(half) is half


FORKED = """
import os
import threading
import numpy as np
from seewhy import spill
spill.IN_MEMORY = 0
mine = spill.spilled(np.full(5000, 1, np.uint8))
in_memory = np.zeros(10)
spill._FILES.hold(in_memory)
held, forked = threading.Event(), threading.Event()
def hold():
    with spill._FILES.lock:
        held.set()
        forked.wait()
threading.Thread(target=hold).start()
held.wait()
child = os.fork()
if not child:
    del in_memory  # which takes the lock that a thread of the parent held
    other = spill.spilled(np.full(5000, 2, np.uint8))  # where the parent's next one goes, were it the same file
    os._exit(0 if (mine == 1).all() and (other == 2).all() else 1)
forked.set()
status = os.waitpid(child, 0)[1]
print(status, spill.spilled_zeros((5000,), np.uint8).sum(), mine.sum())
"""


def test_a_forked_process_writes_into_files_of_its_own() -> None:
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["0", "0", "5000"]


def test_a_run_is_the_same_from_memory_and_from_the_disk(
    fresh: pytest.MonkeyPatch, make_folder: Callable[..., Path], tmp_path: Path, without_report: None
) -> None:
    folder = make_folder({"ant": 40, "bee": 30, "cat": 25})
    options: dict[str, Any] = {"backbone": "efficientnet_lite0", "unfreeze": 0, "views": 2, "epochs": 2, "size": 32, "tracker": "none"}
    plain = seewhy.train(folder, out=tmp_path / "memory", **options)
    asked = []
    place = spill._Files.place

    def noted(files: Any, size: int) -> Any:
        found = place(files, size)
        asked.append(found is not None or not size)
        return found

    fresh.setattr(spill._Files, "place", noted)
    fresh.setattr(spill, "IN_MEMORY", 0)
    fresh.setattr(spill, "LEAST", 1)
    mapped = seewhy.train(folder, out=tmp_path / "disk", **options)
    assert len(asked) > 20
    assert all(asked)
    for name in ("model.safetensors", "split.json", "predictions_val.csv", "predictions_test.csv"):
        assert (plain.path / name).read_bytes() == (mapped.path / name).read_bytes(), name
    assert json.dumps(plain.metrics) == json.dumps(mapped.metrics)
