"""Test the Ray backend: resources of workers, failures that end a command."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from seewhy.api import Run
from seewhy.cli.guard import run_guarded
from seewhy.cli.main import call
from seewhy.errors import RunError
from seewhy.inference import ray_backend
from seewhy.inference.batch_runner import Task
from seewhy.inference.ray_backend import plan_workers, run_on_ray
from seewhy.inference.result_store import Chunk, ChunkResult
from seewhy.inference.work_units import find_sources
from tests.cheap_saved import jpegs, saved_cheap_run, write_tar

OPTIONS: dict[str, Any] = {"top_k": 1, "min_confidence": None}


def test_a_chunk_travels_as_a_row() -> None:
    """Every kind of value that a task writes: text, numbers, bytes, and skipped images with their reasons."""
    chunk = Chunk(
        {"path": ["a.jpg", "é.png"], "prob": [0.1, 1 / 3], "ood": [True, False], "heatmap": [b"\x00", b""]}, [("b.jpg", "truncated")]
    )
    sent = ChunkResult(3, 1, True, chunk)
    row = {name: values[0] for name, values in ray_backend._pack(sent).items()}
    assert row["error"] == ""
    assert ray_backend._unpack(row) == sent
    assert ray_backend._pack_error(RunError("x"))["error"] == ["RunError"]


# ---------------------------------------------------------------- who gets what


def test_shares_of_one_machine() -> None:
    assert plan_workers([{"CPU": 2.0}], 0, 100) == (2, 1, 0)
    assert plan_workers([{"CPU": 16.0}], 4, 100) == (4, 4, 0)
    assert plan_workers([{"CPU": 16.0, "GPU": 2.0}], 0, 100) == (2, 8, 1)
    assert plan_workers([{"CPU": 16.0}], 0, 3) == (3, 5, 0)
    assert plan_workers([{"CPU": 16.0, "GPU": 2.0}], 4, 100) == (4, 4, 0)  # more than GPUs: all on cores


def test_no_worker_asks_for_more_than_a_machine_has() -> None:
    four = [{"CPU": 8.0}] * 4
    assert plan_workers(four, 0, 1) == (1, 8, 0)  # 32 cores on no machine
    assert plan_workers(four, 2, 100) == (2, 8, 0)
    assert plan_workers(four, 4, 100) == (4, 8, 0)
    assert plan_workers(four, 5, 100) == (5, 4, 0)  # 8, 7, 6 or 5 cores fit four times
    assert plan_workers(four, 9, 100) == (9, 2, 0)  # 4 cores fit eight times, 3 as often
    assert plan_workers(four, 0, 100) == (32, 1, 0)
    assert plan_workers([{"CPU": 64.0}, {"CPU": 4.0}, {"CPU": 4.0}], 3, 100) == (3, 21, 0)  # all on the large one, 64 // 21 = 3
    assert plan_workers([{"CPU": 6.0}, {"CPU": 4.0}], 3, 100) == (3, 3, 0)  # 2 + 1; four cores fit once each


def test_workers_with_a_gpu_ask_for_cores_beside_it() -> None:
    head, gpu = {"CPU": 32.0, "memory": 1e9}, {"CPU": 8.0, "GPU": 1.0}
    assert plan_workers([head, gpu, gpu], 0, 100) == (2, 8, 1)  # 48 // 2 cores lie beside no GPU
    assert plan_workers([head, gpu, gpu], 1, 100) == (1, 8, 1)
    assert plan_workers([head, gpu, gpu], 3, 100) == (3, 10, 0)  # without GPUs: 32 // 10 = 3 on the head
    assert plan_workers([{"CPU": 2.0, "GPU": 8.0}], 0, 100) == (2, 1, 1)  # more GPUs than cores
    assert plan_workers([{"CPU": 32.0}, {"GPU": 4.0}], 0, 5) == (5, 6, 0)  # no core beside the GPUs


def test_no_more_workers_than_fit() -> None:
    assert plan_workers([{"CPU": 2.0}, {"CPU": 2.0}], 9, 100) == (4, 1, 0)
    assert plan_workers([{"node:1": 1.0}], 3, 100) == (3, 1, 0)  # a cluster that grows when it is asked
    assert plan_workers([], 0, 0) == (1, 1, 0)


# ---------------------------------------------------------------- on a cluster


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return saved_cheap_run(tmp_path_factory.mktemp("saved") / "run", size=32)


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    return [write_tar(tmp_path / f"{name}.tar", jpegs(10)) for name in ("good", "deadly", "other")]


def simulated(cores: list[int]) -> Iterator[str]:
    """A cluster of a machine for each number of cores, and its address."""
    pytest.importorskip("ray", reason="needs the package ray: pip install -e '.[ray]'")
    from ray.cluster_utils import Cluster as Machines

    machines = Machines(initialize_head=True, head_node_args={"num_cpus": cores[0], "include_dashboard": False})
    for more in cores[1:]:
        machines.add_node(num_cpus=more)
    yield machines.address
    importlib.import_module("ray").shutdown()  # a thread of Ray Data's may have connected again, when it was told of the end too late
    machines.shutdown()


@pytest.fixture(scope="module")
def two_machines() -> Iterator[str]:
    """Two machines with a core each."""
    yield from simulated([1, 1])


def test_one_worker_on_two_machines_is_placed(two_machines: str, run: Run, shards: list[Path], tmp_path: Path) -> None:
    """Regression: it requested both cores, which no machine has, and waited for ever."""
    results = list(run_on_ray(Task("predict", str(run.path), OPTIONS), find_sources(shards[:1]), two_machines))
    assert [len(result.chunk.columns["path"]) for result in results] == [10]


def test_where_no_worker_fits_one_line_says_so(two_machines: str, run: Run, shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_backend, "WAIT_S", 2)
    monkeypatch.setattr(ray_backend, "POLL_S", 1)
    monkeypatch.setattr(ray_backend, "plan_workers", lambda *args: (1, 2, 0))
    with pytest.raises(RunError, match="no machine of the Ray cluster had 2 free cores within 2 s; wait, or set more --ray-workers"):
        list(run_on_ray(Task("predict", str(run.path), OPTIONS), find_sources(shards), two_machines))


def test_what_a_worker_did_not_expect_is_told_with_its_place(
    two_machines: str, run: Run, shards: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clumsy(ray_backend.InferenceActor):
        def _load_runner(self) -> Any:
            raise MemoryError("no room")

    monkeypatch.setattr(ray_backend, "InferenceActor", Clumsy)
    with pytest.raises(RunError, match=r"good\.tar: a worker failed \(MemoryError: no room\); re-run the same command to resume"):
        list(run_on_ray(Task("predict", str(run.path), OPTIONS), find_sources(shards), two_machines, 1))


def test_workers_that_die_as_they_start_end_it(two_machines: str, run: Run, shards: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    class Stillborn(ray_backend.InferenceActor):
        def __init__(self, *args: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(ray_backend, "InferenceActor", Stillborn)
    monkeypatch.setattr(ray_backend, "MAX_RESTARTS", 1)
    with pytest.raises(RunError, match=r"the Ray cluster failed \(.*; re-run the same command to resume"):
        list(run_on_ray(Task("predict", str(run.path), OPTIONS), find_sources(shards), two_machines, 1))


def test_a_shard_that_kills_its_workers_ends_in_one_line(
    two_machines: str, run: Run, shards: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray Data starts actors again for ever, and gives them the same work."""

    class Mortal(ray_backend.InferenceActor):  # travels in its bytes, since it is made in here
        def _load_runner(self) -> Any:
            work = super()._load_runner()

            def deadly(images: Iterable[tuple[str, bytes | str]]) -> Iterator[Chunk]:
                given = list(images)
                if "deadly.tar" in given[0][0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                yield from work(given)

            return deadly

    out = str(tmp_path / "answers.parquet")
    command = [
        "predict",
        str(run.path),
        *map(str, shards),
        "--out",
        out,
        "--backend",
        "ray",
        "--ray-address",
        two_machines,
        "--ray-workers",
        "1",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(ray_backend, "InferenceActor", Mortal)
        assert run_guarded(lambda: call(command)) == 2
    output = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seewhy: ")]
    assert len(output) == 1
    assert f"{shards[1]}: 3 workers died of it" in output[0]
    finished = f"part-{find_sources(shards)[0].key}-00000-last.parquet"
    assert (tmp_path / ".answers.parquet.parts" / finished).is_file()
    assert run_guarded(lambda: call(command)) == 0  # what was finished stays, and nothing of it is counted against the shard
    assert pq.read_table(out).column("path").to_pylist() == [f"{shard}/{'ab'[n % 2]}/{n:05d}.jpg" for shard in shards for n in range(10)]
