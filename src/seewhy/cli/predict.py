"""Define the commands that apply a run to images: evaluate, predict, explain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seewhy.cli.options import (
    BackendOption,
    ImagesArgument,
    JsonOption,
    ModelArgument,
    RayAddressOption,
    RayWorkersOption,
    RunArgument,
    SkipBadOption,
    is_batch,
    print_result,
)
from seewhy.errors import one_line

if TYPE_CHECKING:
    from seewhy.inference.predictions import Predictions


def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Argument(metavar="DATA", help="another labelled folder (default: the run's own data)")] = None,
    part: Annotated[str, typer.Option(help="train, val or test part of the run's split")] = "test",
    as_json: JsonOption = False,
) -> None:
    """Evaluate a run: accuracy, top-5, macro F1 and calibration with 95% intervals, and the weakest classes."""
    from seewhy.api import load
    from seewhy.evaluation.metrics import HEADLINE

    evaluation = load(run).evaluate(part, data)
    numbers = evaluation.metrics
    lines = [f"{evaluation.part}: {numbers['n']} images in {numbers['groups']} groups; 95% intervals by bootstrap over groups"]
    for name, title in HEADLINE.items():
        if name in numbers:  # top-5 accuracy needs more than five classes
            value, low, high = (f"{x:{'.4f' if name == 'macro_f1' else '.2%'}}" for x in (numbers[name], *numbers[f"{name}_ci95"]))
            lines.append(f"{title:24} {value}   ({low} to {high})")
    weakest = sorted((row for row in numbers["per_class"] if row["n"]), key=lambda row: (row["recall"], row["class"]))[:5]
    lines += [
        f"calibration error        {numbers['expected_calibration_error']:.2%}   "
        f"({numbers['expected_calibration_error_uncalibrated']:.2%} before temperature {evaluation.temperature:.2f})",
        one_line("weakest classes          " + ", ".join(f"{row['class']} {row['recall']:.0%} of {row['n']}" for row in weakest)),
    ]
    print_result(as_json, {evaluation.part: numbers}, *lines)


def predict(
    run: ModelArgument,
    images: ImagesArgument,
    top_k: Annotated[int, typer.Option(min=1, help="classes per image")] = 5,
    out: Annotated[str | None, typer.Option(help="output table: .csv, .parquet or .json; or a folder/ or address of parquet files")] = None,
    min_confidence: Annotated[
        float | None, typer.Option(min=0, max=1, help="minimum confidence; less confident predictions get no decision")
    ] = None,
    target_precision: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="minimum confidence at which this share of decisions is correct, chosen on val"),
    ] = None,
    skip_bad: SkipBadOption = False,
    backend: BackendOption = None,
    ray_address: RayAddressOption = "",
    ray_workers: RayWorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Predict the classes of images, with calibrated probabilities and an out-of-distribution flag."""
    if min_confidence is not None and target_precision is not None:
        raise typer.BadParameter("--min-confidence is a threshold, --target-precision chooses one; give one of them")
    if out is not None or is_batch(backend, ray_address, ray_workers, images):
        from seewhy.cli.batch import Batch, predict_batch

        batch = Batch(images, out, skip_bad, backend, ray_address, ray_workers, as_json)
        predict_batch(run, top_k, min_confidence, target_precision, batch)
        return
    batches, threshold = _predict(run, images, skip_bad, target_precision)
    min_confidence = min_confidence if threshold is None else threshold
    records: list[dict[str, Any]] = []
    for predictions in batches:
        for path, reason in predictions.bad:
            typer.echo(one_line(f"skipped: {path} ({reason})"), err=True)
        records += predictions.records(top_k, min_confidence)
    lines = []
    for record in records:
        classes = "  ".join(f"{row['class']} {row['prob']:.1%}" for row in record["top"])
        ood = "out-of-distribution: " if record["ood"] else ""
        undecided = "no decision: " if min_confidence is not None and record["decision"] is None else ""
        lines.append(one_line(f"{record['path']}:  {ood}{undecided}{classes}"))
    print_result(as_json, records, *lines)


