"""How do time, memory and disk grow with the number of images, and how long does starting take?

    python benchmarks/growth.py --data-root DIR [--sizes 1000 10000 100000]     Caltech-101 repeated, into results.json
    python benchmarks/growth.py --shards --side 32 [--sizes 10000 100000 1000000]     the same in tar shards, small images
    python benchmarks/growth.py --quick                                         240 and 480 demo images, one JSON line

Images are Caltech-101's, repeated under new names with one byte more at their end, so that no two are equal. They are shown to the
network at 64 pixels, so that 100,000 of them take minutes: what grows does not depend on it. Each size trains
`efficientnet_lite0 --unfreeze 0` (3 epochs, 1 view) and predicts all images into a parquet file, as processes of their own, from an
empty cache. The figures stand in RESULTS.md.

With --shards, the images are first made small (JPEG of `--side` pixels, a noise of their own behind the last byte as above), put into tar
files of 10,000, and shown to the network at that size; features go into the cache as float16, equal files are kept together.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from common import measure, record, seewhy
from PIL import Image

SHARD = 10_000  # images a tar file
OPTIONS = ["--backbone", "efficientnet_lite0", "--unfreeze", "0", "--views", "1", "--epochs", "3", "--set", "size=64"]


def repeat_images(images: Any, count: int, folder: Path) -> None:
    """`count` files in class folders, each an image of `images` with a counter behind its last byte."""
    for n in range(count):
        source = images.paths[n * 7919 % len(images)]  # a prime stride: every size holds all classes
        place = folder / images.classes[images.labels[n * 7919 % len(images)]]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{n}{source.suffix}").write_bytes(source.read_bytes() + n.to_bytes(4, "big"))


def pack_images(images: Any, count: int, folder: Path, side: int) -> None:
    """`count` small images in tar files of SHARD, in class folders."""
    folder.mkdir()
    small: dict[int, bytes] = {}
    for first in range(0, count, SHARD):
        with tarfile.open(folder / f"{first // SHARD:05d}.tar", "w") as shard:
            for n in range(first, min(first + SHARD, count)):
                i = n * 7919 % len(images)
                if i not in small:
                    buffer = io.BytesIO()
                    Image.open(images.paths[i]).convert("RGB").resize((side, side)).save(buffer, "JPEG")
                    small[i] = buffer.getvalue()
                entry = tarfile.TarInfo(f"{images.classes[images.labels[i]]}/{n}.jpg")
                content = small[i] + n.to_bytes(4, "big")
                entry.size = len(content)
                shard.addfile(entry, io.BytesIO(content))


def grow(images: Any, count: int, side: int | None = None) -> dict[str, Any]:
    """One size: train, then predict; images as they are in folders, or small ones in shards."""
    with tempfile.TemporaryDirectory() as place:
        folder, cache = Path(place) / "images", Path(place) / "cache"
        options = OPTIONS
        if side is None:
            repeat_images(images, count, folder)
        else:
            pack_images(images, count, folder, side)
            options = [*OPTIONS, "--set", f"size={side}", "--set", "feature_dtype=float16", "--group-by", "exact"]
        environment = {"SEEWHY_CACHE": str(cache)}
        out = Path(place) / "run"
        trained = measure(seewhy("train", str(folder), *options, "--out", str(out), "--json"), environment)
        stored = sum(file.stat().st_size for file in (cache / "features").rglob("*.bin"))
        table = str(Path(place) / "answers.parquet")
        predicted = measure([*seewhy("predict", str(out), str(folder), "--out", table)], environment)
        return {"n": count, "train": trained, "predict": predicted, "cache_bytes": stored / count}


def start_up(runs: int) -> dict[str, float]:
    """Median seconds of the two commands everybody waits for."""
    commands = {"import seewhy": [sys.executable, "-c", "import seewhy; print(0)"], "seewhy --help": seewhy("--help")}
    return {name: statistics.median(measure(command)["seconds"] for _ in range(runs)) for name, command in commands.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--shards", action="store_true", help="small images in tar files")
    parser.add_argument("--side", type=int, default=32, help="pixels of their sides, with --shards")
    parser.add_argument("--quick", action="store_true", help="two small sizes of the demo set")
    arguments = parser.parse_args()
    sizes = [240, 480] if arguments.quick else arguments.sizes
    from seewhy.data.image_set import open_images

    images = open_images("scenes" if arguments.quick else "caltech101", arguments.data_root)
    found = []
    for count in sizes:
        found.append(grow(images, count, arguments.side if arguments.shards else None))
        print(json.dumps(found[-1]), file=sys.stderr)
    starts = start_up(3 if arguments.quick else 7)
    rows = []
    for size in found:
        stages, n = size["train"]["answer"]["seconds"], size["n"]
        rows.append(
            {
                "images": f"{n:,}",
                "check and hash s": stages["images"],
                "features s": stages["features"],
                "features/s": round(n / stages["features"]),
                "fit s": stages["fit"],
                "evaluation and report s": round(stages["evaluation"] + stages["report"], 1),
                "train: own GB": size["train"]["own_gb"],
                "train: resident GB": size["train"]["peak_gb"],
                "predict s": size["predict"]["seconds"],
                "predictions/s": round(n / size["predict"]["seconds"]),
                "predict: own GB": size["predict"]["own_gb"],
                "cache bytes an image": round(size["cache_bytes"]),
            }
        )
    last, before = found[-1], found[-2]
    factor = last["n"] / before["n"]
    # A ratio above 1: the larger size costs less an image (time) or no more in all (memory).
    ratios = {
        f"{what} an image, {before['n']} to {last['n']}": round(
            factor * before["train"]["answer"]["seconds"][stage] / last["train"]["answer"]["seconds"][stage], 2
        )
        for what, stage in (("checking", "images"), ("features", "features"), ("fit", "fit"))
    }
    ratios["predict an image"] = round(factor * before["predict"]["seconds"] / last["predict"]["seconds"], 2)
    ratios["memory of training"] = round(before["train"]["own_gb"] / last["train"]["own_gb"], 2)
    ratios["memory of predicting"] = round(before["predict"]["own_gb"] / last["predict"]["own_gb"], 2)
    answer = {"name": "growth", "ratios": ratios, "start_s": starts, "rows": rows}
    if not arguments.quick:
        notes = [
            "From the second last size to the last, cost an image there over cost an image here: "
            + "; ".join(f"{name} {value}" for name, value in ratios.items())
            + ".",
            "Starting: " + ", ".join(f"`{name}` {seconds:.2f} s" for name, seconds in starts.items()) + " (median of 7).",
            "Own: anonymous memory. Resident: with the pages of the mapped feature file, which the system takes back when it needs them.",
        ]
        how = f"--shards --side {arguments.side} " if arguments.shards else ""
        command = f"python benchmarks/growth.py {how}--sizes {' '.join(map(str, sizes))}"
        name, question = (
            ("growth-shards", "How cost grows, small images in tar shards") if arguments.shards else ("growth", "How cost grows")
        )
        record(name, question, {"rows": rows, "raw": {"ratios": ratios, "start_s": starts}, "notes": notes, "command": command})
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
