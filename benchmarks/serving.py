"""How fast and how steady is `seewhy serve`, beside a plain FastAPI handler with PyTorch?

    python benchmarks/serving.py --data-root DIR [--requests 1600] [--rounds 3] [--soak 6000]     Caltech-101, into results.json
    python benchmarks/serving.py --quick                                                          demo images, one JSON line

A frozen efficientnet_lite0 is trained and exported, then served from a process of its own. Throughput: 32 clients (sockets of this
process, connections kept), one image a request, against `predict` of the same run on the same files. Latency: one client, against the
exported file asked in this process by one caller (file to answer, all cores). Cold start: process start to the first answer, image
included. Soak: good and bad requests mixed; every good one must be answered, and memory must stay. Peer: what a tutorial of FastAPI
writes, timm's eager network behind `UploadFile`, in uvicorn. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import http.client
import io
import json
import os
import re
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import record, seewhy
from fastapi import FastAPI, UploadFile  # here, where FastAPI looks for the names of annotations

CLIENTS = 32
OF_PREDICT = "share of predict's rate"
BY_CPU = "share of predict's rate, by the processor time of the server alone"
BOUNDARY = "----benchmark"


# ---------------------------------------------------------------- servers and clients


@contextmanager
def server(command: Sequence[str]) -> Iterator[tuple[int, int, float]]:
    """(process number, port, when it was started) of a server that prints its address first."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r":(\d+)/", process.stdout.readline())
        if not found:
            raise SystemExit(f"{' '.join(command)} did not start")
        yield process.pid, int(found.group(1)), began
    finally:
        process.kill()
        process.wait()


def form(content: bytes, name: str = "a.jpg") -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\nContent-Type: image/jpeg\r\n\r\n'
    return head.encode() + content + f"\r\n--{BOUNDARY}--\r\n".encode()


