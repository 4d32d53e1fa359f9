"""Test the server as a process: it starts fast, survives slow and vanished clients, and finishes its work on SIGTERM."""

from __future__ import annotations

import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from seewhy.cli.guard import run_guarded
from seewhy.cli.main import call


@contextmanager
def served(*arguments: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, address) of `seewhy serve ARGUMENTS` on a free port."""
    process = subprocess.Popen(
        [sys.executable, "-m", "seewhy.cli", "serve", *arguments, "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+?:(\d+)/", line)
        assert found, process.stderr.read() if process.stderr else line
        yield process, f"http://127.0.0.1:{found.group(1)}"
    finally:
        process.kill()
        process.communicate()


def post(address: str, *contents: bytes, timeout: float = 60) -> tuple[int, dict]:
    boundary = "----seewhy"
    parts = [
        f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{n}.jpg"\r\n\r\n'.encode() + data + b"\r\n"
        for n, data in enumerate(contents)
    ]
    request = urllib.request.Request(
        f"{address}/predict",
        b"".join(parts) + f"--{boundary}--\r\n".encode(),
        {"Content-Type": f"multipart/form-data; boundary={boundary}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def raw(address: str, content: bytes) -> socket.socket:
    host, port = address.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=30)
    connection.sendall(content)
    return connection


def inflight(address: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as response:
        lines = response.read().decode().splitlines()
    return float(next(line for line in lines if line.startswith("seewhy_inflight_images")).split()[-1])


HEAD = (
    b"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 50000\r\n\r\n"
    b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n'
)


def test_a_life_of_a_server(demo_onnx: Path, demo_images: list[Path]) -> None:
    image = demo_images[0].read_bytes()
    with served(str(demo_onnx), "--upload-seconds", "1") as (process, address):
        status, first = post(address, image)
        assert (status, len(first["answers"])) == (200, 1)
        # A client that sends slower than it may is told so; one that goes away in between harms nobody.
        slow = raw(address, HEAD)
        gone = raw(address, HEAD)
        gone.close()
        reply = b"".join(iter(lambda: slow.recv(10_000), b""))  # until the server closes
        assert b" 408 " in reply.split(b"\r\n")[0]
        assert json.loads(reply[reply.index(b"{") :])["error"]["code"] == "request_timeout"
        slow.close()
        vanished = raw(
            address,
            HEAD.replace(b"50000", str(len(HEAD.split(b"\r\n\r\n", 1)[1]) + len(image) + 9).encode()) + image + b"\r\n--x--\r\n",
        )
        vanished.close()  # everything sent, nobody waits for the answer
        assert post(address, image)[1]["answers"] == first["answers"]
        # On SIGTERM the requests in flight are finished, then the process ends.
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            answers = [pool.submit(post, address, *[image] * 16) for _ in range(4)]
            while not inflight(address):
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
            found = [answer.result() for answer in answers]
        assert [status for status, _ in found] == [200] * 4
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)
        assert process.stderr is not None
        log = process.stderr.read()
        assert first["request_id"] in log
        assert "Traceback" not in log


def test_a_run_is_exported_when_first_served(demo_run: object, tmp_path: Path, demo_images: list[Path]) -> None:
    import shutil

    from seewhy.api import Run

    assert isinstance(demo_run, Run)
    run = shutil.copytree(demo_run.path, tmp_path / "run")
    with served(str(run), SEEWHY_API_KEY="k") as (_, address):
        assert post(address, demo_images[0].read_bytes())[0] == 401
        with urllib.request.urlopen(f"{address}/healthz", timeout=30) as response:
            assert json.load(response) == {"status": "ok"}
    assert (run / "model.onnx").is_file()


def test_mistakes_are_one_line(demo_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.onnx").write_text("no graph")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, words in [
            ([str(tmp_path / "none.onnx")], "no such file; `seewhy export RUN` makes one"),
            ([str(tmp_path / "text.onnx")], "not a readable ONNX file"),
            ([str(tmp_path / "nothing")], "neither a run nor a file of `seewhy export`"),
            ([str(demo_onnx), "--port", port], f"127.0.0.1:{port}: cannot bind (Address already in use)"),
            ([str(demo_onnx), "--target-precision", "0.123"], "has no threshold for precision"),
            ([str(demo_onnx), "--max-mb", "600"], "use at most 512"),
        ]:
            assert run_guarded(lambda arguments=arguments: call(["serve", *arguments])) == 2
            error = capsys.readouterr().err
            assert words in error
            assert error.count("\n") == 1
