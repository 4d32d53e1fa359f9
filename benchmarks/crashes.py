"""Does killing `seewhy train`, `predict` and `export` at any moment (kill -9) lose or spoil anything?

    python benchmarks/crashes.py [--kills 100]     trainings on the demo set, and half as many tables and exports; into results.json
    python benchmarks/crashes.py --quick           6 kills, one JSON line

Each job runs once undisturbed. Then, again and again in a place of its own, it is killed at a random moment of its life and the same
command is given again (with --resume for train) until it ends. Survived means: after the kill the run folder or table was not there,
or whole; the second command ended well; weights, metrics and answers are the undisturbed ones, bit for bit; so is every row of the
feature cache; and no file is left over. A job is a fork of this process, in which all is imported, so that no kill is spent on imports.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import record

FROZEN = ["train", "scenes", "--backbone", "efficientnet_lite0", "--unfreeze", "0"]
STAGE = ["train", "scenes", "--backbone", "efficientnet_lite0", "--unfreeze", "1", "--epochs", "3"]


@dataclass(frozen=True)
class Job:
    """command: after `seewhy`, with OUT for the place of what it makes. again: what the second command adds. share: of the kills."""

    name: str
    command: list[str]
    again: list[str]
    out: str
    share: float


def start(command: list[str], cache: Path, log: Path) -> int:
    """`seewhy COMMAND` as a fork of this process; its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    try:
        with log.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["SEEWHY_CACHE"] = str(cache)
        from seewhy.cli.guard import run_guarded
        from seewhy.cli.main import call

        os._exit(run_guarded(lambda: call(command)))
    finally:
        os._exit(70)


def run(command: list[str], cache: Path, log: Path) -> float:
    """The command to its end; its seconds."""
    began = time.monotonic()
    _, status = os.waitpid(start(command, cache, log), 0)
    if status != 0:
        raise SystemExit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}: {log.read_text()[-500:]}")
    return time.monotonic() - began


def killed_after(seconds: float, command: list[str], cache: Path, log: Path) -> bool:
    """Starts the command and kills it; whether it was still there."""
    pid = start(command, cache, log)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


# ---------------------------------------------------------------- what is compared


def content(out: Path) -> dict[str, str]:
    """What a job made, by name: hashes of files, without the times and the place of this trial in them."""
    place = str(out.parent).encode()

    def digest(file: Path) -> str:
        return hashlib.sha256(file.read_bytes().replace(place, b"")).hexdigest()

    if out.is_file():
        return {"bytes": digest(out)}
    names = ["model.safetensors", "ood_reference.safetensors", "metrics.json", "split.json", "predictions_test.csv", "predictions_val.csv"]
    found = {name: digest(out / name) for name in names}
    rows = (out / "history.csv").read_text().splitlines()
    found["history"] = repr([row.rsplit(",", 1)[0] for row in rows])  # the last column is seconds
    json.loads((out / "run.json").read_text())
    return found


def stored_rows(cache: Path) -> dict[tuple[str, bytes], bytes]:
    """(store, key) -> hash of its row, of every complete row in a feature cache."""
    found: dict[tuple[str, bytes], bytes] = {}
    for folder in sorted((cache / "features").glob("*")):
        keys = (folder / "keys.bin").read_bytes()
        count = len(keys) // 32
        if count:
            rows = np.fromfile(folder / "rows.bin", dtype=np.uint8).reshape(count, -1)
            found |= {(folder.name, keys[32 * i : 32 * i + 32]): hashlib.sha256(rows[i].tobytes()).digest() for i in range(count)}
    return found


def stage_of(out: Path, cache: Path, log: Path) -> str:
    """How far a killed job had come."""
    text = log.read_text() if log.exists() else ""
    work = out.parent / f".{out.name}.partial"
    if "test accuracy" in text or out.exists():
        return "saving"
    if (work / "checkpoints").exists():
        return "fitting"
    if any((cache / "features").glob("*/rows.bin")):
        return "features"
    if any(file.stem.isdigit() for file in work.glob("*.json")):
        return "between blocks"
    return "before"


# ---------------------------------------------------------------- the trials


def attempt(job: Job, place: Path, warm: Path, after: float, expected: dict[str, str], rows: dict[Any, bytes]) -> tuple[str, list[str]]:
    """One kill and what came of it: the stage it hit, and what was wrong (nothing, where all is well)."""
    cache, out, log = place / "cache", place / job.out, place / "log"
    shutil.copytree(warm, cache)
    hit = killed_after(after, fill(job.command, out), cache, log)
    stage = stage_of(out, cache, log) if hit else "finished"
    wrong = []
    if out.exists() and content(out) != expected:
        wrong.append("after the kill, the result was there and not whole")
    again = [*fill(job.command, out), *job.again]
    _, status = os.waitpid(start(again, cache, log), 0)
    if status != 0:
        return stage, [*wrong, f"the second command ended with {os.waitstatus_to_exitcode(status)}: {log.read_text()[-300:]}"]
    if content(out) != expected:
        wrong.append(f"another result: {[name for name, value in content(out).items() if expected.get(name) != value]}")
    if {key: value for key, value in stored_rows(cache).items() if rows.get(key) != value}:
        wrong.append("another row in the feature cache")
    left = [path.name for path in place.iterdir() if path.name not in ("cache", "log", job.out, f".{job.out}.lock")]
    if left and job.again:
        wrong.append(f"left over: {left}")
    return stage, wrong


