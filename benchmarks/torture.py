"""What do 12,000 spoiled image files do to decoding, training and predicting?

    python benchmarks/torture.py [--files 12000] [--seed 0]     into results.json
    python benchmarks/torture.py --quick                        600 files, decoding alone, one JSON line

Files of JPEG, PNG, GIF, BMP, WebP and TIFF in their variants are spoiled by flipped bits, cut ends, swapped and repeated segments, wild
headers and large numbers in them, and parts of another file. Survived means: an image, or a line that says why not; never another
exception, a hang or a crash of the process. The largest images that are allowed are decoded too, one of each kind, for their memory.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from common import measure, record, seewhy
from PIL import Image

SIZE = (96, 80)
SUFFIX = {"JPEG": "jpg", "PNG": "png", "GIF": "gif", "BMP": "bmp", "WEBP": "webp", "TIFF": "tif"}
NUMBERS = [b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x00" * 4, b"\xff\xff", b"\x00\x01\x00\x00", b"\x80\x00\x00\x00"]


def seeds() -> list[tuple[str, bytes]]:
    """(format, content) of good files, variants that decoders treat differently."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
    exif = small.getexif()
    exif[0x112] = 6
    frames: dict[str, Any] = {"save_all": True, "append_images": [small.rotate(90), small.rotate(180)]}
    deep = Image.fromarray(np.asarray(small.convert("L")).astype(np.uint16) * 257)
    variants: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("JPEG", small, {}),
        ("JPEG", small, {"progressive": True, "quality": 95, "subsampling": 0}),
        ("JPEG", small, {"exif": exif, "comment": b"x" * 99}),
        ("JPEG", small.convert("L"), {}),
        ("JPEG", small.convert("CMYK"), {}),
        ("PNG", small, {}),
        ("PNG", small.convert("RGBA"), {"dpi": (72, 72)}),
        ("PNG", small.convert("P"), {"transparency": 3}),
        ("PNG", deep, {}),
        ("PNG", small.convert("1"), {}),
        ("PNG", small, frames),
        ("GIF", small, {}),
        ("GIF", small, frames),
        ("BMP", small, {}),
        ("BMP", small.convert("P"), {}),
        ("WEBP", small, {}),
        ("WEBP", small.convert("RGBA"), {"lossless": True}),
        ("WEBP", small, frames),
        ("TIFF", small, {}),
        ("TIFF", small, {"compression": "tiff_lzw"}),
        ("TIFF", small.convert("RGBA"), {"compression": "tiff_adobe_deflate"}),
        ("TIFF", small, {"compression": "jpeg"}),
        ("TIFF", deep, {}),
        ("TIFF", small.convert("1"), {"compression": "group4"}),
    ]
    found = []
    for kind, image, options in variants:
        file = io.BytesIO()
        image.save(file, kind, **options)
        found.append((kind, file.getvalue()))
    return found


def spoil(data: bytes, other: bytes, chance: random.Random) -> bytes:
    """One of the ways to spoil a file, one to three times."""
    for _ in range(chance.choice((1, 1, 2, 3))):
        content = bytearray(data)
        n = len(content)
        how = chance.randrange(7)
        a, b, c = sorted(chance.randrange(n) for _ in range(3))
        if how == 0:  # bits
            for _ in range(chance.choice((1, 2, 8, 64))):
                content[chance.randrange(n)] ^= 1 << chance.randrange(8)
        elif how == 1:  # the end is missing
            content = content[: max(1, a)]
        elif how == 2:  # two segments change places
            content = content[:a] + content[b:c] + content[a:b] + content[c:]
        elif how == 3:  # a segment again
            content = content[:b] + content[a:b] + content[b:]
        elif how == 4:  # a wild header
            for _ in range(chance.choice((1, 4, 16))):
                content[chance.randrange(min(n, 64))] = chance.randrange(256)
        elif how == 5:  # large numbers in the header
            number = chance.choice(NUMBERS)
            place = chance.randrange(min(n, 200))
            content[place : place + len(number)] = number
        else:  # the rest is another file's
            content = content[:a] + other[chance.randrange(len(other)) :]
        data = bytes(content) or b"\0"
    return data


