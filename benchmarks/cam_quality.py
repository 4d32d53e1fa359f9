"""How far can each heatmap method be trusted, and what does a map cost beside the peers'?

    python benchmarks/cam_quality.py --data-root DIR --weights FILE [--images 500] [--removed 500] [--slow 50]     into results.json
    python benchmarks/cam_quality.py --quick                                                     part of the demo set, one JSON line

For each backbone and dataset a classifier is trained (`--unfreeze 0`), and maps of the class it predicts are scored on its test part,
which neither training nor any choice has seen: average drop, confidence increase and the check by randomising on --images of them;
deletion, insertion and ROAD, which ask the network 34 times a map, on the first --removed of these; the pointing games on all that have
an outline (the demo set's, Caltech's airplanes). Score-CAM, Integrated Gradients and occlusion ask the network so often for each map that
they are scored on --slow images. HiResCAM and XGrad-CAM are Grad-CAM, for a head of average pooling and one linear layer (a test holds
that).
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from common import interleave, ratio, record
from torch import Tensor, nn

FAST = ("gradcam", "gradcam++", "layercam", "eigencam", "ablationcam")
SLOW = ("scorecam", "integrated_gradients", "occlusion")
BACKBONES = ("efficientnet_lite0", "resnet18")
FINE: dict[str, tuple[str, ...]] = {"efficientnet_lite0": ("blocks.5",), "resnet18": ()}
BATCH = 8  # of the timed maps
ALONE = ("ablationcam",)  # timed on one image, once: pytorch-grad-cam's takes half a minute an image


def test_paths(run: Any) -> list[Path]:
    """Files of the test part of a run, in the order of its split."""
    from seewhy.curation.split import read_split
    from seewhy.data.image_set import open_images

    images = open_images(run.config.data, run.config.data_root)
    return [Path(images.paths[i]) for i in read_split(run.path / "split.json", images).test]


def scores_of(run: Any, paths: list[Path], outlined: list[Path], removed: int, slow: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores of all methods, and what is left of their maps when the classifier is randomised."""
    from seewhy.explain.faithfulness import DELETION_METRICS, LOCALIZATION_METRICS, MASKING_METRICS
    from seewhy.explain.method_comparison import OBJECT_AREA, sanity_check, score_methods

    parts: list[tuple[list[Path], tuple[str, ...], tuple[str, ...]]] = [
        (paths, FAST, tuple(MASKING_METRICS)),
        (paths[:removed], FAST, tuple(DELETION_METRICS)),
        (outlined, FAST, ()),
        (paths[:slow], SLOW, tuple(MASKING_METRICS | DELETION_METRICS)),
        (outlined[:slow], SLOW, ()),
    ]
    tables = []
    for images, methods, scores in parts:
        if images:
            found = score_methods(run, images, methods, scores)
            baselines = ["random", "centre", OBJECT_AREA] if methods == FAST else []
            tables.append(found[found["score"].isin(scores or list(LOCALIZATION_METRICS)) & found["method"].isin([*methods, *baselines])])
    if outlined:
        tables.append(fine_scores(run, outlined))
    checks = [sanity_check(run, paths, FAST), *([sanity_check(run, paths[: min(slow, 16)], SLOW, parts=1)] if slow else [])]
    return pd.concat(tables, ignore_index=True), pd.concat(checks, ignore_index=True)


def fine_scores(run: Any, outlined: list[Path]) -> pd.DataFrame:
    """Grad-CAM at the layer that points best on validation, as the mean over 16 moved copies of each image."""
    from seewhy.explain.method_comparison import score_methods

    layers = FINE[run.config.backbone]
    table = score_methods(run, outlined, ("gradcam",), (), layers, smooth=4).query("method == 'gradcam'")
    return table.assign(method=f"gradcam, {layers[0] if layers else 'last maps'}, smooth 4")


