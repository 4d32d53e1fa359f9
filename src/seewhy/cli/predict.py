"""The commands that ask a run: evaluate, predict, explain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seewhy.cli.options import (
    BackendOption,
    ImagesArgument,
    JsonOption,
    RayAddressOption,
    RayWorkersOption,
    RunArgument,
    SkipBadOption,
    is_batch,
    print_json,
)
from seewhy.errors import one_line

if TYPE_CHECKING:
    from seewhy.inference.predictions import Predictions


def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help="another labelled folder (default: the run's own data)")] = None,
    part: Annotated[str, typer.Option(help="train, val or test part of the run's split")] = "test",
    as_json: JsonOption = False,
) -> None:
    """Measure a run: accuracy, top-5, per-class numbers."""
    from seewhy.api import load
    from seewhy.evaluation.metrics import HEADLINE

    evaluation = load(run).evaluate(part, data)
    numbers = evaluation.metrics
    if as_json:
        print_json({evaluation.part: numbers})
        return
    typer.echo(f"{evaluation.part}: {numbers['n']} images in {numbers['groups']} groups; 95% intervals by bootstrap over groups")
    for name, shown in HEADLINE.items():
        if name not in numbers:  # top-5 of five classes
            continue
        value, low, high = (f"{number:{'.4f' if name == 'macro_f1' else '.2%'}}" for number in (numbers[name], *numbers[f"{name}_ci95"]))
        typer.echo(f"{shown:24} {value}   ({low} to {high})")
    typer.echo(
        f"calibration error        {numbers['expected_calibration_error']:.2%}   "
        f"({numbers['expected_calibration_error_uncalibrated']:.2%} before temperature {evaluation.temperature:.2f})"
    )
    weakest = sorted((row for row in numbers["per_class"] if row["n"]), key=lambda row: (row["recall"], row["class"]))[:5]
    typer.echo(one_line("weakest classes          " + ", ".join(f"{row['class']} {row['recall']:.0%} of {row['n']}" for row in weakest)))


def predict(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a saved run, or a file of `seewhy export`")],
    images: ImagesArgument,
    top_k: Annotated[int, typer.Option(min=1, help="classes an image")] = 5,
    out: Annotated[
        str | None,
        typer.Option(help="write the table here: .csv, .parquet or .json; folder/ or address: parquet files"),
    ] = None,
    min_confidence: Annotated[
        float | None, typer.Option(min=0, max=1, help="minimum confidence; less confident predictions get no decision")
    ] = None,
    target_precision: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="decide only where at least this share of decisions is right; the threshold is chosen on val"),
    ] = None,
    skip_bad: SkipBadOption = False,
    backend: BackendOption = None,
    address: RayAddressOption = "",
    ray_workers: RayWorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what images show, with calibrated probabilities."""
    if min_confidence is not None and target_precision is not None:
        raise typer.BadParameter("--min-confidence is a threshold, --target-precision chooses one; give one of them")
    if out is not None or is_batch(backend, address, ray_workers, images):
        from seewhy.cli.batch import Batch, predict_batch

        batch = Batch(images, out, skip_bad, backend, address, ray_workers, as_json)
        predict_batch(run, top_k, min_confidence, target_precision, batch)
        return
    blocks, least = _answers(run, images, skip_bad, target_precision)
    least = min_confidence if least is None else least
    records: list[dict[str, Any]] = []
    for block in blocks:
        for path, reason in block.bad:
            typer.echo(one_line(f"skipped: {path} ({reason})"), err=True)
        records += block.records(top_k, least)
    if as_json:
        print_json(records)
        return
    for record in records:
        answers = "  ".join(f"{answer['class']} {answer['prob']:.1%}" for answer in record["top"])
        strange = "out-of-distribution: " if record["ood"] else ""
        unsure = "no decision: " if least is not None and record["decision"] is None else ""
        typer.echo(one_line(f"{record['path']}:  {strange}{unsure}{answers}"))


