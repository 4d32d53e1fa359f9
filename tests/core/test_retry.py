"""Reads that fail: what is the file's own is told at once, all else is tried again and then ends the work in one line."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest

from seewhy.api import Run
from seewhy.cli.guard import run_guarded
from seewhy.cli.main import call
from seewhy.core import retry
from seewhy.core.retry import DENIED, RetryingFile, permanent_failure, with_retries
from seewhy.data import remote
from seewhy.data.shards import stream
from seewhy.errors import DataError, StorageUnavailableError
from seewhy.inference import work_units
from seewhy.inference.batch_runner import Task, column_types, run_batch, run_local
from seewhy.inference.result_store import ChunkResult
from seewhy.inference.work_units import Source, find_sources, read_source
from tests.cheap_saved import jpegs, saved_cheap_run, write_parquet, write_tar

OPTIONS: dict[str, Any] = {"top_k": 3, "min_confidence": None}
PASSING = {
    "reset": ConnectionResetError("Connection reset by peer"),
    "time-out": TimeoutError("timed out"),
    "disk": OSError(errno.EIO, "Input/output error"),
    "network drive": OSError(errno.ESTALE, "Stale file handle"),
    "credentials": OSError("When reading 'x': AWS Error UNKNOWN (HTTP status 400) during GetObject operation: ExpiredToken"),
    "of a client of its own": Exception("payload is not completed"),
}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BACKOFF_S", (0.0, 0.0))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return saved_cheap_run(tmp_path_factory.mktemp("saved") / "run", size=32)


class Watched:
    """A file that counts its reads. before: what happens before each, given the place that is read and its number, from 1."""

    def __init__(self, file: Any, before: Callable[[int, int], None]) -> None:
        self.file, self.before, self.reads = file, before, 0

    def seek(self, place: int) -> None:
        self.file.seek(place)

    def read(self, size: int) -> Any:
        self.reads += 1
        self.before(self.file.tell(), self.reads)
        return self.file.read(size)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *given: Any) -> None:
        self.close()


def watch(monkeypatch: pytest.MonkeyPatch, part: str, before: Callable[[int, int], None]) -> list[Watched]:
    """All files of this part of their name that are opened from now on."""
    real, opened = remote._open_unbuffered, list[Watched]()

    def raw(place: str) -> tuple[Any, int]:
        file, size = real(place)
        if part not in place:
            return file, size
        opened.append(Watched(file, before))
        return opened[-1], size

    monkeypatch.setattr(remote, "_open_unbuffered", raw)
    return opened


def failing(error: Exception, first: int = 0, times: int = 1_000_000) -> Callable[[int, int], None]:
    """Reads from the byte `first` on fail, so many times."""
    left = [times]

    def before(place: int, number: int) -> None:
        if place >= first and left[0]:
            left[0] -= 1
            raise error

    return before


# ---------------------------------------------------------------- one read


def test_what_is_the_file_s_own() -> None:
    assert permanent_failure(FileNotFoundError(errno.ENOENT, "x")) == permanent_failure(FileNotFoundError("x")) == "no such file"
    assert (
        permanent_failure(PermissionError("x"))
        == permanent_failure(OSError("AWS Error ACCESS_DENIED during HeadObject operation"))
        == DENIED
    )
    assert permanent_failure(IsADirectoryError("x")) == "Is a directory"
    assert permanent_failure(OSError(errno.EFBIG, "300 MB, more than 200")) == "300 MB, more than 200"
    assert [permanent_failure(error) for error in PASSING.values()] == [""] * len(PASSING)


@pytest.mark.parametrize("kind", PASSING)
def test_what_passes_is_tried_again_and_what_lasts_is_one_line(kind: str) -> None:
    def work() -> str:
        tries.append(1)
        if len(tries) <= failures:
            raise PASSING[kind]
        return "content"

    for failures in (0, 1, 2):
        tries: list[int] = []
        assert with_retries(work, "x.tar") == "content"
        assert len(tries) == failures + 1
    tries, failures = [], 99
    with pytest.raises(StorageUnavailableError, match=r"^x\.tar: cannot be read now \(.*re-run the same command to resume$") as told:
        with_retries(work, "x.tar")
    assert len(tries) == 3
    assert "\n" not in str(told.value)


def test_what_is_the_file_s_own_is_raised_at_once() -> None:
    def work() -> None:
        tries.append(1)
        raise error

    for error in (FileNotFoundError("x"), PermissionError(errno.EACCES, "x"), DataError("damaged")):
        tries: list[int] = []
        with pytest.raises(type(error)):
            with_retries(work, "x")
        assert len(tries) == 1


def test_a_patient_file_is_the_file() -> None:
    content = os.urandom(1000)
    file = RetryingFile(Watched(io.BytesIO(content), failing(ConnectionResetError(), times=2)), 1000, "x")
    assert file.read(10) == content[:10]
    assert file.seek(-5, os.SEEK_END) == 995
    assert (file.read(100), file.read(1), file.tell()) == (content[995:], b"", 1000)
    assert (file.seek(2000), file.read(1)) == (2000, b"")
    with pytest.raises(ValueError, match="negative seek"):
        file.seek(-1)
    file.seek(0)
    assert file.read() == content
    with pytest.raises(StorageUnavailableError, match="shorter than its size"):
        RetryingFile(io.BytesIO(b"short"), 1000, "x").read(10)


# ---------------------------------------------------------------- sources


def shard_of_kind(kind: str, folder: Path) -> Path:
    contents = [data + np.random.default_rng(n).bytes(40_000) for n, data in enumerate(jpegs(60))]
    if kind == "tar":
        return write_tar(folder / "x.tar", contents)
    return write_parquet(folder / "x.parquet", contents)


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("cause", PASSING)
def test_a_shard_whose_reading_fails_is_neither_damaged_nor_finished(
    cause: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = shard_of_kind(kind, tmp_path)
    monkeypatch.setattr(work_units, "TAR_READ_AHEAD", 100_000)
    (source,) = find_sources([shard])
    wanted = list(read_source(source))
    assert len(wanted) == 60
    with monkeypatch.context() as patch:
        watch(patch, "x.", failing(PASSING[cause], 200_000, times=2))
        assert list(read_source(source)) == wanted
    with monkeypatch.context() as patch:
        watch(patch, "x.", failing(PASSING[cause], 200_000 if kind == "tar" else 0))
        with pytest.raises(StorageUnavailableError, match=r"cannot be read now"):
            list(read_source(source))


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_streams_of_others_raise_what_their_disk_says(kind: str, tmp_path: Path) -> None:
    class Failing(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            raise OSError(errno.EIO, "Input/output error")

    with Failing(shard_of_kind(kind, tmp_path).read_bytes()) as file, pytest.raises(OSError, match="Input/output error"):
        list(stream(file, kind))


def test_a_job_ends_and_goes_on_where_reading_failed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was finished stays; nothing is marked as bad; the same command gives the whole table."""
    contents = jpegs(30)
    folder = tmp_path / "in"
    for name in ("a", "b", "c"):
        write_parquet(folder / f"{name}.parquet", contents)
    out = tmp_path / "answers.parquet"
    command = ["predict", str(run.path), str(folder), "--backend", "local", "--out", str(out)]
    with monkeypatch.context() as patch:
        watch(patch, "b.parquet", failing(ConnectionResetError("Connection reset by peer")))
        assert run_guarded(lambda: call(command)) == 2
    told = capsys.readouterr().err
    assert f"seewhy: {folder}/b.parquet: cannot be read now (Connection reset by peer)" in told
    assert "Traceback" not in told
    assert "kept the results of 1 of 3 shards and blocks of files" in told
    assert not out.exists()
    assert run_guarded(lambda: call(command)) == 0
    assert "resuming after 1 of 3" in capsys.readouterr().err
    assert len(pq.read_table(out)) == 90
    assert not (tmp_path / "answers.errors.parquet").exists()


