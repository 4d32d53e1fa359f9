"""Which score tells images of no known class best, and how well?

    python benchmarks/ood.py --data-root DIR [--seeds 0 1 2]     Caltech-101, into results.json
    python benchmarks/ood.py --quick                             demo set, two classes held out, one JSON line

efficientnet_lite0 with its classifier trained, as `seewhy train --unfreeze 0` does. Known: the test part. Unknown: the images of ten
classes that were held out of training altogether (others with each seed), and BACKGROUND_Google, which is no class of Caltech-101.
Each score of ood_scores.py is fitted to the training part. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from typing import Any

import numpy as np
from common import record
from ood_scores import SCORES, Known, auroc, fpr_at_tpr

HELD_OUT = 10


def without_classes(images: Any, names: set[str]) -> tuple[Any, Any]:
    """The images of all other classes as an ImageSet of their own, and the places of those left out."""
    inside = np.array([images.classes[label] not in names for label in images.labels])
    kept = np.flatnonzero(inside)
    classes = tuple(name for name in images.classes if name not in names)
    number = {name: n for n, name in enumerate(classes)}

    def of(values: Any) -> Any:
        return values[kept] if isinstance(values, np.ndarray) else tuple(values[i] for i in kept)

    fields = {name: of(getattr(images, name)) for name in ("paths", "hashes", "phashes", "sizes", "grey", "parts", "masks")}
    labels = np.array([number[images.classes[images.labels[i]]] for i in kept])
    return dataclasses.replace(images, **fields, labels=labels, classes=classes), np.flatnonzero(~inside)


def background(data_root: str | None) -> Any:
    """BACKGROUND_Google as an ImageSet of one class."""
    from seewhy.data.image_set import ImageSet
    from seewhy.data.listing import list_caltech101, list_images
    from seewhy.data.verify import check_files

    folder = list_caltech101(data_root).root / "BACKGROUND_Google"
    paths = list_images(folder)
    checked = check_files(paths)
    good = [n for n, found in enumerate(checked) if not found.problem]
    return ImageSet(
        name="BACKGROUND_Google",
        root=folder,
        paths=tuple(paths[n] for n in good),
        labels=np.zeros(len(good), dtype=np.int64),
        classes=("BACKGROUND_Google",),
        hashes=tuple(checked[n].sha256 for n in good),
        phashes=np.array([int(checked[n].phash, 16) for n in good], dtype=np.uint64),
        sizes=np.array([(checked[n].width, checked[n].height) for n in good]),
        grey=np.array([checked[n].grey for n in good]),
        parts=("",) * len(good),
        masks=(None,) * len(good),
    )


def measure(images: Any, others: dict[str, Any], held_out: set[str], seed: int) -> dict[str, dict[str, tuple[float, float]]]:
    """score -> unknown set -> (AUROC, FPR@95)."""
    from seewhy.config import make_config
    from seewhy.curation.split import split_images
    from seewhy.evaluation.evaluate import tail_logits
    from seewhy.models.features import embed
    from seewhy.training.search import fit_candidate

    kept, out = without_classes(images, held_out)
    split = split_images(kept, seed=seed)
    config = make_config(data=kept.name, backbone="efficientnet_lite0", unfreeze=0, seed=seed).resolved()
    context, _ = fit_candidate(kept, split, config)
    vectors = {"train": embed(kept, split.train), "known": embed(kept, split.test), "held-out classes": embed(images, out)}
    vectors |= {name: embed(found) for name, found in others.items()}
    logits = {name: tail_logits(context.cut.tail, found, np.arange(len(found))) for name, found in vectors.items()}
    known = Known(vectors["train"], logits["train"], kept.labels[split.train])
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for name, fit in SCORES.items():
        score = fit(known)
        values = {part: score(vectors[part], logits[part]) for part in vectors if part != "train"}
        inside = values.pop("known")
        found[name] = {part: (auroc(inside, outside), fpr_at_tpr(inside, outside)) for part, outside in values.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--quick", action="store_true", help="the demo set, two of its classes held out")
    arguments = parser.parse_args()
    from seewhy.data.image_set import open_images

    images = open_images("scenes" if arguments.quick else "caltech101", arguments.data_root)
    others = {} if arguments.quick else {"BACKGROUND_Google": background(arguments.data_root)}
    count, seeds = (2, [0]) if arguments.quick else (HELD_OUT, arguments.seeds)
    found = []
    for seed in seeds:
        chosen = np.random.default_rng(seed).choice(images.classes, count, replace=False)
        found.append(measure(images, others, set(chosen.tolist()), seed))
    parts = list(found[0]["energy"])
    means = {name: {part: [statistics.mean(f[name][part][k] for f in found) for k in (0, 1)] for part in parts} for name in found[0]}
    answer = {"name": "ood", "auroc": {name: {part: round(row[part][0], 4) for part in parts} for name, row in means.items()}}
    if not arguments.quick:
        rows = [
            {
                "score": name,
                **{f"AUROC, {part}": f"{row[part][0]:.3f}" for part in parts},
                **{f"FPR@95, {part}": f"{row[part][1]:.3f}" for part in parts},
            }
            for name, row in means.items()
        ]
        notes = [
            f"Means over seeds {' '.join(map(str, seeds))}, each with {count} other classes held out and a split of its own. Known: the "
            "test part of the other classes. BACKGROUND_Google: 467 images, "
            "many of which show things that are classes of Caltech-101.",
            "AUROC: probability that an unknown image scores higher than a known one. FPR@95: share of unknown images that pass where "
            "95% of the known do; lower is better.",
        ]
        command = f"python benchmarks/ood.py --seeds {' '.join(map(str, seeds))}"
        entry = {"rows": rows, "raw": {"seeds": seeds, "found": found}, "notes": notes, "command": command}
        record("ood", "Telling images of no known class", entry, timed=False)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
