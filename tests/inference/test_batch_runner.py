"""Test batch inference locally and on Ray: equal results, none lost or doubled when a worker dies, resumed by shard."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
from PIL import Image
from threadpoolctl import threadpool_info

from seewhy.api import Run
from seewhy.cli.guard import run_guarded
from seewhy.cli.main import call
from seewhy.core.parallel import Worker
from seewhy.data import verify
from seewhy.errors import ConfigError, ImageError, OutputError, RunError
from seewhy.inference import result_store, tasks
from seewhy.inference.batch_runner import Task, TaskRunner, column_types, run_batch, run_local
from seewhy.inference.ray_backend import get_backend
from seewhy.inference.result_store import Chunk, ChunkResult, errors_path
from seewhy.inference.tasks import choose_batch_size, measure_batch_size
from seewhy.inference.work_units import Source, find_sources
from seewhy.models.executors import Executor
from tests.cheap_saved import jpegs, saved_cheap_run, write_parquet, write_tar

SHARDS, EACH = 12, 1000  # images for Ray
OPTIONS: dict[str, Any] = {"top_k": 3, "min_confidence": None}
COLUMNS = column_types("predict", OPTIONS, 6)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return saved_cheap_run(tmp_path_factory.mktemp("saved") / "run", size=32)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12,000 images, three of them spoiled."""
    folder, contents = tmp_path_factory.mktemp("shards") / "images", jpegs(250)
    for shard in range(SHARDS):
        rows = contents * (EACH // len(contents))
        if shard % 4 == 1:
            rows[77] = b"no image"
        write_parquet(folder / f"{shard:02d}.parquet", rows, shard * EACH)
    return folder


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of 60 and 40 images, of which one is spoiled, and 20 plain files."""
    folder, contents = tmp_path_factory.mktemp("few"), jpegs(60)
    write_tar(folder / "shards" / "a.tar", [*contents[:59], b"spoiled"])
    write_parquet(folder / "shards" / "b.parquet", contents[:40])
    (folder / "plain").mkdir()
    for n, data in enumerate(contents[:20]):
        (folder / "plain" / f"{n:02d}.jpg").write_bytes(data)
    return folder


def task_for(run: Run) -> Task:
    return Task("predict", str(run.path), OPTIONS)


@pytest.fixture(scope="module")
def local_answers(run: Run, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("local") / "answers.parquet"
    assert run_batch(task_for(run), COLUMNS, find_sources([shards]), str(out), run_local, True) == (SHARDS * EACH - 3, 3)
    return pq.read_table(out).to_pandas()


# ---------------------------------------------------------------- the batch size


def test_batch_size_is_the_smallest_that_is_as_fast() -> None:
    assert choose_batch_size([(1, 10.0), (2, 18.0), (4, 30.0), (8, 31.0), (16, 29.0)]) == 4
    assert choose_batch_size([(1, 10.0), (2, 9.0), (4, 30.0), (8, 40.0)]) == 8
    assert choose_batch_size([(1, 10.0)]) == 1
    assert choose_batch_size([(1, 100.0), (2, 103.0), (4, 104.0), (8, 109.0)]) == 8  # small gains that add up


def test_batch_size_is_measured_until_memory_is_out() -> None:
    def forward(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        if len(pixels) > 16:
            raise MemoryError
        time.sleep(0.005)  # whatever the batch
        return np.zeros((len(pixels), 2), dtype=np.float32)

    backend, size = measure_batch_size(Executor(forward, 1, None), 8)
    assert size == backend.batch == 16


# ---------------------------------------------------------------- in this process


def test_lanes_share_the_cores_that_numpy_multiplies_on() -> None:
    """Two lanes whose products are made by all cores each wait for each other: that took as long as the network."""

    def threads() -> set[int]:
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    def answer(names: list[str], ready: list[Any]) -> dict[str, list[Any]]:
        seen.append(threads())
        return {"path": names}

    before, seen = threads(), list[set[int]]()
    assert list(TaskRunner(Worker(len, answer, 2, 8), 2)(iter([("a", b"x")]))) == [Chunk({"path": ["a"]})]
    assert seen == [{1}]
    assert threads() == before


def test_answers_are_those_of_predict(run: Run, few: Path, tmp_path: Path) -> None:
    inputs = [few / "plain", few / "shards"]
    out = str(tmp_path / "answers.parquet")
    assert run_batch(task_for(run), COLUMNS, find_sources(inputs), out, run_local, True) == (119, 1)
    found, expected = pq.read_table(out).to_pandas(), run.predict(inputs, skip_bad=True).table(3)
    assert list(found.columns) == list(expected.columns) == list(COLUMNS)
    assert found["path"].tolist() == expected["path"].tolist()
    assert found["class_1"].tolist() == expected["class_1"].tolist()
    np.testing.assert_allclose(found["prob_1"], expected["prob_1"], atol=1e-6)
    (bad,) = pq.read_table(errors_path(out)).to_pylist()
    assert bad == {"path": str(few / "shards" / "a.tar" / "b" / "00059.jpg"), "reason": "not an image"}
    assert sorted(file.name for file in tmp_path.iterdir()) == ["answers.errors.parquet", "answers.parquet"]


def test_exported_file_answers_alike(demo_run: Run, demo_onnx: Path, few: Path, tmp_path: Path) -> None:
    tables = []
    for model_path in (demo_run.path, demo_onnx):
        out = str(tmp_path / f"{model_path.stem}.parquet")
        run_batch(Task("predict", str(model_path), OPTIONS), COLUMNS, find_sources([few / "plain"]), out, run_local)
        tables.append(pq.read_table(out).to_pandas())
    assert tables[0]["class_1"].tolist() == tables[1]["class_1"].tolist()
    np.testing.assert_allclose(tables[0]["prob_1"], tables[1]["prob_1"], atol=1e-4)


def test_goes_on_after_the_shards_that_are_done(run: Run, few: Path, tmp_path: Path) -> None:
    sources, out = find_sources([few / "plain", few / "shards"]), str(tmp_path / "answers.csv")

    def stopped(task: Task, left: Sequence[Source]) -> Iterator[ChunkResult]:
        for number, result in enumerate(run_local(task, left)):
            if number == 2:
                raise KeyboardInterrupt
            yield result

    with pytest.raises(KeyboardInterrupt):
        run_batch(task_for(run), COLUMNS, sources, out, stopped)
    assert not Path(out).exists()
    processed: list[Source] = []

    def watched(task: Task, left: Sequence[Source]) -> Iterator[ChunkResult]:
        processed.extend(left)
        return run_local(task, left)

    assert run_batch(task_for(run), COLUMNS, sources, out, watched, True) == (119, 1)
    assert processed == sources[2:]
    assert len(Path(out).read_text().splitlines()) == 120
    assert not (tmp_path / ".answers.csv.parts").exists()


def test_pieces_that_come_twice_are_kept_once(run: Run, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A source whose worker died half-way repeats its first chunks."""
    monkeypatch.setattr(result_store, "MAX_ROWS", 32)
    monkeypatch.setattr(tasks, "BATCH_SIZES", (8,))  # pieces are whole batches, whose size would be found by the clock
    sources, out = find_sources([few / "shards"]), str(tmp_path / "answers.parquet")

    def again(task: Task, left: Sequence[Source]) -> Iterator[ChunkResult]:
        results = list(run_local(task, left))
        assert len(results) == 4  # 60 and 40 images, 32 at most in a piece
        yield from (results[0], results[2], results[0], results[1], results[2], results[3])

    assert run_batch(task_for(run), COLUMNS, sources, out, again, True) == (99, 1)
    assert len(set(pq.read_table(out).column("path").to_pylist())) == 99


def test_a_folder_of_parts_takes_new_shards_and_no_other_request(run: Run, few: Path, tmp_path: Path) -> None:
    out = f"{tmp_path}/answers/"
    sources = find_sources([few / "shards"])
    assert run_batch(task_for(run), COLUMNS, sources[:1], out, run_local, True) == (59, 1)
    processed: list[Source] = []

    def watched(task: Task, left: Sequence[Source]) -> Iterator[ChunkResult]:
        processed.extend(left)
        return run_local(task, left)

    assert run_batch(task_for(run), COLUMNS, sources, out, watched, True) == (99, 1)
    assert processed == sources[1:]
    assert len(pq.read_table(out)) == 99  # a dataset that any reader of parquet knows
    other = replace(task_for(run), options={"top_k": 1, "min_confidence": None})
    with pytest.raises(OutputError, match="holds answers to another request"):
        run_batch(other, COLUMNS, sources, out, run_local)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").touch()
    with pytest.raises(OutputError, match="holds other files"):
        run_batch(task_for(run), COLUMNS, sources, f"{tmp_path}/mine/", run_local)


def test_from_address_to_address(run: Run, few: Path) -> None:
    system = fsspec.filesystem("memory")
    system.pipe("/scale-in/a.tar", (few / "shards" / "a.tar").read_bytes())
    sources = find_sources(["memory://scale-in/*.tar"])
    assert run_batch(task_for(run), COLUMNS, sources, "memory://scale-out/answers", run_local, True) == (59, 1)
    names = sorted(Path(name).name for name in system.ls("/scale-out/answers", detail=False))
    assert names[:2] == ["_errors.parquet", "_seewhy.json"]
    table = pq.read_table(io.BytesIO(system.cat(f"/scale-out/answers/{names[2]}")))
    assert table.column("path")[0].as_py() == "memory://scale-in/a.tar/a/00000.jpg"


def test_rows_of_a_folder_are_counted_without_reading_them(run: Run, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heatmaps of millions of images would come back from a cloud for a number."""

    def refused(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a part is read")

    monkeypatch.setattr(pq, "read_table", refused)
    options = {"method": "gradcam", "target": None, "contrast": None}
    task, columns = Task("explain", str(run.path), options), column_types("explain", options, 6)
    assert run_batch(task, columns, find_sources([few / "shards"]), f"{tmp_path}/maps/", run_local, True) == (99, 1)


def test_only_bad_images_give_no_table(run: Run, tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", [b"x", b"y"])
    with pytest.raises(ImageError, match=r"2 of 2 images cannot be used: .*listed in .*answers.errors.parquet; none is left to predict"):
        run_batch(task_for(run), COLUMNS, find_sources([shard]), str(tmp_path / "answers.parquet"), run_local, True)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "answers.errors.parquet"]


def test_heatmaps_are_those_of_explain(run: Run, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "maps.parquet"
    command = ["explain", str(run.path), str(few / "plain"), "--backend", "local", "--out", str(out), "--json"]
    assert run_guarded(lambda: call(command)) == 0
    assert json.loads(capsys.readouterr().out) == {"out": str(out), "images": 20, "skipped": 0, "errors": None}
    rows, expected = pq.read_table(out).to_pylist(), run.explain([few / "plain"])
    for n, row in enumerate(rows):
        found = np.asarray(Image.open(io.BytesIO(row["heatmap"]))) / 255
        np.testing.assert_allclose(found, expected.maps[n], atol=0.003)
        assert row["class"] == expected.classes[expected.targets[n]]


@pytest.mark.parametrize("backend", [[], ["--backend", "local"]])
def test_skip_bad_means_the_same_by_any_engine(
    backend: list[str], run: Run, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "answers.csv"
    command = ["predict", str(run.path), str(few / "shards" / "a.tar"), *backend, "--out", str(out)]
    assert run_guarded(lambda: call(command)) == 2
    output = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"seewhy: 1 of 60 images cannot be used: .*00059\.jpg \(not an image\); .*pass --skip-bad", output)
    assert not out.exists()
    assert run_guarded(lambda: call([*command, "--skip-bad", "--json"])) == 0
    assert json.loads(capsys.readouterr().out) == {
        "out": str(out),
        "images": 59,
        "skipped": 1,
        "errors": str(tmp_path / "answers.errors.csv"),
    }


def test_a_table_of_heatmaps_refuses_bad_images_too(run: Run, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["explain", str(run.path), str(few / "shards" / "a.tar"), "--backend", "local", "--out", str(tmp_path / "maps.parquet")]
    assert run_guarded(lambda: call(command)) == 2
    assert "1 of 60 images cannot be used" in capsys.readouterr().err
    assert run_guarded(lambda: call([*command, "--skip-bad"])) == 0


def test_a_slash_behind_the_folder_changes_nothing(run: Run, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As completed by the shell: overlays unless a table is requested; a table in an existing folder."""
    image, maps, answers = str(few / "plain" / "00.jpg"), tmp_path / "maps", tmp_path / "answers"
    for out in (str(maps), f"{maps}/"):
        assert run_guarded(lambda out=out: call(["explain", str(run.path), image, "--out", out])) == 0
        assert [file.suffix for file in maps.iterdir()] == [".png"]
    answers.mkdir()
    for out in (f"{answers}/", str(answers)):
        assert run_guarded(lambda out=out: call(["predict", str(run.path), image, "--out", out])) == 0
        assert len(pq.read_table(answers)) == 1
    assert run_guarded(lambda: call(["explain", str(run.path), image, "--out", str(tmp_path / "maps.parquet")])) == 2
    assert "overlays and scores need a folder; add --backend local" in capsys.readouterr().err


def test_few_images_are_not_worth_measuring(run: Run, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "measure_batch_size", lambda *args: pytest.fail("measured"))
    out = str(tmp_path / "answers.csv")
    assert run_batch(task_for(run), COLUMNS, find_sources([few / "plain"]), out, run_local) == (20, 0)


# ---------------------------------------------------------------- features


def test_features_leave_nothing_for_train_to_compute(
    make_folder: Any, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from seewhy.config import make_config
    from seewhy.curation.grouping import group_images
    from seewhy.curation.split import split_images
    from seewhy.data import verify
    from seewhy.data.image_set import open_images
    from seewhy.models import features
    from seewhy.training.loaders import TrainingContext, training_data

    data = make_folder({"cat": 12, "dog": 12})
    options = ["--backbone", "efficientnet_lite0", "--unfreeze", "0", "--set", "size=64", "--json"]
    assert run_guarded(lambda: call(["precompute", str(data), *options])) == 0
    first = json.loads(capsys.readouterr().out)
    assert first == {"images": 24, "skipped": 0, "computed": 24 * 2 + 24}  # two views, and the embedder's own size
    assert run_guarded(lambda: call(["precompute", str(data), *options])) == 0
    assert json.loads(capsys.readouterr().out)["computed"] == 0

    def refused(*args: Any) -> Any:
        raise AssertionError("computed again")

    monkeypatch.setattr(features, "_compute", refused)
    monkeypatch.setattr(verify, "check_file", refused)
    found = open_images(str(data))
    assert group_images(found) is not None
    config = make_config(data=str(data), backbone="efficientnet_lite0", unfreeze=0, size=64).resolved()
    training_data(TrainingContext.create(found, split_images(found, "ratio", 0), config))  # all that `train` extracts
    assert run_guarded(lambda: call(["audit", str(data), "--backend", "local", "--out", str(tmp_path / "audit"), "--json"])) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 24
    assert run_guarded(lambda: call(["precompute", str(data), "--unfreeze", "all"])) == 2
    assert "nothing to precompute" in capsys.readouterr().err


@pytest.mark.parametrize(
    "command", [["audit"], ["audit", "--backend", "local"], ["audit", "--backend", "ray"], ["train"], ["train", "--dry-run"]]
)
def test_what_needs_images_here_refuses_an_address_first(
    command: list[str], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from seewhy.inference import precompute

    monkeypatch.setattr(precompute, "_precompute", lambda *args: pytest.fail("computed features"))
    fsspec.filesystem("memory").pipe("/audited/a.tar", write_tar(tmp_path / "a.tar", jpegs(4)).read_bytes())
    monkeypatch.chdir(tmp_path)
    assert run_guarded(lambda: call([*command, "memory://audited/?secret=1"])) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("seewhy: ")]
    assert line.startswith("seewhy: memory://audited/: only predict, explain and precompute read addresses; copy or mount the images")


def test_features_of_an_address_serve_a_copy(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seewhy.config import make_config
    from seewhy.curation.split import split_images
    from seewhy.data.image_set import open_images
    from seewhy.models import features
    from seewhy.training.loaders import TrainingContext, training_data

    copy = write_tar(tmp_path / "a.tar", jpegs(20))
    fsspec.filesystem("memory").pipe("/far/a.tar", copy.read_bytes())
    recipe = ["--backbone", "efficientnet_lite0", "--unfreeze", "0", "--set", "size=64", "--set", "runtime=onnx"]
    assert run_guarded(lambda: call(["precompute", "memory://far/a.tar", *recipe])) == 0
    monkeypatch.setattr(features, "_compute", lambda *args: pytest.fail("computed again"))
    config = make_config(data=str(copy), backbone="efficientnet_lite0", unfreeze=0, size=64, runtime="onnx").resolved()
    found = open_images(str(copy))
    training_data(TrainingContext.create(found, split_images(found, "ratio", 0), config))


# ---------------------------------------------------------------- on Ray


def test_a_wrong_engine_is_one_line() -> None:
    with pytest.raises(ConfigError, match="use local or ray"):
        get_backend("spark")
    with pytest.raises(ConfigError, match="need --backend ray"):
        get_backend("local", "auto")


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers of this machine, for all tests."""
    ray = pytest.importorskip("ray", reason="needs the package ray: pip install -e '.[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=50, object_store_memory=200_000_000)
    yield
    ray.shutdown()


def workers() -> list[psutil.Process]:
    """The processes of this test's cluster that answer."""
    computed = psutil.Process().children(recursive=True)
    return [process for process in computed if process.is_running() and "InferenceActor" in " ".join(process.cmdline())]


def test_a_killed_worker_costs_nothing(cluster: None, run: Run, shards: Path, local_answers: Any, tmp_path: Path) -> None:
    """12,000 images on two workers, one of which is killed when the first shard is done: the local backend's table all the same."""
    killed: list[int] = []
    on_ray = get_backend("ray", workers=2)

    def disturbed(task: Task, left: Sequence[Source]) -> Iterator[ChunkResult]:
        for result in on_ray(task, left):
            if not killed:
                victim = workers()[0]
                killed.append(victim.pid)
                victim.send_signal(signal.SIGKILL)
            yield result

    out = str(tmp_path / "answers.parquet")
    assert run_batch(task_for(run), COLUMNS, find_sources([shards]), out, disturbed, True) == (SHARDS * EACH - 3, 3)
    assert len(killed) == 1
    assert not psutil.pid_exists(killed[0]) or psutil.Process(killed[0]).status() == psutil.STATUS_ZOMBIE
    found = pq.read_table(out).to_pandas()
    assert found["path"].tolist() == local_answers["path"].tolist()
    assert found["path"].is_unique
    assert found["class_1"].tolist() == local_answers["class_1"].tolist()
    np.testing.assert_allclose(found["prob_1"], local_answers["prob_1"], atol=1e-6)
    reasons = pq.read_table(errors_path(out)).to_pylist()
    assert reasons == [{"path": f"{shards}/{shard:02d}.parquet/000077.jpg", "reason": "not an image"} for shard in (1, 5, 9)]


def answered(command: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """What a command says with --json."""
    assert run_guarded(lambda: call([*command, "--json"])) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_heatmaps_on_ray_are_the_local_ones(cluster: None, run: Run, few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for backend in ("local", "ray"):
        out = str(tmp_path / f"{backend}.parquet")
        command = ["explain", str(run.path), str(few / "plain"), str(few / "shards"), "--backend", backend, "--skip-bad", "--out", out]
        output = answered(command, capsys)
        assert (output["images"], output["skipped"]) == (119, 1)
        assert pq.read_table(output["errors"]).to_pylist() == [{"path": f"{few}/shards/a.tar/b/00059.jpg", "reason": "not an image"}]
        tables.append(pq.read_table(out).to_pandas())
    here, there = tables
    for name in ("path", "class", "predicted"):
        assert here[name].tolist() == there[name].tolist()
    np.testing.assert_allclose(here["prob"], there["prob"], atol=1e-6)
    for pair in zip(here["heatmap"], there["heatmap"], strict=True):
        grey = [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in pair]
        assert np.abs(grey[0] - grey[1]).max() <= 1


def test_features_and_audit_on_ray_are_the_local_ones(
    cluster: None, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After `features --backend ray`, `train` computes nothing; `audit --backend ray` writes the tables of `audit`."""
    from seewhy.config import make_config
    from seewhy.curation.split import split_images
    from seewhy.data.image_set import open_images
    from seewhy.models import features
    from seewhy.training.loaders import TrainingContext, training_data

    data = tmp_path / "data"  # a spoiled image, and one that stands in both files
    contents = jpegs(60)
    write_tar(data / "a.tar", [*contents[:29], b"spoiled"])
    write_tar(data / "b.tar", contents[28:])
    plain, on_ray, folders = (
        ["audit", str(data), "--skip-bad", "--seeds", "1"],
        ["--backend", "ray"],
        [tmp_path / "here", tmp_path / "there"],
    )
    monkeypatch.setenv("SEEWHY_CACHE", str(tmp_path / "cache-here"))
    output = [answered([*plain, "--out", str(folders[0])], capsys)]
    monkeypatch.setenv("SEEWHY_CACHE", str(tmp_path / "cache-there"))
    recipe = ["--backbone", "efficientnet_lite0", "--unfreeze", "0", "--group-by", "exact", "--set", "size=64"]
    filled = {"images": 62, "skipped": 1, "computed": 60 * 2}  # two views of each content
    assert answered(["precompute", str(data), *on_ray, *recipe], capsys) == filled
    assert answered(["precompute", str(data), *on_ray, *recipe], capsys) == {**filled, "computed": 0}

    def refused(*args: Any) -> Any:
        raise AssertionError("computed in this process")

    monkeypatch.setattr(features, "_compute", refused)
    monkeypatch.setattr(verify, "check_file", refused)
    found = open_images(str(data), skip_bad=True)
    config = make_config(data=str(data), backbone="efficientnet_lite0", unfreeze=0, size=64).resolved()
    training_data(TrainingContext.create(found, split_images(found, "ratio", 0), config))  # all that `train` extracts
    output.append(answered([*plain, *on_ray, "--out", str(folders[1])], capsys))
    assert {**output[0], "audit": ""} == {**output[1], "audit": ""}
    assert output[0]["pairs"]["exact"] == 1
    tables = sorted(file.name for file in folders[0].glob("*.csv"))
    assert tables
    for name in tables:
        assert (folders[1] / name).read_text() == (folders[0] / name).read_text(), name


def test_what_workers_refuse_is_told_in_its_own_words(cluster: None, few: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    damaged.mkdir()
    (damaged / "run.json").write_text("{}")
    with pytest.raises(RunError, match=r"run\.json: damaged"):
        list(get_backend("ray", workers=1)(Task("predict", str(damaged), OPTIONS), find_sources([few / "plain"])))


def test_a_stopped_request_goes_on_on_ray(cluster: None, run: Run, few: Path, tmp_path: Path) -> None:
    sources, out = find_sources([few / "plain", few / "shards"]), str(tmp_path / "answers.parquet")
    on_ray = get_backend("ray", workers=1)

    def stopped(task: Task, left: Sequence[Source]) -> Iterator[ChunkResult]:
        yield next(iter(on_ray(task, left)))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_batch(task_for(run), COLUMNS, sources, out, stopped)
    processed: list[Source] = []

    def watched(task: Task, left: Sequence[Source]) -> Iterator[ChunkResult]:
        processed.extend(left)
        return on_ray(task, left)

    assert run_batch(task_for(run), COLUMNS, sources, out, watched, True) == (119, 1)
    assert len(processed) == 2