def _answers(run: Path, images: list[str], skip_bad: bool, precision: float | None) -> tuple[Iterator[Predictions], float | None]:
    """Answers by a run, or by an exported file without torch, and the threshold for a precision."""
    from seewhy.inference import onnx_model

    if onnx_model.is_exported(run):
        model = onnx_model.load_onnx(run)
        least = model.threshold_for(precision) if precision is not None else None
        return onnx_model.predict_onnx(model, images, skip_bad), least
    from seewhy.api import load
    from seewhy.inference.predict import predict_blocks

    loaded = load(run)
    least = loaded.threshold_for(precision) if precision is not None else None
    return predict_blocks(loaded, images, skip_bad), least


def explain(
    run: RunArgument,
    images: ImagesArgument,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="gradcam, gradcam++, hirescam, xgradcam, layercam, eigencam, ablationcam, scorecam, integrated_gradients or occlusion; "
            "more than once for several (default: gradcam, and with --compare-methods all but the three slow last)"
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="explain this class (default: the predicted one)")] = None,
    contrast: Annotated[str | None, typer.Option(help="take this class's evidence away: why the one and not the other")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="explain this layer instead of the last one; more than once: fused")] = None,
    smooth: Annotated[int, typer.Option(min=1, max=8, help="mean map of N x N moved copies: finer, N x N times the cost")] = 1,
    evaluate_maps: Annotated[
        bool, typer.Option("--evaluate", help="measure how far this method's maps can be trusted, instead of drawing them")
    ] = False,
    compare_methods: Annotated[bool, typer.Option("--compare-methods", help="the same for all methods: a table and a figure")] = False,
    out: Annotated[
        str,
        typer.Option(help="folder for the overlays, or for table and figure of scores; with --backend a .parquet, folder/ or address"),
    ] = "heatmaps",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="with --backend: leave unusable images out instead of stopping")] = False,
    backend: BackendOption = None,
    address: RayAddressOption = "",
    ray_workers: RayWorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show where in an image the evidence for a class lies, or measure how far such maps can be trusted."""
    from seewhy.api import load
    from seewhy.data.remote import is_address
    from seewhy.inference.predictions import WRITERS

    methods = method or ["gradcam"]
    if is_batch(backend, address, ray_workers, images) or is_address(out):
        from seewhy.cli.batch import Batch, explain_batch

        if evaluate_maps or compare_methods or layer or smooth > 1 or len(methods) > 1:
            raise typer.BadParameter(
                "a table of heatmaps (--backend, addresses) is of one method and the last layer; "
                "leave --evaluate, --compare-methods, --layer and --smooth out"
            )
        explain_batch(run, methods[0], target, contrast, Batch(images, out, skip_bad, backend, address, ray_workers, as_json))
        return
    if skip_bad:
        raise typer.BadParameter("--skip-bad is for tables of heatmaps (--backend); name images that can be used")
    if Path(out).suffix in WRITERS:
        raise typer.BadParameter(f"{out}: overlays and scores go into a folder; add --backend local for a table of heatmaps")
    if evaluate_maps or compare_methods:
        if target is not None or contrast is not None:
            raise typer.BadParameter("scores are of the predicted class; leave --target and --contrast out")
        from seewhy.explain.method_comparison import COMPARED, wide, wide_sanity
        from seewhy.reports.tables import save_scores

        loaded = load(run)
        methods = method or list(COMPARED) if compare_methods else methods
        table = loaded.score_methods(images, methods, layer or (), smooth)
        sanity = loaded.sanity_check(images, methods, layer or ())
        written = save_scores(table, sanity, Path(out))
        if as_json:
            print_json({"scores": table.to_dict("records"), "sanity": sanity.to_dict("records")})
            return
        typer.echo(wide(table).T.to_string())
        typer.echo("Mean and 95% interval over the images; + higher is better, - lower; * beyond both random and centre.\n")
        typer.echo(wide_sanity(sanity).to_string())
        typer.echo(
            "Rank correlation with the trained network's maps after randomising it from the classifier down to a part; near 0 is right."
        )
        typer.echo("  ".join(map(str, written)))
        return
    records: list[dict[str, Any]] = []
    loaded = load(run)
    for name in methods:
        explanation = loaded.explain(images, name, target, contrast, layer or (), smooth)
        records += [{**record, "overlay": str(file)} for record, file in zip(explanation.records(), explanation.save(out), strict=True)]
    if as_json:
        print_json(records)
        return
    for record in records:
        typer.echo(one_line(f"{record['path']}:  {record['class']} {record['prob']:.1%}  {record['overlay']}"))