def _predict(run: Path, images: list[str], skip_bad: bool, precision: float | None) -> tuple[Iterator[Predictions], float | None]:
    """Predict with a run, or without torch with an exported file; also return the confidence threshold for a target precision."""
    from seewhy.inference import onnx_model

    if onnx_model.is_exported(run):
        model = onnx_model.load_onnx(run)
        threshold = model.threshold_for(precision) if precision is not None else None
        return onnx_model.predict_onnx(model, images, skip_bad), threshold
    from seewhy.api import load
    from seewhy.inference.predict import predict_batches

    loaded = load(run)
    threshold = loaded.threshold_for(precision) if precision is not None else None
    return predict_batches(loaded, images, skip_bad), threshold


def explain(
    run: RunArgument,
    images: ImagesArgument,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="gradcam, gradcam++, hirescam, xgradcam, layercam, eigencam, ablationcam, scorecam, integrated_gradients or occlusion; "
            "repeatable (default: gradcam; with --compare-methods all but the last three, which are slow)"
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="class to explain (default: the predicted one)")] = None,
    contrast: Annotated[str | None, typer.Option(help="explain why the target and not this class")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="layer to explain instead of the last one; repeatable: maps are fused")] = None,
    smooth: Annotated[int, typer.Option(min=1, max=8, help="average over N x N shifted copies: finer maps at N x N times the cost")] = 1,
    evaluate_maps: Annotated[bool, typer.Option("--evaluate", help="measure how faithful the maps are instead of drawing them")] = False,
    compare_methods: Annotated[bool, typer.Option("--compare-methods", help="--evaluate for all methods")] = False,
    out: Annotated[
        str, typer.Option(help="folder for overlays or scores; with --backend a .parquet file, folder/ or address")
    ] = "heatmaps",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="with --backend: skip unreadable images instead of stopping")] = False,
    backend: BackendOption = None,
    ray_address: RayAddressOption = "",
    ray_workers: RayWorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Draw heatmaps of the evidence for a class, or measure how faithful such heatmaps are."""
    from seewhy.api import load
    from seewhy.data.remote import is_address
    from seewhy.inference.predictions import WRITERS

    methods = method or ["gradcam"]
    if is_batch(backend, ray_address, ray_workers, images) or is_address(out):
        from seewhy.cli.batch import Batch, explain_batch

        if evaluate_maps or compare_methods or layer or smooth > 1 or len(methods) > 1:
            raise typer.BadParameter(
                "tables of heatmaps (--backend, addresses) are of one method and the last layer; "
                "leave out --evaluate, --compare-methods, --layer and --smooth"
            )
        batch = Batch(images, out, skip_bad, backend, ray_address, ray_workers, as_json)
        explain_batch(run, methods[0], target, contrast, batch)
        return
    if skip_bad:
        raise typer.BadParameter("--skip-bad is for tables of heatmaps; add --backend local, or leave out the unreadable images")
    if Path(out).suffix in WRITERS:
        raise typer.BadParameter(f"{out}: overlays and scores need a folder; add --backend local for a table of heatmaps")
    if (evaluate_maps or compare_methods) and (target is not None or contrast is not None):
        raise typer.BadParameter("maps are evaluated for the predicted class; leave out --target and --contrast")
    loaded = load(run)
    if evaluate_maps or compare_methods:
        from seewhy.explain.method_comparison import DEFAULT_METHODS, pivot_sanity, pivot_scores
        from seewhy.reports.tables import save_scores

        methods = method or list(DEFAULT_METHODS) if compare_methods else methods
        table = loaded.score_methods(images, methods, layer or (), smooth)
        sanity = loaded.sanity_check(images, methods, layer or ())
        written = save_scores(table, sanity, Path(out))
        print_result(
            as_json,
            {"scores": table.to_dict("records"), "sanity": sanity.to_dict("records")},
            pivot_scores(table).T.to_string(),
            "Mean and 95% interval over the images; + higher is better, - lower; * better than both random and centre.\n",
            pivot_sanity(sanity).to_string(),
            "Rank correlation with the trained network's maps after randomising the network from the classifier down; near 0 is good.",
            "  ".join(map(str, written)),
        )
        return
    records: list[dict[str, Any]] = []
    for name in methods:
        explanation = loaded.explain(images, name, target, contrast, layer or (), smooth)
        records += [{**record, "overlay": str(file)} for record, file in zip(explanation.records(), explanation.save(out), strict=True)]
    lines = [one_line(f"{record['path']}:  {record['class']} {record['prob']:.1%}  {record['overlay']}") for record in records]
    print_result(as_json, records, *lines)
