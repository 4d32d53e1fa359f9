"""How long does each library need from Caltech-101 on disk to 92.5% validation accuracy, on the same split?

    python benchmarks/time_to_accuracy.py --data-root DIR --weights FILE [--only NAME] [--limit-s 1500]     into results.json
    python benchmarks/time_to_accuracy.py --plain-epochs 20 ...        how many epochs the plain recipe needs, into results.json
    python benchmarks/time_to_accuracy.py --quick                      demo images, 80%, one JSON line

Candidates, all from the same ImageNet weights of ResNet-18 where not said otherwise, batch 32, seed 0, 70% of each class to train on:
seewhy frozen and with its last stage trained (also with efficientnet_lite0), cold, process start included up to the epoch that reaches the
goal; a Lightning module with the same frozen backbone; timm frozen up to the last stage; fastai's `vision_learner(...).fine_tune`;
and the plain recipe of tutorials (everything trained, Adam 1e-3, PIL transforms, DataLoader with 2 workers).
Each peer validates after every epoch and stops at the goal or at --limit-s; one that did not arrive is listed with what it had reached.
The plain recipe is timed by the step, and its epochs to the goal are counted once by --plain-epochs, beside other work if need be: its
row is their product. The figures stand in RESULTS.md.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, Files, measure, record, seewhy, usual_transform
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

GOAL = 0.925
BATCH = 32
SEEWHY = {
    "seewhy efficientnet_lite0, frozen": ["--backbone", "efficientnet_lite0", "--unfreeze", "0"],
    "seewhy resnet18, frozen": ["--backbone", "resnet18", "--unfreeze", "0"],
    "seewhy efficientnet_lite0, last stage trained": ["--backbone", "efficientnet_lite0", "--unfreeze", "1"],
    "seewhy resnet18, last stage trained": ["--backbone", "resnet18", "--unfreeze", "1"],
}
Reached = list[tuple[float, float]]  # (seconds since the start, validation accuracy) after each epoch


def since_start() -> float:
    """Seconds since the parent started this process."""
    return time.time() - float(os.environ["STARTED"])


def network(weights: str | None, classes: int) -> Any:
    """timm's ResNet-18 with the given weights and a new classifier; without weights, lite0 with those of its package."""
    import timm

    from seewhy.models.backbones import create_backbone
    from seewhy.models.weights import load_state, read_weights

    if weights is None:
        return create_backbone("efficientnet_lite0", classes).model
    model = timm.create_model("resnet18", num_classes=classes)
    load_state(model, read_weights(Path(weights)), weights)
    return model


