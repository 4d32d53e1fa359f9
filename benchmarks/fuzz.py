"""Can bytes chosen by a coverage-guided fuzzer (atheris) crash what reads files and requests of strangers?

    python benchmarks/fuzz.py [--seconds 300]              each target for so long, into results.json
    python benchmarks/fuzz.py --target NAME --seconds 20   one of record, graph, weights, image, upload, config; one JSON line
    python benchmarks/fuzz.py --quick                      each target for 5 s, one JSON line

Anything but an answer or an error of seewhy's own, in one line, is a crash: it ends the target, and its input is written beside the
results. Targets: record (run.json), graph (an exported file), weights (a weights file), image (decoding), upload (POST /predict with
any body and headers), config (YAML and --set).
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from common import record

Target = Callable[[bytes], None]


def answers(work: Callable[[], Any]) -> None:
    """work() answers, or raises an error of seewhy's own in one line."""
    from seewhy.errors import SeewhyError

    said = ""
    try:
        work()
    except SeewhyError as error:
        said = str(error)
    assert "\n" not in said, said


def small_run() -> Any:
    """A run with random weights, made without training."""
    from dataclasses import replace

    from seewhy.api import Run
    from seewhy.config import make_config
    from seewhy.models.backbones import create_backbone
    from seewhy.models.saved_run import make_manifest
    from seewhy.models.trunk_tail import split_backbone

    backbone = create_backbone("test_resnet.r160_in1k", 3, weights="none", seed=0)
    backbone = replace(backbone, preprocessing=replace(backbone.preprocessing, size=64))
    config = make_config(data="x", backbone="test_resnet.r160_in1k", weights="none").resolved()
    facts = {
        "metrics": {"test": {"accuracy": 0.5, "accuracy_ci95": [0.4, 0.6], "n": 10}},
        "data": {"hash": "0" * 64, "name": "x"},
        "split": {"hash": "0" * 64},
        "calibration": {"temperature": 1.5, "selective": [{"precision": 0.9, "threshold": 0.7}]},
        "ood": {"threshold": 0.8},
    }
    classes = ("ant", "bee", "cat")
    return Run(Path("small"), config, classes, backbone, split_backbone(backbone, 1), make_manifest(config, classes, backbone, facts))


def image_bytes() -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(file, "JPEG")
    return file.getvalue()


# ---------------------------------------------------------------- targets: the inputs to begin with, and what is done with each


def _record() -> tuple[list[bytes], Target]:
    from seewhy.models.manifest import check_manifest

    return [json.dumps(small_run().manifest).encode()], lambda data: answers(lambda: check_manifest(data, "run.json"))


def _graph() -> tuple[list[bytes], Target]:
    from seewhy.deploy.onnx_export import build_onnx
    from seewhy.inference.onnx_model import load_onnx

    return [build_onnx(small_run()).SerializeToString()], lambda data: answers(lambda: load_onnx(data))


def _weights() -> tuple[list[bytes], Target]:
    import torch
    from safetensors.torch import save

    from seewhy.models.weights import read_weights

    state = {"a.weight": torch.ones(2, 3), "b": torch.tensor([1.0])}
    file = io.BytesIO()
    torch.save(state, file)
    place = Path(tempfile.mkdtemp())

    def target(data: bytes) -> None:
        for name in ("w.safetensors", "w.pth"):
            (place / name).write_bytes(data)
            answers(partial(read_weights, place / name))

    return [save(state), file.getvalue()], target


def _image() -> tuple[list[bytes], Target]:
    from torture import seeds

    from seewhy.data.decode import decode

    def target(data: bytes) -> None:
        with suppress(ValueError):
            decode(data)

    return [data for _, data in seeds()], target


def _upload() -> tuple[list[bytes], Target]:
    """The first line of the input is the path with its query and the content type, the rest is the body."""
    from fastapi.testclient import TestClient

    from seewhy.deploy.app import create_app
    from seewhy.deploy.middleware import Limits
    from seewhy.deploy.onnx_export import build_onnx

    app = create_app(build_onnx(small_run()).SerializeToString(), 1, Limits(request_bytes=1_000_000, pixels=1_000_000))
    client = TestClient(app)  # which raises what the server does not catch
    form = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.jpg"\r\n\r\n' + image_bytes() + b"\r\n--x--\r\n"
    heads = [b"/predict?top_k=2 multipart/form-data; boundary=x\n", b"/predict?heatmap=ant&k=3 multipart/form-data; boundary=x\n"]

    def target(data: bytes) -> None:
        head, _, body = data.partition(b"\n")
        path, _, kind = head.decode("latin-1").partition(" ")
        path = "/predict" + re.sub(r"[^!-~]", "", path.removeprefix("/predict"))[:200]
        kind = re.sub(r"[^ -~]", "", kind)[:200]
        response = client.post(path, content=body, headers={"Content-Type": kind})
        assert response.status_code < 500, (response.status_code, response.text)
        if path.split("?")[0] == "/predict" and response.status_code != 200:
            found = response.json()["error"]
            assert found["code"], found
            assert "\n" not in found["message"], found

    return [head + form for head in heads], target