def test_plain_files_whose_disk_fails_are_not_bad_images(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for n, data in enumerate(jpegs(5)):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / f"{n}.jpg").write_bytes(data)
    (source,) = find_sources([tmp_path / "in"])
    real = work_units.read_bytes

    def read(path: Path) -> bytes:
        if path.name == "3.jpg":
            raise OSError(numbers[-1], os.strerror(numbers[-1]))
        return real(path)

    numbers: list[int] = []
    monkeypatch.setattr(work_units, "read_bytes", read)
    for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
        numbers.append(number)
        with pytest.raises(StorageUnavailableError, match=r"3\.jpg: cannot be read now"):
            list(read_source(source))
    numbers.append(errno.EACCES)
    assert [data for _, data in read_source(source)][3] == "Permission denied"


ACCESS_DENIED = {
    "PermissionError": PermissionError("Access Denied"),
    "S3": OSError("AWS Error ACCESS_DENIED during HeadObject operation: No body"),
}


@pytest.mark.parametrize("kind", ACCESS_DENIED)
def test_one_denied_object_is_bad_and_credentials_that_end_are_not(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = jpegs(6)
    fsspec.filesystem("memory").pipe({f"/denied/{n}.jpg": data for n, data in enumerate(contents)})
    (source,) = find_sources(["memory://denied"])
    real, asked = remote._open_unbuffered, list[str]()
    rules: list[Callable[[str], bool]] = []

    def raw(place: str) -> tuple[Any, int]:
        asked.append(place)
        if rules[-1](place):
            raise ACCESS_DENIED[kind]
        return real(place)

    monkeypatch.setattr(remote, "_open_unbuffered", raw)
    rules.append(lambda place: place.endswith("/2.jpg"))
    assert [data for _, data in read_source(source)] == [*contents[:2], DENIED, *contents[3:]]
    asked.clear()
    rules.append(lambda place: len(asked) > 3)
    images = read_source(source)
    assert [next(images)[1] for _ in range(3)] == contents[:3]
    with pytest.raises(
        StorageUnavailableError, match=r"memory://denied/3\.jpg: Permission denied, as for the files beside it; renew your credentials"
    ):
        next(images)
    rules.append(lambda place: True)
    with pytest.raises(StorageUnavailableError, match="renew your credentials"):
        list(read_source(source))


def test_expired_credentials_leave_plain_objects_for_the_next_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work_units, "FILES_PER_SOURCE", 4)
    fsspec.filesystem("memory").pipe({f"/expired/{n}.jpg": data for n, data in enumerate(jpegs(12))})
    found, out = find_sources(["memory://expired"]), str(tmp_path / "answers.parquet")
    assert len(found) == 3
    task, columns = Task("predict", str(run.path), OPTIONS), column_types("predict", OPTIONS, len(run.classes))
    with monkeypatch.context() as patch:
        watch(patch, "/6.jpg", failing(PASSING["credentials"]))
        with pytest.raises(StorageUnavailableError, match="ExpiredToken"):
            run_batch(task, columns, found, out, run_local)
    asked: list[Source] = []

    def watched(task: Task, left: Sequence[Source]) -> Iterator[ChunkResult]:
        asked.extend(left)
        return run_local(task, left)

    assert run_batch(task, columns, found, out, watched) == (12, 0)
    assert asked == found[2:]


# ---------------------------------------------------------------- how often a cloud is asked


def test_a_tar_is_read_in_large_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Header, image, header, class of 100 samples were 801 requests."""
    shard = tmp_path / "x.tar"
    with tarfile.open(shard, "w") as archive:
        for n, data in enumerate(jpegs(100)):
            for suffix, content in (("jpg", data), ("cls", b"3")):
                info = tarfile.TarInfo(f"{n:03d}.{suffix}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    (source,) = find_sources([shard])
    opened = watch(monkeypatch, "x.tar", lambda place, number: None)
    assert len(list(read_source(source))) == 100
    assert [file.reads for file in opened] == [1]
    opened.clear()
    monkeypatch.setattr(work_units, "TAR_READ_AHEAD", 50_000)
    assert len(list(read_source(source))) == 100
    (file,) = opened
    assert file.reads <= shard.stat().st_size // 50_000 + 2
