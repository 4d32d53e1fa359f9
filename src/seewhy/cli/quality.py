"""The commands that say how far numbers hold: audit, robustness, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seewhy.cli.options import JsonOption, RayAddressOption, RayWorkersOption, RunArgument, SkipBadOption, print_json
from seewhy.errors import require


def audit(
    data: Annotated[str, typer.Argument(metavar="DATA", help="caltech101, scenes, a folder of class folders, or tar or parquet shards")],
    data_root: Annotated[str | None, typer.Option(help="folder that holds caltech101; also $SEEWHY_DATA")] = None,
    out: Annotated[Path, typer.Option(help="folder for the page and the tables")] = Path("audit"),
    seeds: Annotated[int, typer.Option(min=1, help="splits over which the leak is measured")] = 5,
    skip_bad: SkipBadOption = False,
    backend: Annotated[str | None, typer.Option(help="local or ray: compute the features shard by shard before all else")] = None,
    address: RayAddressOption = "",
    ray_workers: RayWorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Look for near-duplicates, leaks, label issues and image issues before training."""
    require("audit", "seewhy audit", "cleanvision")  # before any image is read
    from seewhy.curation.audit import audit_images
    from seewhy.data.image_set import open_images
    from seewhy.reports.audit_report import save_audit

    if backend is not None or address or ray_workers:  # the latter without an backend are refused
        from seewhy.cli.batch import fill_audit

        fill_audit(data, data_root, backend, address, ray_workers)
    found = audit_images(open_images(data, data_root, skip_bad), seeds)
    written = save_audit(found, out)
    counts = found.summary()
    if as_json:
        print_json({"audit": str(out), **counts})
        return
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts["pairs"].items())
    typer.echo(f"{counts['images']:,} images in {counts['classes']} classes")
    typer.echo(f"near-duplicates  {counts['grouped_images']:,} images in {counts['groups']:,} groups (pairs: {kinds})")
    typer.echo("                 most in " + ", ".join(f"{name} {number:,}" for name, number in list(counts["pairs_by_class"].items())[:5]))
    typer.echo(f"across labels    {counts['pairs_across_labels']:,} pairs")
    if leak := counts.get("leak"):
        typer.echo(
            f"leak             {leak['leaked']:.1%} of a random split's test images, worth "
            f"{100 * (leak['plain'] - leak['grouped']):+.2f} points: {leak['plain']:.2%} against {leak['grouped']:.2%} with "
            f"near-duplicates kept together ({leak['seeds']} splits)"
        )
    typer.echo(f"label issues     {counts['label_issues']:,} (out-of-fold accuracy {counts['out_of_fold_accuracy'] or 0:.2%})")
    typer.echo("image issues     " + (", ".join(f"{number:,} {issue}" for issue, number in counts["image_issues"].items()) or "none"))
    typer.echo("  ".join(map(str, written)))


def robustness(
    run: RunArgument,
    images: Annotated[int, typer.Option(min=1, help="at most so many test images, drawn at random")] = 300,
    corruption: Annotated[
        list[str] | None,
        typer.Option(help="blur, noise, jpeg, brightness, darkness or rotation; more than once for several (default: all)"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for table and figure (default: the run's)")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy on blurred, noisy, badly compressed, lit or turned images, and on slices of the plain ones."""
    from seewhy.api import load
    from seewhy.evaluation.robustness import run_robustness
    from seewhy.reports.tables import save_robustness

    table, parts = run_robustness(load(run), images, corruption)
    written = save_robustness(table, parts, out or run)
    if as_json:
        print_json({"robustness": table.to_dict("records"), "slices": parts.to_dict("records")})
        return
    plain = table[table["strength"] == 0].iloc[0]
    typer.echo(f"plain images  {plain['accuracy']:.1%} ({plain['low']:.1%} to {plain['high']:.1%}), n = {plain['n']}")
    wide = table[table["strength"] > 0].pivot(index="corruption", columns="strength", values="accuracy")
    typer.echo((100 * wide.loc[list(dict.fromkeys(table["corruption"][1:]))]).round(1).to_string())
    typer.echo("accuracy in % at strengths 1 (mild) to 5\n")
    shown = parts.assign(**{name: (100 * parts[name]).round(1) for name in ("accuracy", "low", "high")})
    typer.echo(shown.to_string(index=False))
    typer.echo("  ".join(map(str, written)))


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="folder of a saved run")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="folder of another")],
    data: Annotated[str | None, typer.Option(help="another labelled folder (default: the test images that both runs share)")] = None,
    as_json: JsonOption = False,
) -> None:
    """Say which of two runs is better on the same images, and whether that may be chance."""
    from seewhy.api import load
    from seewhy.evaluation.comparison import compare_runs, differences

    a, b = load(run_a), load(run_b)
    found = compare_runs(a, b, data)
    paired, differ = found.paired, differences(a, b)
    if as_json:
        print_json({"a": found.a.metrics, "b": found.b.metrics, "paired": vars(paired), "differences": differ})
        return
    typer.echo(f"{paired.n} images that neither run was trained on" if data is None else f"{paired.n} images of {data}")
    for name, path, evaluation in (("A", run_a, found.a), ("B", run_b, found.b)):
        low, high = evaluation.metrics["accuracy_ci95"]
        typer.echo(f"{name}  {evaluation.metrics['accuracy']:.2%} ({low:.2%} to {high:.2%})  {path}")
    typer.echo(f"B - A {100 * paired.difference:+.2f} points (95% interval {100 * paired.low:+.2f} to {100 * paired.high:+.2f})")
    typer.echo(f"right in A alone {paired.only_a}, in B alone {paired.only_b}; McNemar's exact test p = {paired.p_value:.3g}")
    shown = "; ".join(f"{name} {ours} | {theirs}" for name, (ours, theirs) in differ.items())
    typer.echo(f"recorded differently (A | B): {shown}" if differ else "recorded alike in options, data, split, versions and hardware")
