"""The commands that ask a run: evaluate, predict, explain."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from seewhy.cli_shared import (
    AddressOption,
    EngineOption,
    JsonOption,
    PicturesArgument,
    RayWorkersOption,
    RunArgument,
    SkipBadOption,
    is_batch,
    print_json,
)
from seewhy.errors import one_line

if TYPE_CHECKING:
    from seewhy.predictions import Predictions


def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help="another labelled folder (default: the run's own data)")] = None,
    part: Annotated[str, typer.Option(help="train, val or test part of the run's split")] = "test",
    as_json: JsonOption = False,
) -> None:
    """Measure a run: accuracy, top-5, per-class numbers."""
    from seewhy.api import load
    from seewhy.metrics import HEADLINE

    evaluation = load(run).evaluate(part, data)
    numbers = evaluation.metrics
    if as_json:
        print_json({evaluation.part: numbers})
        return
    typer.echo(f"{evaluation.part}: {numbers['n']} pictures in {numbers['groups']} groups; 95% intervals by bootstrap over groups")
    for name, shown in HEADLINE.items():
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
    pictures: PicturesArgument,
    top_k: Annotated[int, typer.Option(min=1, help="classes a picture")] = 5,
    out: Annotated[
        str | None,
        typer.Option(help="write the table here: .csv, .parquet or .json; folder/ or address: parquet files"),
    ] = None,
    abstain_below: Annotated[
        float | None, typer.Option(min=0, max=1, help="say nothing where the likeliest class is less probable than this")
    ] = None,
    precision: Annotated[
        float | None, typer.Option(min=0, max=1, help="say nothing where answers would not be right so often; chosen on val")
    ] = None,
    skip_bad: SkipBadOption = False,
    engine: EngineOption = None,
    address: AddressOption = "",
    ray_workers: RayWorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Say what pictures show, with calibrated probabilities."""
    if abstain_below is not None and precision is not None:
        raise typer.BadParameter("--abstain-below is a probability, --precision chooses one; give one of them")
    if out is not None or is_batch(engine, address, ray_workers, pictures):
        from seewhy.cli_scale import Batch, predict_batch

        batch = Batch(pictures, out, skip_bad, engine, address, ray_workers, as_json)
        predict_batch(run, top_k, abstain_below, precision, batch)
        return
    blocks, least = _answers(run, pictures, skip_bad, precision)
    least = abstain_below if least is None else least
    records: list[dict[str, Any]] = []
    for block in blocks:
        for path, reason in block.bad:
            typer.echo(one_line(f"left out: {path} ({reason})"), err=True)
        records += block.records(top_k, least)
    if as_json:
        print_json(records)
        return
    for record in records:
        answers = "  ".join(f"{answer['class']} {answer['prob']:.1%}" for answer in record["top"])
        strange = "looks like nothing known: " if record["unknown"] else ""
        unsure = "unsure: " if least is not None and record["answer"] is None else ""
        typer.echo(one_line(f"{record['path']}:  {strange}{unsure}{answers}"))


def _answers(run: Path, pictures: list[str], skip_bad: bool, precision: float | None) -> tuple[Iterator[Predictions], float | None]:
    """Answers by a run, or by an exported file without torch, and the threshold for a precision."""
    from seewhy import runtime

    if runtime.is_exported(run):
        model = runtime.load_onnx(run)
        least = model.threshold_for(precision) if precision is not None else None
        return runtime.predict_onnx(model, pictures, skip_bad), least
    from seewhy.api import load
    from seewhy.predict import predict_blocks

    loaded = load(run)
    least = loaded.threshold_for(precision) if precision is not None else None
    return predict_blocks(loaded, pictures, skip_bad), least


def explain(
    run: RunArgument,
    pictures: PicturesArgument,
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
        typer.Option(help="folder for the overlays, or for table and figure of scores; with --engine a .parquet, folder/ or address"),
    ] = "heatmaps",
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="with --engine: leave unusable pictures out instead of stopping")] = False,
    engine: EngineOption = None,
    address: AddressOption = "",
    ray_workers: RayWorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show where in a picture the evidence for a class lies, or measure how far such maps can be trusted."""
    from seewhy.api import load
    from seewhy.predictions import WRITERS
    from seewhy.storage import is_address

    methods = method or ["gradcam"]
    if is_batch(engine, address, ray_workers, pictures) or is_address(out):
        from seewhy.cli_scale import Batch, explain_batch

        if evaluate_maps or compare_methods or layer or smooth > 1 or len(methods) > 1:
            raise typer.BadParameter(
                "a table of heatmaps (--engine, addresses) is of one method and the last layer; "
                "leave --evaluate, --compare-methods, --layer and --smooth out"
            )
        explain_batch(run, methods[0], target, contrast, Batch(pictures, out, skip_bad, engine, address, ray_workers, as_json))
        return
    if skip_bad:
        raise typer.BadParameter("--skip-bad is for tables of heatmaps (--engine); name pictures that can be used")
    if Path(out).suffix in WRITERS:
        raise typer.BadParameter(f"{out}: overlays and scores go into a folder; add --engine local for a table of heatmaps")
    if evaluate_maps or compare_methods:
        if target is not None or contrast is not None:
            raise typer.BadParameter("scores are of the predicted class; leave --target and --contrast out")
        from seewhy.scoring import COMPARED, save_scores, wide, wide_sanity

        loaded = load(run)
        methods = method or list(COMPARED) if compare_methods else methods
        table = loaded.score_methods(pictures, methods, layer or (), smooth)
        sanity = loaded.sanity_check(pictures, methods, layer or ())
        written = save_scores(table, sanity, Path(out))
        if as_json:
            print_json({"scores": table.to_dict("records"), "sanity": sanity.to_dict("records")})
            return
        typer.echo(wide(table).T.to_string())
        typer.echo("Mean and 95% interval over the pictures; + higher is better, - lower; * beyond both random and centre.\n")
        typer.echo(wide_sanity(sanity).to_string())
        typer.echo(
            "Rank correlation with the trained network's maps after randomising it from the classifier down to a part; near 0 is right."
        )
        typer.echo("  ".join(map(str, written)))
        return
    records: list[dict[str, Any]] = []
    loaded = load(run)
    for name in methods:
        explanation = loaded.explain(pictures, name, target, contrast, layer or (), smooth)
        records += [{**record, "overlay": str(file)} for record, file in zip(explanation.records(), explanation.save(out), strict=True)]
    if as_json:
        print_json(records)
        return
    for record in records:
        typer.echo(one_line(f"{record['path']}:  {record['class']} {record['prob']:.1%}  {record['overlay']}"))