def fill(command: list[str], out: Path) -> list[str]:
    return [*command, "--out", str(out)]


def trial(job: Job, kills: int, warm: Path, chance: random.Random) -> dict[str, Any]:
    """A row of the table."""
    stages: Counter[str] = Counter()
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        shutil.copytree(warm, place / "cache")
        seconds = run(fill(job.command, place / job.out), place / "cache", place / "log")
        expected, rows = content(place / job.out), stored_rows(place / "cache")
    for n in range(kills):
        with tempfile.TemporaryDirectory() as folder:
            after = chance.uniform(0, seconds)
            stage, wrong = attempt(job, Path(folder), warm, after, expected, rows)
            stages[stage] += 1
            problems += [f"{job.name}, killed after {after:.2f} s: {text}" for text in wrong]
            print(f"  {job.name} {n + 1}/{kills}: {after:.1f} s, {stage}{' ' + str(wrong) if wrong else ''}", file=sys.stderr, flush=True)
    for text in problems:
        print(text, file=sys.stderr)
    return {
        "job": job.name,
        "killed": kills,
        "hit while": ", ".join(f"{stage} {count}" for stage, count in stages.most_common()),
        "not survived": len(problems),
        "s undisturbed": round(seconds, 1),
    }


def linked(images: Path, folder: Path, copies: int) -> Path:
    """The demo images under many names."""
    folder.mkdir()
    for n in range(copies):
        for path in images.rglob("*.jpg"):
            (folder / f"{n}-{path.parent.name}-{path.name}").symlink_to(path)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of trainings")
    parser.add_argument("--only", default="", help="only jobs whose name holds this; nothing is recorded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="3 kills of a training, 3 of a table")
    arguments = parser.parse_args()
    preload()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        ready, warm = place / "ready", place / "warm"
        run([*FROZEN, "--out", str(place / "base")], ready, place / "log")
        run([*STAGE, "--epochs", "1", "--out", str(place / "other")], ready, place / "log")
        # What the trials begin with: the demo set and the exported networks, which take 15 s and are written by one rename; no features.
        shutil.copytree(ready, warm, ignore=shutil.ignore_patterns("features"))
        images = linked(warm / "scenes" / "images", place / "many", 2 if arguments.quick else 8)
        ask = ["predict", str(place / "base"), str(images), "--top-k", "3"]
        jobs = [
            Job("train, everything frozen", FROZEN, ["--resume"], "run", 0.6),
            Job("train, last stage", STAGE, ["--resume"], "run", 0.4),
            Job("predict to .parquet", ask, [], "table.parquet", 0.2),
            Job("predict to .csv", ask, [], "table.csv", 0.15),
            Job("export", ["export", str(place / "base"), "--images", "20"], [], "model.onnx", 0.2),
        ]
        jobs = [job for job in jobs if arguments.only in job.name]
        chance = random.Random(arguments.seed)
        if arguments.quick:
            jobs = [jobs[0], jobs[3]]
        rows = [trial(job, 3 if arguments.quick else round(job.share * arguments.kills), warm, chance) for job in jobs]
    lost = sum(row["not survived"] for row in rows)
    if not arguments.quick and not arguments.only:
        command = f"python benchmarks/crashes.py --kills {arguments.kills} --seed {arguments.seed}"
        notes = [
            "Survived: what was there after the kill was whole, the same command again (train: with --resume) ended well, and weights, "
            "metrics, answers and all cached features are those of the undisturbed job, bit for bit; nothing is left over."
        ]
        record("crashes", "Killed at a random moment (kill -9)", {"rows": rows, "notes": notes, "command": command}, timed=False)
    print(json.dumps({"name": "crashes", "killed": sum(row["killed"] for row in rows), "not_survived": lost}))
    sys.exit(1 if lost else 0)


def preload() -> None:
    """What jobs import; nothing is computed here, since threads would not survive the fork."""
    import lightning.pytorch
    import onnxruntime

    import seewhy.cli
    import seewhy.deploy.export
    import seewhy.inference.batch_runner
    import seewhy.inference.predict
    import seewhy.training.pipeline

    assert all(
        (
            lightning.pytorch,
            onnxruntime,
            seewhy.cli,
            seewhy.deploy.export,
            seewhy.inference.predict,
            seewhy.inference.batch_runner,
            seewhy.training.pipeline,
        )
    )


if __name__ == "__main__":
    main()