def rows_of(table: pd.DataFrame, sanity: pd.DataFrame) -> list[dict[str, Any]]:
    """A row a method: mean, interval and star of each score, and the rank correlation after randomising the classifier."""
    from seewhy.explain.method_comparison import pivot_scores

    shown = pivot_scores(table, "{mean:.2f} ({low:.2f}–{high:.2f})")
    first = sanity.drop_duplicates("method").set_index("method")["spearman_mean"].to_dict()
    counts = table.groupby("score")["n"].max().to_dict()
    named = {column: f"{column} (n = {counts[column.rsplit(' ', 1)[0]]:,})" for column in shown.columns}
    return [
        {
            "method": name,
            **{named[c]: shown.at[name, c] for c in shown.columns},
            "like a random classifier's": f"{first[name]:.2f}" if name in first else "–",
        }
        for name in shown.index
    ]


# ---------------------------------------------------------------- what a map costs


def ours(model: nn.Module, images: Tensor, method: str) -> Callable[[], Any]:
    from seewhy.explain.attribution import class_activation_maps

    return lambda: class_activation_maps(model, images, method)


def peers(model: nn.Module, images: Tensor, layer: nn.Module) -> dict[str, dict[str, Callable[[], Any]]]:
    """method -> peer -> its maps of the same images, in eager PyTorch as ours here."""
    import pytorch_grad_cam as theirs
    from captum.attr import IntegratedGradients, LayerGradCam, Occlusion

    classes = model(images).argmax(dim=1)
    named = {
        "gradcam": theirs.GradCAM,
        "gradcam++": theirs.GradCAMPlusPlus,
        "layercam": theirs.LayerCAM,
        "eigencam": theirs.EigenCAM,
        "ablationcam": theirs.AblationCAM,
    }
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for method, kind in named.items():
        found[method] = {"pytorch-grad-cam": functools.partial(kind(model=model, target_layers=[layer]), input_tensor=images, targets=None)}
    captum = LayerGradCam(model, layer)
    found["gradcam"]["captum"] = lambda: captum.attribute(images, target=classes, relu_attributions=True)
    size = images.shape[-1]
    options = {"sliding_window_shapes": (3, size // 7, size // 7), "strides": (3, size // 14, size // 14)}
    found["integrated_gradients"] = {
        "captum": lambda: IntegratedGradients(model).attribute(images, target=classes, n_steps=32, internal_batch_size=4 * BATCH)
    }
    found["occlusion"] = {"captum": lambda: Occlusion(model).attribute(images, target=classes, **options)}
    return found


def costs(names: Sequence[str], rounds: int, left_out: Sequence[str] = ()) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Milliseconds a map of each method, and how far ahead of each peer; random weights, 101 classes: the work is the same."""
    from seewhy.models.backbones import create_backbone

    rows, ratios = [], {}
    for name in names:

        def fresh(name: str = name) -> nn.Module:
            """A network of its own for each library: some leave hooks in it."""
            return create_backbone(name, 101, "none").model

        images = torch.randn(BATCH, 3, 224, 224, generator=torch.Generator().manual_seed(0))
        peer_model, model = fresh(), fresh()
        layer = peer_model.get_submodule({"resnet18": "layer4", "efficientnet_lite0": "bn2"}[name])
        found = peers(peer_model, images, layer)
        found |= {method: others for method, others in peers(peer_model, images[:1], layer).items() if method in ALONE}
        for method, others in ((method, found[method]) for method in found if method not in left_out):
            batch, times = (images[:1], 1) if method in ALONE else (images, rounds)
            seconds = interleave({"seewhy": ours(model, batch, method), **others}, times)
            for peer in others:
                ratios[f"{peer} {method} {name}"] = ratio(seconds, peer, "seewhy")
            rows.append(
                {
                    "backbone": name,
                    "method": method,
                    **{
                        f"{who}, ms a map": f"{1000 * float(np.median(seconds[who])) / len(batch):.0f}" if who in seconds else "–"
                        for who in ("seewhy", "pytorch-grad-cam", "captum")
                    },
                    "seewhy is ahead": ", ".join(f"{ratios[f'{peer} {method} {name}']:.1f}x" for peer in others),
                }
            )
    return rows, ratios


# ---------------------------------------------------------------- main


def trained(data: str, name: str, extra: list[str], place: Path) -> Any:
    from seewhy.cli.main import train_from_arguments

    return train_from_arguments([data, "--backbone", name, "--unfreeze", "0", *extra, "--out", str(place / f"{data}-{name}")])


def keep(data: str, name: str, table: pd.DataFrame, sanity: pd.DataFrame, accuracy: float, command: str) -> None:
    notes = [
        f"Test accuracy of this network: {accuracy:.1%}. Mean and 95% bootstrap interval over images; + higher, - lower is better; "
        "* beyond random, centre and object area (chance level), which know nothing of the image. Score-CAM, Integrated "
        "Gradients and occlusion stand on fewer images than the head of a column says: see `raw`.",
        "Last column: mean rank correlation of the maps with those of the same network with a random classifier; 1: the map does not "
        "depend on what the classifier learnt.",
    ]
    record(
        f"cam_quality {data} {name}",
        f"How far heatmaps can be trusted: {data}, {name}",
        {
            "rows": rows_of(table, sanity),
            "raw": {"scores": table.to_dict("records"), "sanity": sanity.to_dict("records")},
            "notes": notes,
            "command": command,
        },
        timed=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-root", help="folder that holds caltech101 (or $SEEWHY_DATA)")
    parser.add_argument("--weights", help="weights file for resnet18, where timm's cannot be fetched")
    parser.add_argument("--data", nargs="+", default=["scenes", "caltech101"])
    parser.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=BACKBONES)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--removed", type=int, default=500)
    parser.add_argument("--slow", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=["quality", "cost"])
    parser.add_argument("--quick", action="store_true", help="one network on part of the demo set")
    arguments = parser.parse_args()
    from seewhy.explain.masks import object_mask

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        if arguments.quick:
            run = trained("scenes", "efficientnet_lite0", [], place)
            paths = test_paths(run)[:16]
            table, _ = scores_of(run, paths, paths, 0, 0)
            means = table.set_index(["method", "score"])["mean"]
            _, ratios = costs(["efficientnet_lite0"], 2, ("ablationcam", *SLOW))
            pointing = {name: round(float(means[name, "pointing game"]), 2) for name in (*FAST, "random", "centre")}
            print(json.dumps({"name": "cam_quality", "ratios": ratios, "pointing game": pointing}))
            return
        ratios = {}
        options = f"--images {arguments.images} --removed {arguments.removed} --slow {arguments.slow}"
        for data in arguments.data if arguments.only != "cost" else []:
            for name in arguments.backbones:
                extra = ["--weights", arguments.weights] if name == "resnet18" and arguments.weights else []
                extra += ["--data-root", arguments.data_root] if arguments.data_root and data == "caltech101" else []
                run = trained(data, name, extra, place)
                paths = test_paths(run)
                drawn = np.random.default_rng(0).permutation(len(paths))
                shuffled = [paths[i] for i in drawn]
                outlined = [path for path in shuffled if object_mask(path, run.backbone.preprocessing) is not None][: arguments.images]
                table, sanity = scores_of(run, shuffled[: arguments.images], outlined, arguments.removed, arguments.slow)
                command = f"python benchmarks/cam_quality.py --data {data} --backbones {name} {options}"
                keep(data, name, table, sanity, run.metrics["test"]["accuracy"], command)
        if arguments.only != "quality":
            rows, ratios = costs(arguments.backbones, arguments.rounds)
            notes = [
                f"Batches of {BATCH} images of 224 pixels, eager PyTorch for everybody, {arguments.rounds} interleaved rounds, medians; "
                "random weights; Ablation-CAM on one image, once. `benchmarks/heatmaps.py` measures Grad-CAM and Grad-CAM++ with "
                "seewhy's engine. Integrated Gradients and occlusion are captum's own code on both sides, ours in batches of 32.",
            ]
            command = (
                f"python benchmarks/cam_quality.py --only cost --backbones {' '.join(arguments.backbones)} --rounds {arguments.rounds}"
            )
            record(
                "cam_quality cost", "What a heatmap costs", {"rows": rows, "raw": {"ratios": ratios}, "notes": notes, "command": command}
            )
        print(json.dumps({"name": "cam_quality", "ratios": ratios}))


if __name__ == "__main__":
    main()
