"""How many images a second does a training epoch of ResNet-18's last stage take in, the layers below frozen?

    python benchmarks/epoch.py --data-root DIR [--images 960] [--rounds 5]     Caltech-101, into results.json
    python benchmarks/epoch.py --quick                                           demo images, one JSON line

seewhy: an epoch of `seewhy train --unfreeze 1` on cached features (its own record in history.csv, one batch of validation included).
Peer: the same network in the same training step, frozen the usual way (requires_grad False, frozen BatchNorm in eval mode), images
through torchvision transforms and a DataLoader. Limit: the last stage's training step on one batch in memory, nothing else.
Weights are random: the work is the same. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from common import Files, interleave, matrix_limit, rates, ratio, record, usual_transform
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

BATCH, CLASSES = 32, 101
STAGE_GFLOP = 2.5  # of one training step of layer4 and the classifier, an image: forward 0.82, backward twice that


def step(model: nn.Module, optimizer: torch.optim.Optimizer, inputs: Tensor, labels: Tensor) -> None:
    loss = F.cross_entropy(model(inputs), labels, label_smoothing=0.1)
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def naive_epoch(paths: list[Path], labels: Any) -> Any:
    """The peer: everything runs again in every epoch."""
    import timm
    from torchvision import transforms

    model: Any = timm.create_model("resnet18", num_classes=CLASSES)
    model.requires_grad_(False)
    for part in (model.layer4, model.fc):
        part.requires_grad_(True)
    model.eval()
    model.layer4.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    views = transforms.Resize((224, 224)), transforms.RandomHorizontalFlip()
    loader = DataLoader(Files(paths, labels, usual_transform(*views)), BATCH, shuffle=True, num_workers=2)

    def run() -> None:
        for inputs, targets in loader:
            step(model, optimizer, inputs, targets)

    return run


def synthetic_epoch(count: int, name: str = "resnet18", memory_format: torch.memory_format | None = None, compiled: bool = False) -> Any:
    """The limit: the step alone, in the memory format that seewhy would choose or in a given one."""
    from seewhy.models.backbones import create_backbone
    from seewhy.models.features import feature_shape
    from seewhy.models.trunk_tail import split_backbone
    from seewhy.training.module import best_memory_format

    backbone = create_backbone(name, CLASSES, "none")
    cut = split_backbone(backbone, 1)
    assert cut.trunk is not None
    memory_format = memory_format or best_memory_format(cut.tail)
    tail = cut.tail.train().to(memory_format=memory_format)
    optimizer = torch.optim.AdamW([p for p in tail.parameters() if p.requires_grad], lr=1e-3)
    model = cast(nn.Module, torch.compile(tail, dynamic=False)) if compiled else tail
    inputs = torch.randn(BATCH, *feature_shape(cut.trunk, backbone.preprocessing)).relu().contiguous(memory_format=memory_format)
    labels = torch.randint(0, CLASSES, (BATCH,))

    def run() -> None:
        for _ in range(count // BATCH):
            step(model, optimizer, inputs, labels)

    return run


def cached_epochs(images: Any, indices: Any, epochs: int) -> list[float]:
    """Seconds of each epoch of seewhy's fit."""
    from seewhy.config import make_config
    from seewhy.curation.split import split_images
    from seewhy.models.backbones import create_backbone
    from seewhy.models.features import Features, extract_features
    from seewhy.models.trunk_tail import split_backbone
    from seewhy.training.fit import fit
    from seewhy.training.loaders import CachedViews, TrainingContext, TrainingData

    config = make_config(data=images.name, backbone="resnet18", weights="none", epochs=epochs, patience=epochs).resolved()
    backbone = create_backbone("resnet18", CLASSES, "none")
    context = TrainingContext(images, split_images(images), backbone, split_backbone(backbone, 1), config)
    features = extract_features(images, indices, 2, context.cut, backbone.preprocessing)
    train = CachedViews(features, images.labels[indices])
    val = CachedViews(Features(features.store, features.rows[:BATCH, :1], 0), images.labels[indices][:BATCH])
    with tempfile.TemporaryDirectory() as folder:
        fitted = fit(context, TrainingData(train, val, images.labels[indices], CLASSES), Path(folder))
    return [row["seconds"] for row in fitted.history]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--images", type=int, default=960)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="fewer images of the demo set")
    arguments = parser.parse_args()
    count, rounds = (192, 2) if arguments.quick else (arguments.images // BATCH * BATCH, arguments.rounds)
    from seewhy.data.image_set import open_images

    with tempfile.TemporaryDirectory() as cache:
        os.environ["SEEWHY_CACHE"] = cache
        images = open_images("scenes" if arguments.quick else "caltech101", arguments.data_root)
        indices = np.random.default_rng(0).permutation(len(images))[:count]
        paths, labels = [images.paths[i] for i in indices], images.labels[indices]
        naive, synthetic = naive_epoch(paths, labels), synthetic_epoch(count)
        ours: list[float] = []

        def cached() -> None:
            ours.append(cached_epochs(images, indices, 2)[1])  # the second epoch; the first starts everything up

        formats = {
            (name, which): synthetic_epoch(count // 4 // BATCH * BATCH, name, memory_format)
            for name in ("resnet18", "efficientnet_lite0")
            for which, memory_format in (("rows of pixels", torch.contiguous_format), ("channels_last", torch.channels_last))
        }
        if not arguments.quick:
            for name in ("resnet18", "efficientnet_lite0"):
                formats[name, "torch.compile"] = synthetic_epoch(count // 4 // BATCH * BATCH, name, compiled=True)
        candidates = {"peer": naive, "seewhy": cached, "limit": synthetic}
        seconds = interleave({**candidates, **{f"{name}, {which}": run for (name, which), run in formats.items()}}, rounds)
    seconds["seewhy"] = ours[1:]
    speed = rates({name: seconds[name] for name in candidates}, count)
    layouts = rates({name: times for name, times in seconds.items() if name not in candidates}, count // 4 // BATCH * BATCH)
    ratios = {"naive freezing": ratio(seconds, "peer", "seewhy"), "the step alone": ratio(seconds, "limit", "seewhy")}
    answer = {"name": "epoch", "ratios": ratios, "images_per_s": speed | layouts, "n": count, "rounds": rounds}
    if not arguments.quick:
        limit = matrix_limit()
        rows = [
            {"what": "seewhy, cached features", "images/s": speed["seewhy"], "seewhy is ahead": "–"},
            {"what": "naive freezing, DataLoader", "images/s": speed["peer"], "seewhy is ahead": ratios["naive freezing"]},
            {
                "what": "limit: the step alone, one batch in memory",
                "images/s": speed["limit"],
                "seewhy is ahead": ratios["the step alone"],
            },
            *({"what": f"the step alone, {name}", "images/s": speed, "seewhy is ahead": "–"} for name, speed in layouts.items()),
        ]
        notes = [
            f"ResNet-18 at 224 pixels, layer4 and classifier trained, batch {BATCH}, {count} images of Caltech-101 an epoch, {rounds} "
            "interleaved rounds; medians, and the median of the rounds' ratios.",
            f"A large float32 matrix product reached {limit:.0f} GFLOP/s in this run: at most {limit / STAGE_GFLOP:.0f} such training "
            f"steps a second ({STAGE_GFLOP} GFLOP an image).",
            "GPU: not measured.",
        ]
        command = f"python benchmarks/epoch.py --images {count} --rounds {rounds}"
        record(
            "epoch", "A training epoch with frozen layers", {"rows": rows, "raw": {"seconds": seconds}, "notes": notes, "command": command}
        )
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
