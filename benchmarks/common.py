"""A measured command -> an entry of results.json, and results.json -> RESULTS.md."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results.json"


class Files(Dataset[tuple[Any, int]]):
    """Image files and labels through a transform of torchvision or timm: what a peer's DataLoader reads."""

    def __init__(self, paths: Sequence[Path], labels: Sequence[int], transform: Callable[[Image.Image], Any]) -> None:
        self.paths, self.labels, self.transform = paths, labels, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.transform(Image.open(self.paths[i]).convert("RGB")), int(self.labels[i])


def usual_transform(*views: Any) -> Callable[[Image.Image], Any]:
    """`views`, then what every tutorial has: a tensor, normalised by ImageNet's mean and deviation."""
    from torchvision import transforms

    last = [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    transform: Callable[[Image.Image], Any] = transforms.Compose([*views, *last])
    return transform


def measure(arguments: list[str], environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Runs a command as a process of its own: wall seconds, peak memory in GB, the last line it printed (read, where it is JSON).

    peak_gb: largest resident set, mapped files included. own_gb: largest anonymous part of it, seen 50 times a second:
    pages of mapped feature files are the system's cache, which it takes back when it needs them.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(arguments, stdout=output, env={**os.environ, **(environment or {})})
        own_kib = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            own_kib = max(own_kib, anonymous_kib(process.pid))
            time.sleep(0.02)
        seconds = time.perf_counter() - began
        output.seek(0)
        lines = output.read().strip().splitlines()
    if status != 0:
        raise SystemExit(f"{' '.join(arguments)} ended with status {os.waitstatus_to_exitcode(status)}")
    # ru_maxrss: the largest of the process and its finished children, in KiB on Linux.
    return {
        "seconds": round(seconds, 2),
        "peak_gb": round(usage.ru_maxrss / 2**20, 2),
        "own_gb": round(own_kib / 2**20, 3),
        "answer": json.loads(lines[-1]) if lines[-1][:1] in "{[0" else lines[-1],
    }


def anonymous_kib(pid: int) -> int:
    """RssAnon of a process on Linux; 0 elsewhere, or when it has just ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def seewhy(*arguments: str) -> list[str]:
    """The command line of this environment's seewhy."""
    return [sys.executable, "-m", "seewhy.cli", *arguments]


def interleave(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each candidate in each round: A B C A B C ..., after one unmeasured round to warm up.

    What disturbs a shared machine for a while then disturbs all of them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(rounds + 1):
        for name, work in candidates.items():
            began = time.perf_counter()
            work()
            if turn > 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def rates(seconds: dict[str, list[float]], amount: int) -> dict[str, float]:
    """Median pieces a second."""
    return {name: round(amount / statistics.median(times), 1) for name, times in seconds.items()}


def ratio(seconds: dict[str, list[float]], peer: str, ours: str) -> float:
    """Median over the rounds of the peer's time over ours: above 1, seewhy is ahead."""
    return round(statistics.median(p / o for p, o in zip(seconds[peer], seconds[ours], strict=True)), 2)


def matrix_limit() -> float:
    """GFLOP/s of a large float32 matrix product on this machine, the limit of everything a network does on it."""
    import torch

    side = 2048
    a, b = torch.randn(side, side), torch.randn(side, side)
    times = interleave({"product": lambda: a @ b}, 5)["product"]
    return round(2 * side**3 / statistics.median(times) / 1e9)


def record(name: str, question: str, entry: dict[str, Any], timed: bool = True) -> None:
    """Puts an entry under its name into results.json, with hardware, date and command, and renders RESULTS.md.

    timed: times of another processor are kept beside the new ones, not replaced by them.
    """
    from seewhy.models.saved_run import hardware, installed_versions

    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    here = hardware()
    if timed and name in results and results[name]["hardware"]["cpu"] != here["cpu"]:
        results[f"{name} | {results[name]['hardware']['cpu']}"] = results[name]
    results.pop(f"{name} | {here['cpu']}", None)
    results[name] = {
        "question": question,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": here,
        "versions": installed_versions(),
        **entry,
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    (FOLDER / "RESULTS.md").write_text(render(results))


def render(results: dict[str, Any]) -> str:
    """RESULTS.md: a section for each entry, its table, and what it was measured on."""
    parts = [
        "# Results",
        "",
        "Rendered from `results.json` by the benchmarks themselves; every figure comes from the command named under it.",
        "",
    ]
    if not any(entry["hardware"]["gpu"] for entry in results.values()):
        parts += ["On a GPU: not measured; none was at hand.", ""]
    for name in sorted(results):
        entry = results[name]
        elsewhere = f", on {entry['hardware']['cpu']}" if " | " in name else ""
        parts += [f"## {entry['question']}{elsewhere}", ""]
        columns = list(entry["rows"][0])
        parts += ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
        parts += ["| " + " | ".join(str(row.get(column, "")) for column in columns) + " |" for row in entry["rows"]]
        machine = entry["hardware"]
        versions = ", ".join(f"{k} {entry['versions'][k]}" for k in ("python", "torch", "timm", "onnxruntime"))
        parts += ["", *(f"{note}  " for note in entry.get("notes", [])), ""]
        parts += [
            f"`{entry['command']}`, {entry['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, "
            f"GPU: {machine['gpu'] or 'none'}; {versions}.",
            "",
        ]
    return "\n".join(parts)


if __name__ == "__main__":
    (FOLDER / "RESULTS.md").write_text(render(json.loads(RESULTS.read_text())))