def post(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, Any]:
    connection.request("POST", "/predict", body, {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"})
    response = connection.getresponse()
    return response.status, json.loads(response.read())


class Client:
    """A kept connection that sends its bodies one after another; what reads it calls `step` when something has come."""

    def __init__(self, port: int, bodies: Sequence[tuple[int, bytes]]) -> None:
        self.port, self.left = port, iter(bodies)
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.number, self.began, self.got = 0, 0.0, b""

    def send(self) -> bool:
        """The next body; False where there is none."""
        job = next(self.left, None)
        if job is None:
            return False
        self.number, body = job
        head = f"POST /predict HTTP/1.1\r\nHost: here\r\nContent-Type: multipart/form-data; boundary={BOUNDARY}\r\n"
        self.began, self.got = time.perf_counter(), b""
        self.socket.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        return True

    def step(self) -> tuple[int, bytes] | None:
        """Status and body of the answer, once all of it is there."""
        self.got += self.socket.recv(1 << 20)
        head, _, body = self.got.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
        if not length or len(body) < int(length.group(1)):
            return None
        return int(head[9:12]), body


def load(port: int, bodies: Sequence[bytes], clients: int) -> tuple[float, list[float], list[tuple[int, Any]]]:
    """Seconds for all, seconds of each, and the answers in the order of the bodies; each client keeps its connection.

    One thread and plain sockets, since clients run on the server's cores: what they take, it lacks.
    """
    seconds = [0.0] * len(bodies)
    answers: list[tuple[int, bytes]] = [(0, b"{}")] * len(bodies)
    jobs = list(enumerate(bodies))
    began = time.perf_counter()
    with selectors.DefaultSelector() as selector:
        for number in range(min(clients, len(bodies))):
            client = Client(port, jobs[number::clients])
            client.send()
            selector.register(client.socket, selectors.EVENT_READ, client)
        while selector.get_map():
            for key, _ in selector.select(timeout=120):
                client = key.data
                answer = client.step()
                if answer is None:
                    continue
                answers[client.number], seconds[client.number] = answer, time.perf_counter() - client.began
                if not client.send():
                    selector.unregister(client.socket)
                    client.socket.close()
    taken = time.perf_counter() - began
    return taken, seconds, [(status, json.loads(content)) for status, content in answers]


def first_answer(command: Sequence[str], body: bytes) -> float:
    """Seconds from the start of the process to the first answer."""
    with server(command) as (_, port, began):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        assert post(connection, body)[0] == 200
        return time.perf_counter() - began


def percentile(seconds: Sequence[float], share: float) -> float:
    """Milliseconds below which `share` of them lie."""
    return round(1000 * float(np.quantile(seconds, share)), 1)


# ---------------------------------------------------------------- the peer


def peer(run_folder: str) -> None:
    """What a tutorial writes, on a free port."""
    import timm
    import torch
    import uvicorn
    from PIL import Image

    from seewhy.api import load as load_run

    run = load_run(run_folder)
    model = timm.create_model(run.backbone.timm_name, num_classes=len(run.classes)).eval()
    model.load_state_dict(run.backbone.model.state_dict())
    data: Any = timm.data
    transform = data.create_transform(**data.resolve_model_data_config(model))
    app = FastAPI()

    @app.post("/predict")
    def predict(files: UploadFile) -> dict[str, Any]:
        image = transform(Image.open(io.BytesIO(files.file.read())).convert("RGB"))
        with torch.inference_mode():
            probs, order = model(image[None]).softmax(dim=1)[0].topk(5)
        return {"top": [{"class": run.classes[int(c)], "prob": float(p)} for p, c in zip(probs, order, strict=True)]}

    listening = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


# ---------------------------------------------------------------- questions


def throughput(commands: dict[str, list[str]], run: Any, files: list[Path], requests: int, rounds: int) -> dict[str, list[float]]:
    """Images/s of each candidate in each round, A B A B, after a short warming up; "... a CPU second": by its own processor time."""
    bodies = [form(files[n % len(files)].read_bytes()) for n in range(requests)]
    found: dict[str, list[float]] = {}
    run.predict(files[:64])
    for _ in range(rounds):
        for name, command in commands.items():
            with server(command) as (pid, port, _):
                load(port, bodies[: 2 * CLIENTS], CLIENTS)
                used, clients = cpu_seconds(pid), cpu_seconds(os.getpid())
                seconds, _, answers = load(port, bodies, CLIENTS)
                used, clients = cpu_seconds(pid) - used, cpu_seconds(os.getpid()) - clients
            found.setdefault(f"{name} a CPU second", []).append(requests / used)
            found.setdefault(f"{name}, share of clients", []).append(clients / (clients + used))
            assert all(status == 200 for status, _ in answers), name
            found.setdefault(name, []).append(requests / seconds)
        began, used = time.perf_counter(), cpu_seconds(os.getpid())
        run.predict(files)
        found.setdefault("predict", []).append(len(files) / (time.perf_counter() - began))
        found.setdefault("predict a CPU second", []).append(len(files) / (cpu_seconds(os.getpid()) - used))
    return found


def cpu_seconds(pid: int) -> float:
    """Processor time that a process has used so far."""
    import psutil

    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def latency(commands: dict[str, list[str]], model_file: Path, files: list[Path], count: int, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of single requests in each round, one client, A B A B; `bare`: the exported file asked in this process with all cores."""
    from seewhy.inference.onnx_model import load_onnx

    model = load_onnx(model_file, threads=os.cpu_count() or 1)
    wanted = [name for name in model.outputs if name not in ("logits", "network_input")]
    chosen = [files[n % len(files)] for n in range(count)]
    bodies = [form(path.read_bytes()) for path in chosen]
    found: dict[str, list[list[float]]] = {name: [] for name in ("bare", *commands)}
    for _ in range(rounds):
        bare = []
        for path in [*chosen[:10], *chosen]:
            began = time.perf_counter()
            model.run(model.read(path)[None], wanted)
            bare.append(time.perf_counter() - began)
        found["bare"].append(bare[10:])
        for name, command in commands.items():
            with server(command) as (_, port, _):
                load(port, bodies[:10], 1)
                found[name].append(load(port, bodies, 1)[1])
    return found


def typical(rounds: Sequence[Sequence[float]], share: float) -> float:
    """Milliseconds below which `share` of a round's lie, median over the rounds."""
    return round(statistics.median(percentile(seconds, share) for seconds in rounds), 1)


def over(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """p99 over p99, median over the rounds."""
    return round(statistics.median(percentile(a, 0.99) / percentile(b, 0.99) for a, b in zip(ours, theirs, strict=True)), 2)


def soak(command: list[str], files: list[Path], count: int) -> dict[str, Any]:
    """Mixed requests from 8 clients: how many good ones failed, what the bad ones got, resident memory along the way."""
    rng = np.random.default_rng(0)
    good = [form(path.read_bytes()) for path in files[:200]]
    bad = [form(b""), form(b"no image"), form(files[0].read_bytes()[:1500]), form(b"x" * 300_000, "../../x"), b"garbage"]
    kinds = rng.random(count) < 0.7
    bodies = [good[rng.integers(len(good))] if kind else bad[rng.integers(len(bad))] for kind in kinds]
    memory, failed, statuses = [], 0, set()
    with server(command) as (pid, port, _):
        for start in range(0, count, max(1, count // 10)):
            part = slice(start, start + max(1, count // 10))
            _, _, answers = load(port, bodies[part], 8)
            failed += sum(status != 200 for (status, _), kind in zip(answers, kinds[part], strict=True) if kind)
            statuses |= {status for (status, _), kind in zip(answers, kinds[part], strict=True) if not kind}
            memory.append(resident_mb(pid))
    return {"requests": count, "good": int(kinds.sum()), "good failed": failed, "bad got": sorted(statuses), "memory MB": memory}


def resident_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024, 1)


# ---------------------------------------------------------------- main


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--requests", type=int, default=1600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--soak", type=int, default=6000)
    parser.add_argument("--peer", metavar="RUN", help="serve this run as the peer does (how the benchmark starts it)")
    parser.add_argument("--quick", action="store_true", help="demo images, fewer requests")
    arguments = parser.parse_args()
    if arguments.peer:
        peer(arguments.peer)
        return
    if arguments.quick:
        arguments.requests, arguments.rounds, arguments.soak = 96, 1, 100
    from seewhy.cli.main import train_from_arguments
    from seewhy.curation.split import read_split
    from seewhy.data.image_set import open_images
    from seewhy.deploy.export import export_file

    data = "scenes" if arguments.quick else "caltech101"
    with tempfile.TemporaryDirectory() as place:
        root = ["--data-root", arguments.data_root] if arguments.data_root else []
        run = train_from_arguments([data, "--backbone", "efficientnet_lite0", "--unfreeze", "0", *root, "--out", f"{place}/run"])
        images = open_images(data, arguments.data_root)
        files = [images.paths[i] for i in read_split(run.path, images).test[:640]]
        model_file, _ = export_file(run, Path(place) / "model.onnx", images=16)
        commands = {
            "seewhy": seewhy("serve", str(model_file), "--port", "0"),
            "peer": [sys.executable, __file__, "--peer", str(run.path)],
        }
        starts = {
            name: [first_answer(command, form(files[0].read_bytes())) for _ in range(arguments.rounds)]
            for name, command in commands.items()
        }
        rates = throughput(commands, run, files, arguments.requests, arguments.rounds)
        waits = latency(commands, model_file, files, 40 if arguments.quick else 300, arguments.rounds)
        steady = soak(commands["seewhy"], files, arguments.soak)
    ahead = statistics.median(a / b for a, b in zip(rates["seewhy"], rates["peer"], strict=True))
    by_cpu = statistics.median(a / b for a, b in zip(rates["seewhy a CPU second"], rates["predict a CPU second"], strict=True))
    of_predict = statistics.median(a / b for a, b in zip(rates["seewhy"], rates["predict"], strict=True))
    ratios = {
        "plain FastAPI and PyTorch, throughput": round(ahead, 2),
        "plain FastAPI and PyTorch, p99": over(waits["peer"], waits["seewhy"]),
        OF_PREDICT: round(of_predict, 2),
        BY_CPU: round(by_cpu, 2),
        "p99 over bare p99": over(waits["seewhy"], waits["bare"]),
    }
    assert steady["good failed"] == 0, steady
    assert max(steady["bad got"]) < 500, steady
    if not arguments.quick:
        keep(rates, waits, starts, steady, ratios, arguments)
    print(json.dumps({"name": "serving", "ratios": ratios, "soak": steady}))


def keep(
    rates: dict[str, list[float]],
    waits: dict[str, list[list[float]]],
    starts: dict[str, list[float]],
    steady: dict[str, Any],
    ratios: dict[str, float],
    arguments: argparse.Namespace,
) -> None:
    shown = {
        "seewhy": "seewhy serve, exported file",
        "peer": "plain FastAPI handler, PyTorch eager",
        "predict": "run.predict, no server",
        "bare": "exported file, no server",
    }
    rows = [
        {
            "candidate": label,
            f"images/s, {CLIENTS} clients": f"{statistics.median(rates[name]):.0f}" if name in rates else "–",
            "p50 ms, 1 client": typical(waits[name], 0.5) if name in waits else "–",
            "p99 ms, 1 client": typical(waits[name], 0.99) if name in waits else "–",
            "s from start to first answer": f"{statistics.median(starts[name]):.2f}" if name in starts else "–",
        }
        for name, label in shown.items()
    ]
    memory = steady["memory MB"]
    notes = [
        f"Caltech-101, efficientnet_lite0, 101 classes; {arguments.requests} requests of one image a round, {arguments.rounds} rounds "
        f"A B A B, medians; {len(waits['bare'][0])} single requests a round; clients run on the same cores. Throughput is "
        f"{ratios[OF_PREDICT]:.0%} of predict's ({ratios[BY_CPU]:.0%} by processor time: the clients take "
        f"{statistics.median(rates['seewhy, share of clients']):.0%} of what both use) and "
        f"{ratios['plain FastAPI and PyTorch, throughput']:.1f}x the plain handler's; p99 at "
        f"one client is {ratios['p99 over bare p99']:.2f}x the bare file's.",
        f"Soak: {steady['requests']} requests of 8 clients, {steady['good']} good: {steady['good failed']} of these failed; bad ones got "
        f"{', '.join(map(str, steady['bad got']))}; resident memory after each tenth: {', '.join(f'{m:.0f}' for m in memory)} MB.",
    ]
    command = f"python benchmarks/serving.py --requests {arguments.requests} --rounds {arguments.rounds} --soak {arguments.soak}"
    raw = {"images/s": rates, "start s": starts, "ratios": ratios, "soak": steady}
    record("serving", "Answers over HTTP", {"rows": rows, "raw": raw, "notes": notes, "command": command})


if __name__ == "__main__":
    main()