def _config() -> tuple[list[bytes], Target]:
    from seewhy.config import make_config, parse_settings, read_config

    place = Path(tempfile.mkdtemp()) / "c.yaml"

    def target(data: bytes) -> None:
        place.write_bytes(data)
        answers(lambda: make_config(**{"data": "x", **read_config(place)}))
        answers(lambda: make_config(data="x", **parse_settings([data.decode("latin-1")])))

    return [b"data: scenes\nlr: 0.1\nunfreeze: all\nviews: 3\n", b'{"data": "x", "seed": 3}', b"label_smoothing=0.1"], target


def _tar() -> tuple[list[bytes], Target]:
    import io
    import tarfile

    from seewhy.data.shards import members, stream

    place = Path(tempfile.mkdtemp()) / "x.tar"
    beginnings = []
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for name, content in (
                ("cat/1.jpg", b"x" * 600),
                ("cat/1.cls", b"7"),
                ("ö" * 120 + "/2.png", b"y"),
                ("2.json", b'{"label": 3}'),
            ):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        beginnings.append(buffer.getvalue()[:6000])

    def target(data: bytes) -> None:
        place.write_bytes(data)
        answers(lambda: members(place))
        answers(lambda: list(stream(io.BytesIO(data), "tar", "x.tar")))

    return beginnings, target


TARGETS: dict[str, Callable[[], tuple[list[bytes], Target]]] = {
    "record": _record,
    "graph": _graph,
    "weights": _weights,
    "image": _image,
    "upload": _upload,
    "config": _config,
    "tar": _tar,
}


# ---------------------------------------------------------------- running


def fuzz(name: str, seconds: int, seed: int, corpus: Path) -> None:
    """This process, to its end, which libFuzzer decides."""
    import logging

    import atheris

    logging.disable(logging.CRITICAL)
    sys.stderr.flush()
    with atheris.instrument_imports(include=["seewhy", "starlette", "python_multipart", "PIL"]):
        beginnings, target = TARGETS[name]()
    for n, data in enumerate(beginnings):
        (corpus / f"seed-{n}").write_bytes(data)
    longest = 2 * max(map(len, beginnings)) + 1000
    options = [
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        f"-max_len={longest}",
        "-timeout=60",
        "-rss_limit_mb=3000",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, f"-artifact_prefix={corpus}/", str(corpus)], target)
    atheris.Fuzz()


def run(name: str, seconds: int, seed: int) -> dict[str, Any]:
    """A row: the target in a process of its own."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--in-process", folder, "--target", name, "--seconds", str(seconds), "--seed", str(seed)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
        found = {key: int(value) for key, value in re.findall(r"stat::(\w+):\s+(\d+)", done.stderr)}
        crashed = done.returncode != 0
        if crashed:
            kept = [path for path in Path(folder).iterdir() if re.match(r"(crash|timeout|oom|leak)-", path.name)]
            for path in kept:
                path.rename(Path(tempfile.gettempdir()) / f"{name}-{path.name}")
            print(f"{name}: {done.stderr[-3000:]}\n{[path.name for path in kept]}", file=sys.stderr)
    return {
        "target": name,
        "inputs": found.get("number_of_executed_units", 0),
        "seconds": round(time.monotonic() - began),
        "crashes": int(crashed),
        "peak MB": found.get("peak_rss_mb", 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=int, default=300, help="of each target")
    parser.add_argument("--target", choices=list(TARGETS), help="this one alone; nothing is recorded")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--in-process", type=Path, help="fuzz in this process, with this folder for inputs (how the benchmark starts it)")
    parser.add_argument("--quick", action="store_true", help="each target for 5 s")
    arguments = parser.parse_args()
    if arguments.in_process:
        fuzz(arguments.target, arguments.seconds, arguments.seed, arguments.in_process)
        return
    seconds = 5 if arguments.quick else arguments.seconds
    rows = [run(name, seconds, arguments.seed) for name in ([arguments.target] if arguments.target else TARGETS)]
    if not arguments.quick and not arguments.target:
        command = f"python benchmarks/fuzz.py --seconds {seconds} --seed {arguments.seed}"
        notes = [
            "Each target in a process of its own, coverage-guided, from a few good inputs. A crash is anything but an answer or an error "
            "of seewhy's own in one line."
        ]
        record("fuzz", "Inputs made by a fuzzer", {"rows": rows, "notes": notes, "command": command}, timed=False)
    crashes = sum(row["crashes"] for row in rows)
    print(json.dumps({"name": "fuzz", "inputs": {row["target"]: row["inputs"] for row in rows}, "crashes": crashes}))
    sys.exit(1 if crashes else 0)


if __name__ == "__main__":
    main()
