"""The commands that ask a run: evaluate, predict, explain."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
    is_scaled,
    print_json,
)
from seewhy.errors import one_line

if TYPE_CHECKING:
    from seewhy.parts import Bad
    from seewhy.predictions import Columns, Predictions


def evaluate(
    run: RunArgument,
    data: Annotated[str | None, typer.Argument(metavar="[DATA]", help="another labelled folder (default: the run's own data)")] = None,
    part: Annotated[str, typer.Option(help="train, val or test part of the run's split")] = "test",
    as_json: JsonOption = False,
) -> None:
    """Measure a run: accuracy, top-5, per-class numbers."""
    from seewhy.run import load

    evaluation = load(run).evaluate(part, data)
    numbers = evaluation.metrics
    if as_json:
        print_json({evaluation.part: numbers})
        return
    typer.echo(f"{evaluation.part}: {numbers['n']} pictures in {numbers['groups']} groups; 95% intervals by bootstrap over groups")
    names = {"accuracy": "accuracy", "top5_accuracy": "top-5 accuracy", "mean_per_class_accuracy": "mean per-class accuracy"}
    for name, shown in names.items():
        if name not in numbers:  # top-5 of five classes
            continue
        low, high = numbers[f"{name}_ci95"]
        typer.echo(f"{shown:24} {numbers[name]:.2%}   ({low:.2%} to {high:.2%})")
    low, high = numbers["macro_f1_ci95"]
    typer.echo(f"macro F1                 {numbers['macro_f1']:.4f}   ({low:.4f} to {high:.4f})")
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
    from seewhy.predictions import find_pictures, records_of

    if abstain_below is not None and precision is not None:
        raise typer.BadParameter("--abstain-below is a probability, --precision chooses one; give one of them")
    if is_scaled(engine, pictures, out):
        from seewhy.cli_scale import scaled_predict

        scaled_predict(run, pictures, out, top_k, abstain_below, precision, engine, address, ray_workers, as_json)
        return
    ask, least = _answering(run, skip_bad, precision)
    paths = find_pictures(pictures)
    least = abstain_below if least is None else least
    count = None
    if out is None:
        blocks: Iterable[tuple[Columns, Bad]] = ((block.columns(top_k, least), block.bad) for block in ask(paths, 0, 0))
    else:
        from seewhy.parts import open_parts, request_of

        with open_parts(Path(out), request_of(run, paths, top_k=top_k, least=least, skip_bad=skip_bad)) as parts:
            for block in ask(paths, parts.done, parts.rows):
                parts.add(block.columns(top_k, least), block.bad)
            blocks = list(parts.blocks()) if as_json else [({}, bad) for _, bad in parts.blocks()]
            count = parts.join()
    records: list[dict[str, Any]] = []
    for columns, bad in blocks:
        for path, reason in bad:
            typer.echo(one_line(f"left out: {path} ({reason})"), err=True)
        if as_json or out is None:
            records += records_of(columns)
    if as_json:
        print_json(records)
    elif out is not None:
        typer.echo(f"{count} pictures -> {out}")
    else:
        for record in records:
            answers = "  ".join(f"{answer['class']} {answer['prob']:.1%}" for answer in record["top"])
            strange = "looks like nothing known: " if record["unknown"] else ""
            unsure = "unsure: " if least is not None and record["answer"] is None else ""
            typer.echo(one_line(f"{record['path']}:  {strange}{unsure}{answers}"))


def _answering(
    run: Path, skip_bad: bool, precision: float | None
) -> tuple[Callable[[Sequence[Path], int, int], Iterator[Predictions]], float | None]:
    """What answers about files from the given one on (with so many answered before), by a run or by an exported file, without torch;

    and the threshold for a precision.
    """
    if run.suffix == ".onnx":
        from seewhy import runtime

        model = runtime.load_onnx(run)
        least = model.threshold_for(precision) if precision is not None else None
        return lambda paths, begin, kept: runtime.answer_files(model, paths, skip_bad, begin, kept), least
    from seewhy.predict import answer_files
    from seewhy.run import load

    loaded = load(run)
    least = loaded.threshold_for(precision) if precision is not None else None
    return lambda paths, begin, kept: answer_files(loaded, paths, skip_bad, begin=begin, kept=kept), least


def explain(
    run: RunArgument,
    pictures: PicturesArgument,
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="gradcam, gradcam++, hirescam, xgradcam, layercam, eigencam, ablationcam, scorecam, integrated_gradients or occlusion; "
            "more than once for several (default: gradcam, and with --compare all but the three slow last)"
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="explain this class (default: the predicted one)")] = None,
    against: Annotated[str | None, typer.Option(help="take this class's evidence away: why the one and not the other")] = None,
    layer: Annotated[list[str] | None, typer.Option(help="explain this layer instead of the last one; more than once: fused")] = None,
    shifts: Annotated[int, typer.Option(min=1, max=8, help="mean map of N x N moved copies: finer, N x N times the cost")] = 1,
    score: Annotated[
        bool, typer.Option("--score", help="measure how far this method's maps can be trusted, instead of drawing them")
    ] = False,
    compare: Annotated[bool, typer.Option("--compare", help="the same for all methods: a table and a figure")] = False,
    out: Annotated[
        str,
        typer.Option(help="folder for the overlays, or for table and figure of scores; with --engine a .parquet, folder/ or address"),
    ] = "heatmaps",
    engine: EngineOption = None,
    address: AddressOption = "",
    ray_workers: RayWorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Show where in a picture the evidence for a class lies, or measure how far such maps can be trusted."""
    from seewhy.run import load

    methods = method or ["gradcam"]
    if is_scaled(engine, pictures, out):
        from seewhy.cli_scale import scaled_explain

        if score or compare or layer or shifts > 1 or len(methods) > 1:
            raise typer.BadParameter("--engine takes one method and the last layer; leave --score, --compare, --layer and --shifts out")
        scaled_explain(run, pictures, out, methods[0], target, against, engine, address, ray_workers, as_json)
        return
    if score or compare:
        if target is not None or against is not None:
            raise typer.BadParameter("scores are of the predicted class; leave --target and --against out")
        from seewhy.scoring import COMPARED, save_scores, wide, wide_sanity

        loaded = load(run)
        methods = method or list(COMPARED) if compare else methods
        table = loaded.score_methods(pictures, methods, layer or (), shifts)
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
        explanation = loaded.explain(pictures, name, target, against, layer or (), shifts)
        records += [{**record, "overlay": str(file)} for record, file in zip(explanation.records(), explanation.save(out), strict=True)]
    if as_json:
        print_json(records)
        return
    for record in records:
        typer.echo(one_line(f"{record['path']}:  {record['class']} {record['prob']:.1%}  {record['overlay']}"))