def spoiled(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """(name, content) of `count` files, all formats and variants in turn."""
    chance, good = random.Random(seed), seeds()
    for n in range(count):
        kind, data = good[n % len(good)]
        yield f"{n:06d}.{SUFFIX[kind]}", spoil(data, chance.choice(good)[1], chance)


# ---------------------------------------------------------------- decoding


def decode_all(count: int, seed: int) -> dict[str, Any]:
    """In this process: how many were images, were refused and why, the slowest, and the most memory that was added."""
    from seewhy.data.decode import decode

    reasons: Counter[str] = Counter()
    slowest, before = 0.0, resident_gb("VmRSS")
    for name, data in spoiled(count, seed):
        began = time.perf_counter()
        try:
            image = decode(data)
            assert image.mode == "RGB", name
            reasons["decoded"] += 1
        except ValueError as error:
            reasons[str(error).split(" (")[0] if "pixels" not in str(error) else "too many or too few pixels"] += 1
        slowest = max(slowest, time.perf_counter() - began)
    return {"reasons": dict(reasons), "slowest_s": round(slowest, 3), "peak_gb": round(resident_gb("VmHWM") - before, 3)}


def resident_gb(name: str) -> float:
    """VmRSS or VmHWM, the largest so far, of this process; getrusage's would begin with that of the process it was forked from."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 2**20


LARGEST: dict[
    str, tuple[str, str, dict[str, Any]]
] = {  # kind -> how an image of the most pixels that are allowed is made: mode, format, options
    "JPEG": ("RGB", "JPEG", {}),
    "JPEG, progressive": ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    "JPEG, turned": ("RGB", "JPEG", {"turned": True}),
    "PNG, transparent": ("RGBA", "PNG", {"compress_level": 1}),
    "PNG, palette": ("P", "PNG", {"transparency": 0}),
    "PNG, 16 bits": ("I;16", "PNG", {"compress_level": 1}),
    "WebP, transparent": ("RGBA", "WEBP", {"lossless": True, "method": 0}),
    "GIF": ("P", "GIF", {}),
    "TIFF, CMYK": ("CMYK", "TIFF", {"compression": "tiff_lzw"}),
    "TIFF, 32 bits": ("I", "TIFF", {"compression": "tiff_lzw"}),
}


def largest(kind: str, place: Path) -> None:
    from seewhy.data.decode import FORMAT_PIXELS, MAX_PIXELS

    mode, form, options = LARGEST[kind]
    width = 10_000
    image = Image.new(mode, (width, FORMAT_PIXELS.get(form, MAX_PIXELS) // width))
    options = dict(options)
    if options.pop("turned", False):
        options["exif"] = image.getexif()
        options["exif"][0x112] = 6
    image.save(place, form, **options)


def check_one(place: Path) -> dict[str, Any]:
    from seewhy.data.verify import check_file

    began, before = time.perf_counter(), resident_gb("VmRSS")
    found = check_file(place)
    assert not found.problem, found
    return {"seconds": round(time.perf_counter() - began, 2), "peak_gb": round(resident_gb("VmHWM") - before, 3)}


def own_process(*arguments: str) -> Any:
    """This file again, as a process of its own; what it printed."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True, check=False, timeout=3600)
    if done.returncode != 0:
        raise SystemExit(f"{arguments} ended with {done.returncode}: {done.stderr[-1000:]}")
    return json.loads(done.stdout.splitlines()[-1])


# ---------------------------------------------------------------- training and predicting


def train_and_predict(count: int, seed: int, place: Path) -> list[dict[str, Any]]:
    """Rows of training on the demo set with the spoiled files among its classes, and of predicting all of them."""
    from seewhy.data.synthetic import draw_scenes

    demo = draw_scenes(place / "scenes") / "images"
    classes = sorted(demo.iterdir())
    for n, (name, data) in enumerate(spoiled(count, seed)):
        (classes[n % len(classes)] / f"spoiled-{name}").write_bytes(data)
    environment = {"SEEWHY_CACHE": str(place / "cache")}
    options = ["--skip-bad", "--backbone", "efficientnet_lite0", "--unfreeze", "0", "--group-by", "exact", "--json"]
    clean = measure(seewhy("train", "scenes", *options, "--out", str(place / "clean")), {"SEEWHY_CACHE": str(place / "other")})
    trained = measure(seewhy("train", str(demo), *options, "--out", str(place / "run")), environment)
    used = json.loads((place / "run" / "run.json").read_text())["data"]
    table = place / "table.csv"
    predicted = measure(seewhy("predict", str(place / "run"), str(demo), "--skip-bad", "--out", str(table)), environment)
    total = count + 480
    return [
        {
            "what": "seewhy train --skip-bad",
            "files": total,
            "used": used["images"],
            "refused": len(used["bad"]),
            "slowest s": "–",
            "peak GB": f"{trained['own_gb']} (clean: {clean['own_gb']})",
        },
        {
            "what": "seewhy predict --skip-bad",
            "files": total,
            "used": len(table.read_text().splitlines()) - 1,
            "refused": total - len(table.read_text().splitlines()) + 1,
            "slowest s": "–",
            "peak GB": predicted["own_gb"],
        },
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decode", action="store_true", help="decode them in this process (how the benchmark starts it)")
    parser.add_argument("--check", type=Path, help="check this file in this process (how the benchmark starts it)")
    parser.add_argument("--quick", action="store_true", help="600 files, decoding alone")
    arguments = parser.parse_args()
    if arguments.check:
        print(json.dumps(check_one(arguments.check)))
        return
    count = 600 if arguments.quick else arguments.files
    if arguments.decode or arguments.quick:
        print(json.dumps({"name": "torture", "files": count, **decode_all(count, arguments.seed)}))
        return
    found = own_process("--decode", "--files", str(count), "--seed", str(arguments.seed))
    good = found["reasons"].pop("decoded")
    rows = [
        {
            "what": "decode",
            "files": count,
            "used": good,
            "refused": sum(found["reasons"].values()),
            "slowest s": found["slowest_s"],
            "peak GB": found["peak_gb"],
        }
    ]
    with tempfile.TemporaryDirectory() as folder:
        for kind in LARGEST:
            place = Path(folder) / "large"
            largest(kind, place)
            checked = own_process("--check", str(place))
            rows.append(
                {
                    "what": f"the largest {kind}",
                    "files": 1,
                    "used": 1,
                    "refused": 0,
                    "slowest s": checked["seconds"],
                    "peak GB": checked["peak_gb"],
                }
            )
            os.unlink(place)
        rows += train_and_predict(count, arguments.seed, Path(folder))
    reasons = ", ".join(f"{reason} {n:,}" for reason, n in sorted(found["reasons"].items(), key=lambda item: -item[1]))
    notes = [
        f"Why files were refused by decoding: {reasons}.",
        "Memory of decoding and checking: the largest resident set, less that before. Of training and predicting: the largest anonymous "
        "part of the whole process, PyTorch included.",
    ]
    command = f"python benchmarks/torture.py --files {count} --seed {arguments.seed}"
    record("torture", "Spoiled image files", {"rows": rows, "notes": notes, "command": command}, timed=False)
    print(json.dumps({"name": "torture", "files": count, "peak_gb": max(row["peak GB"] for row in rows[: 1 + len(LARGEST)])}))


if __name__ == "__main__":
    main()
