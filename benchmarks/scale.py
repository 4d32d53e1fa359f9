"""How much of the local backend's rate does Ray keep on the same cores, and does memory stay when the images get ten times as many?

    python benchmarks/scale.py --data-root DIR [--images 10000] [--rounds 3]     images of Caltech-101, into results.json
    python benchmarks/scale.py --quick                                             demo images, one JSON line

Images of 64 pixels in tar shards of 1,000 (made as benchmarks/growth.py makes them), asked about by `seewhy predict RUN SHARDS` with
`--backend local` and `--backend ray` (two workers), in turn, into one parquet file; efficientnet_lite0 at 64 pixels. Then both once with
ten times as many. Rate: by what the larger number takes longer than the smaller, so that starting is not in it; the whole command stands
beside it. Memory: anonymous pages of the command and everything it started, the most at a time. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import growth
import psutil
from common import anonymous_kib, record, seewhy

SIDE = 64
EXECUTORS = ("local", "ray")


def measure_all(arguments: list[str]) -> dict[str, float]:
    """Wall seconds of a command, and the most anonymous memory in GB that it and its descendants had at a time (seen 5 times a second)."""
    began = time.perf_counter()
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    most, ended = 0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not ended.wait(0.2):
            try:
                family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
            except psutil.Error:
                return
            most = max(most, sum(anonymous_kib(member.pid) for member in family))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = process.wait()
    ended.set()
    watcher.join()
    if status:
        raise SystemExit(f"{' '.join(arguments)} ended with status {status}")
    return {"seconds": time.perf_counter() - began, "own_gb": most / 2**20}


def same_table(a: Path, b: Path) -> bool:
    """Whether both hold the same images in the same order with the same classes, and probabilities within 1e-6."""
    import numpy as np
    import pandas as pd

    left, right = pd.read_parquet(a), pd.read_parquet(b)
    return left[["path", "class_1"]].equals(right[["path", "class_1"]]) and bool(np.allclose(left["prob_1"], right["prob_1"], atol=1e-6))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="demo images, one round")
    arguments = parser.parse_args()
    from seewhy.cli.main import train_from_arguments
    from seewhy.data.image_set import open_images

    data = "scenes" if arguments.quick else "caltech101"
    count, rounds = (480, 1) if arguments.quick else (arguments.images, arguments.rounds)
    growth.SHARD = 1000
    with tempfile.TemporaryDirectory() as place:
        root = ["--data-root", arguments.data_root] if arguments.data_root else []
        options = ["--backbone", "efficientnet_lite0", "--unfreeze", "0", "--views", "1", "--group-by", "exact", "--set", f"size={SIDE}"]
        run = train_from_arguments([data, *root, *options, "--out", f"{place}/run"])
        images = open_images(data, arguments.data_root)
        shards = {size: Path(place, str(size)) for size in (count, 10 * count)}
        for size, folder in shards.items():
            growth.pack_images(images, size, folder, SIDE)

        def ask(backend: str, size: int) -> dict[str, float]:
            out = Path(place, f"{backend}-{size}.parquet")
            out.unlink(missing_ok=True)
            workers = ["--ray-workers", "2"] if backend == "ray" else []
            return measure_all(seewhy("predict", str(run.path), str(shards[size]), "--backend", backend, *workers, "--out", str(out)))

        small: dict[str, list[dict[str, float]]] = {backend: [] for backend in EXECUTORS}
        for _ in range(rounds):
            for backend in EXECUTORS:
                small[backend].append(ask(backend, count))
        large = {backend: ask(backend, 10 * count) for backend in EXECUTORS}
        same = all(same_table(Path(place, f"local-{size}.parquet"), Path(place, f"ray-{size}.parquet")) for size in shards)
    rows, rates = [], []
    for backend in EXECUTORS:
        seconds = statistics.median(row["seconds"] for row in small[backend])
        memory = statistics.median(row["own_gb"] for row in small[backend])
        rates.append(9 * count / (large[backend]["seconds"] - seconds))
        rows.append(
            {
                "backend": backend,
                f"whole command s, {count:,}": round(seconds, 1),
                f"whole command s, {10 * count:,}": round(large[backend]["seconds"], 1),
                "images/s after the start": round(rates[-1]),
                f"memory GB, {count:,}": round(memory, 2),
                f"memory GB, {10 * count:,}": round(large[backend]["own_gb"], 2),
                "memory, ten times as many": f"{large[backend]['own_gb'] / memory - 1:+.0%}",
            }
        )
    share = rates[1] / rates[0]
    if not arguments.quick:
        notes = [
            f"Images of Caltech-101 at {SIDE} pixels in tar shards of 1,000, efficientnet_lite0; {rounds} rounds A B A B of the smaller "
            f"number, medians; the larger once each. Two Ray workers with a core each, of {os.cpu_count()}.",
            f"Ray keeps {share:.0%} of the local backend's rate. Both tables are {'the same' if same else 'NOT the same'} (classes equal, "
            "probabilities within 1e-6).",
            "Memory: anonymous pages of the command and all it started (Ray's own processes: scheduler, object store, workers).",
        ]
        command = f"python benchmarks/scale.py --images {count} --rounds {rounds}"
        raw = {"small": small, "large": large, "same": same}
        record("scale", "Answers shard by shard, here and on Ray", {"rows": rows, "raw": raw, "notes": notes, "command": command})
    print(json.dumps({"name": "scale", "share": share, "same": same, "rows": rows}))


if __name__ == "__main__":
    main()
