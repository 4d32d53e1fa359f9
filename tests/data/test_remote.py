"""Cloud storage by its real protocol: S3, spoken by moto's server on this machine."""

from __future__ import annotations

import io
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from seewhy.api import Run
from seewhy.cli.guard import run_guarded
from seewhy.cli.main import call
from seewhy.data import remote
from seewhy.data.remote import join_path, list_files, list_names, open_file, remove_file, write_atomic
from seewhy.errors import DataError, OutputError
from seewhy.inference.batch_runner import Task, column_types, run_batch, run_local
from seewhy.inference.result_store import ChunkResult
from seewhy.inference.work_units import Source, find_sources
from tests.cheap_saved import jpegs, saved_cheap_run, write_tar

STARTS_S = 60


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What an address of this server ends with; it has a bucket named `bucket`, and wants credentials."""
    from pyarrow import fs

    program = Path(os.environ.get("SEEWHY_S3_SERVER", Path(sys.prefix) / "moto" / "bin" / "moto_server"))
    if not program.is_file():
        pytest.skip("no S3 server here: `make test` installs moto's where it can, and SEEWHY_S3_SERVER names another")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{free.getsockname()[1]}"
    log = tmp_path_factory.mktemp("s3") / "log"
    with log.open("w") as output, pytest.MonkeyPatch.context() as patch:
        server = subprocess.Popen([program, "-H", "127.0.0.1", "-p", host.partition(":")[2]], stdout=output, stderr=output)
        patch.setenv("AWS_ACCESS_KEY_ID", "somebody")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        try:
            end = time.monotonic() + STARTS_S
            while not _answers(host):
                assert server.poll() is None, log.read_text()[-2000:]
                assert time.monotonic() < end, log.read_text()[-2000:]
                time.sleep(0.2)
            fs.S3FileSystem(endpoint_override=host, scheme="http", region="eu-central-1", allow_bucket_creation=True).create_dir("bucket")
            yield f"?endpoint_override={host}&scheme=http&region=eu-central-1"
        finally:
            server.kill()
            server.wait()


def _answers(host: str) -> bool:
    try:
        socket.create_connection(("127.0.0.1", int(host.partition(":")[2])), timeout=2).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return saved_cheap_run(tmp_path_factory.mktemp("saved") / "run", size=32)


def test_files_come_back_under_their_names(options: str) -> None:
    names = sorted(["a b.jpg", "a%20b.jpg", "a+b#c.jpg", "ä&=.jpg"])
    for name in names:
        write_atomic(f"s3://bucket/odd/{name}{options}", name.encode())
    assert [file.path for file in list_files(f"s3://bucket/odd{options}")] == [f"s3://bucket/odd/{name}{options}" for name in names]
    assert list_names(f"s3://bucket/odd/{options}") == names
    for file in list_files(f"s3://bucket/odd{options}"):
        with open_file(file.path) as opened:
            data = opened.read()
        assert (file.path, len(data)) == (join_path(f"s3://bucket/odd{options}", data.decode()), file.size)
        remove_file(file.path)
    assert list_names(f"s3://bucket/odd{options}") == []


def test_what_is_not_there_is_told_in_one_line(options: str) -> None:
    for place in ("s3://nobucket/images", "s3://bucket/nothing", "s3://bucket/nothing/*.tar"):
        with pytest.raises(DataError, match="no such file or folder") as told:
            find_sources([place + options])
        assert "endpoint" not in str(told.value)
    with pytest.raises(OutputError, match=r"^s3://nobucket/x: cannot be reached .*NO_SUCH_BUCKET"):
        write_atomic(f"s3://nobucket/x{options}", b"x")


def test_predict_from_bucket_to_bucket_goes_on_where_it_was_stopped(
    options: str, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = jpegs(60)
    shard = write_tar(tmp_path / "a.tar", [*contents[:39], b"spoiled"])
    (tmp_path / "plain").mkdir()
    for n, data in enumerate(contents[39:]):
        (tmp_path / "plain" / f"{n:02d}.jpg").write_bytes(data)
        write_atomic(f"s3://bucket/in/plain/{n:02d}.jpg{options}", data)
    write_atomic(f"s3://bucket/in/shards/a.tar{options}", shard.read_bytes())
    inputs, out = [f"s3://bucket/in/plain/{options}", f"s3://bucket/in/shards/*.tar{options}"], f"s3://bucket/out/answers{options}"

    def stopped(task: Task, left: Sequence[Source]) -> Iterator[ChunkResult]:
        yield next(iter(run_local(task, left)))
        raise KeyboardInterrupt

    asked: dict[str, Any] = {"top_k": 5, "min_confidence": None}
    task, columns = Task("predict", str(run.path), asked), column_types("predict", asked, len(run.classes))
    with pytest.raises(KeyboardInterrupt):
        run_batch(task, columns, find_sources(inputs), out, stopped)
    (first,) = [file for file in list_files(out) if "part-" in file.path]
    command = ["predict", str(run.path), *inputs, "--backend", "local", "--skip-bad", "--out", out, "--json"]
    assert run_guarded(lambda: call(command)) == 0
    told = capsys.readouterr()
    assert "resuming after 1 of 2 shards and blocks of files" in told.err
    assert json.loads(told.out) == {
        "out": "s3://bucket/out/answers",
        "images": 60,
        "skipped": 1,
        "errors": "s3://bucket/out/answers/_errors.parquet",
    }
    written = {file.path: file for file in list_files(out)}
    assert written[first.path] == first  # size and time
    rows = [row for place in written if "part-" in place for row in _table(place)]
    assert len(written) == 4  # two parts, the record, the table of bad ones
    wanted = run.predict([tmp_path / "plain", shard], skip_bad=True).table()
    names = [path.removeprefix(f"{tmp_path}/") for path in wanted["path"]]
    found = {row["path"].removeprefix("s3://bucket/in/").removeprefix("shards/"): row for row in rows}
    assert len(rows) == len(found)
    assert sorted(found) == sorted(names)
    assert [found[name]["class_1"] for name in names] == wanted["class_1"].tolist()
    np.testing.assert_allclose([found[name]["prob_1"] for name in names], wanted["prob_1"], atol=1e-6)
    assert _table(join_path(out, "_errors.parquet")) == [{"path": "s3://bucket/in/shards/a.tar/b/00039.jpg", "reason": "not an image"}]


def _table(place: str) -> list[dict[str, Any]]:
    with open_file(place) as file:
        found: list[dict[str, Any]] = pq.read_table(io.BytesIO(file.read())).to_pylist()
    return found


def test_a_machine_of_amazon_s_asks_for_its_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the question would take minutes to fail."""
    monkeypatch.delenv("AWS_EXECUTION_ENV", raising=False)
    vendor = tmp_path / "sys_vendor"
    assert not remote.in_amazon(vendor)
    for name, expected in (("QEMU\n", False), ("Amazon EC2\n", True)):
        vendor.write_text(name)
        assert remote.in_amazon(vendor) is expected
    vendor.write_text("QEMU")
    monkeypatch.setenv("AWS_EXECUTION_ENV", "AWS_ECS_FARGATE")
    assert remote.in_amazon(vendor)