def loaders(images: Any, split: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training images in random views, validation images as they are."""
    from torchvision import transforms

    random = transforms.RandomResizedCrop(224, scale=(0.35, 1.0)), transforms.RandomHorizontalFlip()
    train, val = (
        Files([images.paths[i] for i in part], images.labels[part], usual_transform(*views))
        for part, views in ((split.train, random), (split.val, (transforms.Resize((224, 224)),)))
    )
    return DataLoader(train, BATCH, shuffle=True, num_workers=2), DataLoader(val, BATCH, num_workers=2)


@torch.inference_mode()
def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    model.eval()
    right = [(model(inputs).argmax(dim=1) == labels).float() for inputs, labels in loader]
    return float(torch.cat(right).mean())


def loop(model: Any, trained: list[nn.Module], lr: float, images: Any, split: Any, limit_s: float) -> Iterator[tuple[float, float]]:
    """A plain training loop over the modules in `trained`; frozen BatchNorm stays in eval mode."""
    train, val = loaders(images, split)
    model.requires_grad_(False)
    for module in trained:
        module.requires_grad_(True)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    while since_start() < limit_s:
        model.eval()
        for module in trained:
            module.train()
        for inputs, labels in train:
            loss = F.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
        yield since_start(), accuracy(model, val)


def timm_last_stage(weights: str | None, images: Any, split: Any, goal: float, limit_s: float) -> Reached:
    model = network(weights, len(images.classes))
    return until(loop(model, [model.layer4, model.fc], 1e-3, images, split, limit_s), goal)


def lightning_frozen(weights: str | None, images: Any, split: Any, goal: float, limit_s: float) -> Reached:
    """A Lightning module with a frozen backbone and a trained head, run by its Trainer."""
    from lightning.pytorch import Callback, LightningModule, Trainer

    model = network(weights, len(images.classes))
    model.requires_grad_(False).eval()
    head = model.get_classifier().requires_grad_(True)
    reached: Reached = []

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Any, index: int) -> Tensor:
            model.eval()
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(head.parameters(), lr=1e-3)

    train, val = loaders(images, split)

    class RequestMiddleware(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            reached.append((since_start(), accuracy(model, val)))
            trainer.should_stop = reached[-1][1] >= goal or reached[-1][0] > limit_s

    trainer = Trainer(max_epochs=100, logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[RequestMiddleware()])
    trainer.fit(Module(), train)
    return reached


def fastai_fine_tune(weights: str | None, images: Any, split: Any, goal: float, limit_s: float) -> Reached:
    """One frozen epoch, then one with everything trained: the least that fine_tune does."""
    from fastai.vision.all import (
        CategoryBlock,
        DataBlock,
        ImageBlock,
        IndexSplitter,
        Normalize,
        Resize,
        accuracy,
        aug_transforms,
        imagenet_stats,
        vision_learner,
    )
    from torchvision.models import resnet18

    chosen = np.concatenate([split.train, split.val])
    block = DataBlock(
        blocks=(ImageBlock, CategoryBlock),
        get_x=lambda i: images.paths[i],
        get_y=lambda i: images.classes[images.labels[i]],
        splitter=IndexSplitter(range(len(split.train), len(chosen))),
        item_tfms=Resize(224, method="squish"),
        batch_tfms=[*aug_transforms(size=224), Normalize.from_stats(*imagenet_stats)],
    )
    data = block.dataloaders(chosen.tolist(), bs=BATCH, num_workers=0)
    learner = vision_learner(data, resnet18, metrics=accuracy, pretrained=False)
    if weights:
        body = resnet18()
        from seewhy.models.weights import read_weights

        body.load_state_dict(read_weights(Path(weights)), strict=False)
        theirs = [module.state_dict() for module in list(body.children())[:-2]]
        for mine, state in zip(learner.model[0], theirs, strict=True):
            mine.load_state_dict(state)
    learner.freeze()
    reached: Reached = []
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(1, freeze_epochs=1)
    reached.append((since_start(), float(learner.validate()[1])))
    return reached


def plain_epoch(weights: str | None, images: Any, split: Any) -> float:
    """Seconds of one epoch of the plain recipe, from 30 steps after 5 to warm up."""
    model = network(weights, len(images.classes)).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    train, _ = loaders(images, split)
    times = []
    mark = time.perf_counter()
    for n, (inputs, labels) in enumerate(train):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        times.append(time.perf_counter() - mark)
        mark = time.perf_counter()
        if n == 34:
            break
    return float(np.median(times[5:])) * len(train)


def plain_accuracies(weights: str | None, images: Any, split: Any, goal: float, epochs: int) -> Iterator[list[float]]:
    """Validation accuracies of the plain recipe so far, after each of its epochs, up to the goal or to `epochs` of them."""
    torch.manual_seed(0)
    model = network(weights, len(images.classes))
    os.environ.setdefault("STARTED", str(time.time()))
    found: list[float] = []
    for _, reached in loop(model, [model], 1e-3, images, split, float("inf")):
        found.append(reached)
        print(f"  epoch {len(found)}: {reached:.1%}", file=sys.stderr, flush=True)
        yield found
        if reached >= goal or len(found) == epochs:
            return


def until(epochs: Iterator[tuple[float, float]], goal: float) -> Reached:
    """Epochs up to the first that reaches the goal."""
    reached: Reached = []
    for pair in epochs:
        reached.append(pair)
        print(f"  {pair[0]:.0f} s: {pair[1]:.1%}", file=sys.stderr)
        if pair[1] >= goal:
            break
    return reached


def seewhy_cold(options: list[str], data: str, extra: list[str], goal: float) -> dict[str, Any]:
    """A whole `seewhy train` from an empty cache: seconds to the end of the first epoch at the goal, to the end, test accuracy."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "run"
        run = measure(seewhy("train", data, *options, *extra, "--out", str(out), "--json"), {"SEEWHY_CACHE": str(Path(place) / "cache")})
        with (out / "history.csv").open() as file:
            rows = list(csv.DictReader(file))
    stages = run["answer"]["seconds"]
    start = run["seconds"] - stages["total"]  # of the process, up to its first stage (its end included)
    fit_start = stages["fit"] - sum(float(row["seconds"]) for row in rows)
    passed = [n for n, row in enumerate(rows) if float(row["val_accuracy"]) >= goal]
    epochs = rows[: passed[0] + 1] if passed else rows
    reach = start + stages["images"] + stages["features"] + fit_start + sum(float(row["seconds"]) for row in epochs)
    return {
        "reach_s": round(reach, 1) if passed else None,
        "total_s": run["seconds"],
        "epochs": len(epochs),
        "val_accuracy": run["answer"]["metrics"]["val"]["accuracy"],
        "test_accuracy": run["answer"]["metrics"]["test"]["accuracy"],
    }


PEERS: dict[str, Callable[..., Reached]] = {
    "Lightning module, frozen backbone": lightning_frozen,
    "timm, frozen up to the last stage": timm_last_stage,
    "fastai fine_tune(1)": fastai_fine_tune,
}


def peer_cold(name: str, arguments: list[str]) -> Reached:
    """A peer in a process of its own, its clock started with the process, as seewhy's is."""
    command = [sys.executable, __file__, "--peer", name, *arguments]
    reached: Reached = measure(command, {"STARTED": str(time.time())})["answer"]
    return reached


PLAIN = "plain recipe, everything trained"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--weights", help="weights file for resnet18, where timm's cannot be fetched")
    parser.add_argument("--only", default="", help="only candidates whose name holds this; the others keep their results")
    parser.add_argument("--limit-s", type=float, default=1500.0, help="seconds after which a peer starts no further epoch")
    parser.add_argument("--plain-epochs", type=int, help="count the epochs of the plain recipe to the goal, at most so many; nothing else")
    parser.add_argument("--peer", choices=list(PEERS), help="run this peer alone, in this process (how the benchmark starts it)")
    parser.add_argument("--data", default="caltech101", help="what --peer trains on")
    parser.add_argument("--goal", type=float, default=GOAL, help="validation accuracy at which --peer stops")
    parser.add_argument("--quick", action="store_true", help="demo images and 80%%: seewhy frozen against a Lightning module")
    arguments = parser.parse_args()
    from seewhy.curation.split import split_images
    from seewhy.data.image_set import open_images
    from seewhy.models.saved_run import hardware

    extra = [
        word for flag in ("data_root", "weights") if (value := getattr(arguments, flag)) for word in (f"--{flag.replace('_', '-')}", value)
    ]
    goal = 0.8 if arguments.quick else GOAL
    if arguments.peer:
        images = open_images(arguments.data, arguments.data_root)
        reached = PEERS[arguments.peer](arguments.weights, images, split_images(images, seed=0), arguments.goal, arguments.limit_s)
        print(json.dumps(reached))
        return
    if arguments.quick:
        data = str(open_images("scenes").paths[0].parent.parent)  # drawn already, for both
        ours = seewhy_cold(SEEWHY["seewhy efficientnet_lite0, frozen"], data, [], goal)
        peer = peer_cold("Lightning module, frozen backbone", ["--data", data, "--goal", str(goal), "--limit-s", "20"])
        ratios = {"Lightning module, same frozen backbone": round(peer[-1][0] / ours["reach_s"], 2)}
        print(json.dumps({"name": "time_to_accuracy", "ratios": ratios, "seewhy": ours, "peer": peer}))
        return
    entry = (json.loads(RESULTS.read_text()) if RESULTS.exists() else {}).get("time_to_accuracy")
    raw: dict[str, Any] = entry["raw"] if entry and entry["hardware"]["cpu"] == hardware()["cpu"] else {}
    if arguments.plain_epochs:
        images = open_images("caltech101", arguments.data_root)
        for accuracies in plain_accuracies(arguments.weights, images, split_images(images, seed=0), GOAL, arguments.plain_epochs):
            # Read anew: another process may have kept a row meanwhile.
            raw = json.loads(RESULTS.read_text())["time_to_accuracy"]["raw"]
            raw.setdefault(PLAIN, {})["accuracies"] = accuracies
            keep(raw)
        return
    for name, options in SEEWHY.items():
        if arguments.only in name:
            raw[name] = seewhy_cold(options, "caltech101", extra if "resnet18" in name else extra[: 2 * bool(arguments.data_root)], GOAL)
            keep(raw)
    for name in PEERS:
        if arguments.only in name:
            reached = peer_cold(name, [*extra, "--goal", str(GOAL), "--limit-s", str(arguments.limit_s)])
            seconds, best = reached[-1]
            raw[name] = {"reach_s": round(seconds, 1) if best >= GOAL else None, "total_s": round(seconds, 1), "epochs": len(reached)}
            raw[name]["val_accuracy"] = best
            keep(raw)
    if arguments.only in PLAIN:
        images = open_images("caltech101", arguments.data_root)
        split = split_images(images, seed=0)
        raw.setdefault(PLAIN, {})["epoch_s"] = round(plain_epoch(arguments.weights, images, split), 1)
        keep(raw)


def plain_row(found: dict[str, Any]) -> dict[str, Any]:
    """Seconds of an epoch x epochs to the goal; one epoch is the least it needs where they were not counted."""
    accuracies = found.get("accuracies", [])
    epochs = max(1, len(accuracies))
    seconds = round(epochs * found.get("epoch_s", float("nan")), 1)
    best = {"val_accuracy": max(accuracies)} if accuracies else {}
    return {"reach_s": seconds if best and best["val_accuracy"] >= GOAL else None, "total_s": seconds, "epochs": epochs, **best}


def keep(raw: dict[str, Any]) -> None:
    """Renders what is measured so far; each candidate is on disk as soon as it has been timed."""
    base = {kind: raw.get(f"seewhy resnet18, {kind}", {}).get("reach_s") for kind in ("frozen", "last stage trained")}
    fastest = raw.get("seewhy efficientnet_lite0, frozen", {}).get("reach_s")
    rows = []
    ratios: dict[str, float] = {}
    for name in [*SEEWHY, *PEERS, PLAIN]:
        if name not in raw:
            continue
        found = plain_row(raw[name]) if name == PLAIN else raw[name]
        ours = base["frozen" if "frozen backbone" in name else "last stage trained"]
        if name not in SEEWHY and ours:
            ratios[name] = round(found["total_s"] / ours, 1)
        rows.append(
            {
                "candidate": name,
                f"s to {GOAL:.1%} on val": found["reach_s"] or f"not within {found['total_s']:.0f}",
                "epochs": found["epochs"],
                "final val accuracy %": f"{100 * found['val_accuracy']:.1f}" if "val_accuracy" in found else "–",
                "test accuracy %": f"{100 * found['test_accuracy']:.1f}" if "test_accuracy" in found else "–",
                "over seewhy resnet18, same layers": ratios.get(name, "–"),
                "over seewhy lite0, frozen": round(found["total_s"] / fastest, 1) if fastest and name not in SEEWHY else "–",
            }
        )
    notes = [
        "One run each (seed 0), one after another, cold; the whole machine to itself. The last column but one divides by seewhy's "
        "ResNet-18 row with the same layers trained (fastai and the plain recipe, which train everything: by the row with the last "
        "stage). Where a candidate did not arrive, its time so far is a lower bound.",
        "The plain recipe: seconds of an epoch by the step (median of 30) times the epochs that a run of its own, beside other work, took.",
    ]
    command = "python benchmarks/time_to_accuracy.py --only CANDIDATE"
    record(
        "time_to_accuracy",
        f"Time to {GOAL:.1%} validation accuracy on Caltech-101",
        {"rows": rows, "raw": raw, "notes": notes, "command": command},
    )
    print(json.dumps({"name": "time_to_accuracy", "ratios": ratios}))


if __name__ == "__main__":
    main()
