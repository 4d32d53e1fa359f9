"""What do images cost that lie in a tar or parquet file, against the same in a folder: files a second, and memory?

    python benchmarks/shards.py --data-root DIR [--images 640] [--rounds 5]     Caltech-101, into results.json
    python benchmarks/shards.py --quick                                            demo images, one JSON line

The same images as files in class folders, as one tar, and as one parquet file in row groups of 100. Reading: the bytes alone, by two
threads, in the order of the listing and in a random one (what training on fresh views does). Features: `extract_features` with an empty
cache, pooled features of efficientnet_lite0, as `seewhy train` computes them. Memory: a process of its own lists a shard of 20,000
images (200 MB; row groups of 100 and of 2,000) and reads all of it. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from common import interleave, measure, rates, ratio, record

LARGE = 20_000  # images of LARGE_BYTES in the shard whose memory is measured
LARGE_BYTES = 10_000
READ_ALL = """
import sys
from pathlib import Path
from seewhy.data import shards
shard, how = Path(sys.argv[1]), sys.argv[2]
import pyarrow.parquet  # part of the base that is taken off
if how == "by name":
    print(sum(len(shards.read_member(shard, member.name)) for member in shards.members(shard)))
elif how == "as a stream":
    with shard.open("rb") as file:
        print(sum(len(data) for _, data, _ in shards.stream(file, shard.suffix[1:])))
else:
    print(0)
"""


def write_tar(file: Path, entries: Iterable[tuple[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as archive:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return file


def write_parquet(file: Path, entries: Iterable[tuple[str, bytes]], rows: int) -> Path:
    """As Hugging Face lays images out, a row group at a time."""
    kinds = pa.schema([("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])), ("label", pa.string())])
    with pq.ParquetWriter(file, kinds) as writer:
        group: list[dict[str, Any]] = []
        for name, content in entries:
            group.append({"image": {"bytes": content, "path": name}, "label": name.split("/")[0]})
            if len(group) == rows:
                writer.write_table(pa.Table.from_pylist(group, kinds))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, kinds))
    return file


def candidates_of(places: dict[str, Path], cache: Path, extract: bool) -> dict[str, Callable[[], Any]]:
    """Reading in order and at random, and features, from each place."""
    from seewhy.core.parallel import map_ordered
    from seewhy.data.decode import read_bytes
    from seewhy.data.image_set import open_images
    from seewhy.models.backbones import create_backbone
    from seewhy.models.features import FeatureSpec, extract_features
    from seewhy.models.trunk_tail import split_backbone

    backbone = create_backbone("efficientnet_lite0", 2)
    cut = split_backbone(backbone, 0)
    candidates: dict[str, Callable[[], Any]] = {}
    for kind, place in places.items():
        images = open_images(str(place), skip_bad=True)
        shuffled = [images.paths[i] for i in np.random.default_rng(0).permutation(len(images))]
        few = shuffled[: max(1, len(shuffled) // 10)]  # a tenth: from parquet it is slow

        def read(paths: Any) -> Callable[[], Any]:
            return lambda: sum(len(data) for data in map_ordered(read_bytes, paths, 2))

        def features(images: Any = images) -> None:
            shutil.rmtree(cache / "features", ignore_errors=True)
            extract_features(images, np.arange(len(images)), 1, cut, backbone.preprocessing, FeatureSpec("onnx"))

        candidates |= {f"{kind} | reading, in order": read(images.paths), f"{kind} | reading, a random tenth": read(few)}
        if extract:
            candidates[f"{kind} | features"] = features
    return candidates


def memory_of(folder: Path, count: int) -> list[dict[str, Any]]:
    """A row a shard and a way to read it: the anonymous memory of a process beyond that of one that only starts, in MB."""
    source = np.random.default_rng(0)

    def entries() -> Iterable[tuple[str, bytes]]:
        return ((f"{n % 10}/{n:06d}.jpg", source.bytes(LARGE_BYTES)) for n in range(count))

    shards = {
        "tar": write_tar(folder / "large.tar", entries()),
        "parquet, groups of 100": write_parquet(folder / "large100.parquet", entries(), 100),
        "parquet, groups of 2,000": write_parquet(folder / "large2000.parquet", entries(), 2000),
    }
    rows = []
    for what, shard in shards.items():
        found = {how: measure([sys.executable, "-c", READ_ALL, str(shard), how]) for how in ("not at all", "by name", "as a stream")}
        for how in ("by name", "as a stream"):
            if int(found[how]["answer"]) != count * LARGE_BYTES:
                raise SystemExit(f"{shard}: {found[how]['answer']} bytes read {how}")
            megabytes = round(1000 * (found[how]["own_gb"] - found["not at all"]["own_gb"]))
            rows.append({"from": what, "what": f"{count * LARGE_BYTES / 1e6:.0f} MB {how}", "MB": megabytes})
        shard.unlink()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--images", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer images of the demo set, and a smaller shard")
    arguments = parser.parse_args()
    count, rounds, large = (64, 2, 2000) if arguments.quick else (arguments.images, arguments.rounds, LARGE)
    from seewhy.data.listing import list_data

    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.environ["SEEWHY_CACHE"] = str(work / "cache")
        listing = list_data("scenes" if arguments.quick else "caltech101", arguments.data_root)
        chosen = sorted(np.random.default_rng(0).permutation(len(listing.paths))[:count])
        entries = [(f"{listing.class_names[i]}/{listing.paths[i].name}", listing.paths[i].read_bytes()) for i in chosen]
        for name, content in entries:
            (work / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
            (work / "folder" / name).write_bytes(content)
        places = {
            "folder": work / "folder",
            "tar": write_tar(work / "all.tar", entries),
            "parquet": write_parquet(work / "all.parquet", entries, 100),
        }
        seconds = interleave(candidates_of(places, work / "cache", extract=True), rounds)
        memory = memory_of(work, large)
    speed: dict[str, float] = {}
    ratios: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for key in seconds:
        kind, what = key.split(" | ")
        amount = max(1, count // 10) if "tenth" in what else count
        speed |= rates({key: seconds[key]}, amount)
        over = ratio(seconds, f"folder | {what}", key) if kind != "folder" else "–"
        if isinstance(over, float):
            ratios[f"{kind} over folder, {what}"] = over
        rows.append({"from": kind, "what": what, "images/s": speed[key], "over the folder": over})
    rows += [{"from": row["from"], "what": row["what"], "MB more than at the start": row["MB"]} for row in memory]
    columns = ("from", "what", "images/s", "over the folder", "MB more than at the start")
    rows = [{column: row.get(column, "") for column in columns} for row in rows]
    answer = {"name": "shards", "ratios": ratios, "images_per_s": speed, "memory_mb": memory, "n": count, "rounds": rounds}
    if not arguments.quick:
        notes = [
            f"{count} JPEG files of Caltech-101, {rounds} interleaved rounds; medians, and the median of the rounds' ratios. The files lie "
            "in the system's cache: what is compared is the work, not the disk. The parquet file has "
            f"{-(-count // 100)} row groups, two of which are held: the larger a file, the slower it is in a random order.",
            f"Memory: anonymous memory at its largest, seen 50 times a second; {large:,} images of {LARGE_BYTES:,} random bytes in one "
            "shard. The list of names is part of it.",
        ]
        command = f"python benchmarks/shards.py --images {count} --rounds {rounds}"
        raw = {"ratios": ratios, "memory": memory}
        record("shards", "Images in shards", {"rows": rows, "raw": raw, "notes": notes, "command": command})
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
