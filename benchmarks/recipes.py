"""Which recipe is best on validation? A variant of `seewhy train caltech101`, tried on cached features; no test image is looked at.

    python benchmarks/recipes.py --data-root DIR --seeds 0 1 --set backbone=efficientnet_lite0 unfreeze=1 ema_decay=0.99
    python benchmarks/recipes.py --range-test ...             the learning rate that Lightning's range test suggests, then as above
    python benchmarks/recipes.py --quick                      two variants on the demo set, one JSON line

Each call adds its row to results.json, also where the variant turned out worse. The test part of each seed is set aside (20% of each
class, the same images as in caltech101.py) and never read. Of the rest, a quarter (20% of all) validates, twice the usual share,
for steadier choices; so what trains is less than in a real run, and accuracies are lower. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from typing import Any

from common import RESULTS, record

from seewhy.config import make_config, parse_settings
from seewhy.curation.split import split_images
from seewhy.data.image_set import ImageSet, open_images
from seewhy.evaluation.evaluate import evaluate_part
from seewhy.training.loaders import TrainingContext, make_loader, training_data
from seewhy.training.module import FitModule
from seewhy.training.search import fit_candidate


def trial(images: ImageSet, options: dict[str, Any], seed: int) -> dict[str, float]:
    """Trains one variant; validation accuracy of the plain view, and averaged with the mirrored one."""
    config = make_config(data=images.name, seed=seed, val_fraction=0.2, **options).resolved()
    split = split_images(images, config.protocol, seed, config.val_fraction, config.test_fraction)
    context, fitted = fit_candidate(images, split, config)
    ways = [config.model_copy(update={"tta_flip": flip}) for flip in (False, True)]
    plain, both = (evaluate_part(images, split.val, "val", context.backbone, context.cut, way).metrics["accuracy"] for way in ways)
    return {
        "val_accuracy": plain,
        "val_accuracy_flip": both,
        "val_loss": min(row["val_loss"] for row in fitted.history),
        "n_val": len(split.val),
        "fit_s": fitted.seconds,
    }


def suggested_lr(images: ImageSet, options: dict[str, Any], seed: int) -> float:
    """What Lightning's learning-rate range test (Smith 2017, arXiv:1506.01186) suggests: where the loss falls fastest, of 200 rates."""
    from lightning.pytorch import Trainer
    from lightning.pytorch.tuner.tuning import Tuner

    config = make_config(data=images.name, seed=seed, val_fraction=0.2, **options).resolved()
    split = split_images(images, config.protocol, seed, config.val_fraction, config.test_fraction)
    context = TrainingContext.create(images, split, config)
    train_data = training_data(context).train
    loader = make_loader(train_data, int(config.batch_size or 32), config.seed, config.workers)
    module = FitModule(context.backbone, context.cut, config, len(images.classes), None, len(loader))
    module.lr = 0.0  # type: ignore[assignment]  # the tuner asks for the attribute; its rates go to the optimiser directly
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="auto", devices=1, logger=False, default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False
        )
        found = Tuner(trainer).lr_find(
            module, train_dataloaders=loader, min_lr=1e-5, max_lr=0.1, num_training=200, attr_name="lr", update_attr=False
        )
    suggestion = found.suggestion() if found else None
    if suggestion is None:
        raise SystemExit("the range test suggests no learning rate")
    return float(f"{suggestion:.2g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--weights", help="weights file for the backbone, where timm's cannot be fetched")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="*", default=[], dest="settings", metavar="NAME=VALUE", help="options of `seewhy train`")
    parser.add_argument("--range-test", action="store_true", help="take the learning rate from a range test on the first seed")
    parser.add_argument("--quick", action="store_true", help="two variants on the demo set")
    arguments = parser.parse_args()
    if arguments.quick:
        images = open_images("scenes")
        variants: dict[str, dict[str, Any]] = {"default": {}, "ema_decay=0.9": {"ema_decay": 0.9}}
        common = {"backbone": "efficientnet_lite0", "unfreeze": 0}
        found = {name: trial(images, {**common, **options}, 0) for name, options in variants.items()}
        answer = {"name": "recipes", "val_accuracy": {name: row["val_accuracy"] for name, row in found.items()}, "n": 96}
        print(json.dumps(answer))
        return
    options = {"backbone": "resnet18", "unfreeze": 1, **parse_settings(arguments.settings)}
    images = open_images("caltech101", arguments.data_root)
    weights = {"weights": arguments.weights} if arguments.weights else {}
    if arguments.range_test:
        options["lr"] = suggested_lr(images, options | weights, arguments.seeds[0])
    trials = [trial(images, options | weights, seed) for seed in arguments.seeds]
    keep(options, arguments.seeds, trials, "(range test's)" if arguments.range_test else "")


def keep(options: dict[str, Any], seeds: list[int], trials: list[dict[str, float]], remark: str = "") -> None:
    """Adds the row of one variant to results.json, in place of an older one of the same variant."""
    shown = {name: value for name, value in options.items() if name not in ("backbone", "unfreeze")}

    def mean(name: str, factor: float = 100, digits: int = 2) -> float:
        return round(factor * statistics.mean(t[name] for t in trials), digits)

    row = {
        "backbone": options["backbone"],
        "unfreeze": options["unfreeze"],
        "options": " ".join(filter(None, [", ".join(f"{name} {value}" for name, value in shown.items()) or "defaults", remark])),
        "val accuracy %": mean("val_accuracy"),
        "with tta_flip %": mean("val_accuracy_flip"),
        "val loss": mean("val_loss", 1, 4),
        "seeds": " ".join(map(str, seeds)),
        "val images": sum(int(t["n_val"]) for t in trials),
        "fit s": mean("fit_s", 1, 0),
    }
    entry = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}).get("recipes", {"rows": []})
    key = list(row)[:3]
    rows = [*(old for old in entry["rows"] if [old[k] for k in key] != [row[k] for k in key]), row]
    notes = [
        "Validation only. 60% of each class trains, 20% validates, 20% is set aside unseen. One standard error of an accuracy with 1,736 "
        "images is about 0.45 points; label smoothing enters the loss.",
        "Each row is a call of its own. Seconds of the fit are no benchmark: other work ran beside some of them.",
    ]
    command = "python benchmarks/recipes.py --seeds SEEDS --set backbone=BACKBONE unfreeze=UNFREEZE OPTIONS"
    record("recipes", "Recipes tried, by validation", {"rows": rows, "notes": notes, "command": command}, timed=False)
    print(json.dumps(row), file=sys.stderr)


if __name__ == "__main__":
    main()
