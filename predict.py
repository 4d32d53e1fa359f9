"""The classic way to use what train.py made: python predict.py a.jpg folder/ ..."""

from __future__ import annotations

import sys
from pathlib import Path

import seewhy
from seewhy.cli.guard import run_guarded


def main() -> None:
    pointer = Path("models/run.txt")
    if not pointer.is_file():
        raise seewhy.RunError(f"{pointer}: no trained model here; run `python train.py` first")
    if len(sys.argv) < 2:
        raise seewhy.DataError("name the images: python predict.py a.jpg folder/")
    print(seewhy.load(pointer.read_text().strip()).predict(sys.argv[1:]).table(top_k=3).to_string(index=False))


if __name__ == "__main__":
    sys.exit(run_guarded(main))
