"""Define the commands that check data and results: audit, robustness, compare."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from seewhy.cli.options import DATA_HELP, JsonOption, RayAddressOption, RayWorkersOption, RunArgument, SkipBadOption, print_result
from seewhy.errors import require


def audit(
    data: Annotated[str, typer.Argument(metavar="DATA", help=DATA_HELP)],
    data_root: Annotated[str | None, typer.Option(help="folder that holds caltech101 (default: $SEEWHY_DATA)")] = None,
    out: Annotated[Path, typer.Option(help="folder for the report and its tables")] = Path("audit"),
    seeds: Annotated[int, typer.Option(min=1, help="random splits over which leakage is measured")] = 5,
    skip_bad: SkipBadOption = False,
    backend: Annotated[str | None, typer.Option(help="local or ray: first compute the features, in shards")] = None,
    ray_address: RayAddressOption = "",
    ray_workers: RayWorkersOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Find near-duplicates, leakage, label issues and image issues before training."""
    require("audit", "seewhy audit", "cleanvision")  # before any image is read
    from seewhy.curation.audit import audit_images
    from seewhy.data.image_set import open_images
    from seewhy.reports.audit_report import save_audit

    if backend is not None or ray_address or ray_workers:  # without a backend, get_backend rejects the others
        from seewhy.cli.batch import precompute_audit

        precompute_audit(data, data_root, backend, ray_address, ray_workers)
    result = audit_images(open_images(data, data_root, skip_bad), seeds)
    written = save_audit(result, out)
    counts = result.summary()
    kinds = ", ".join(f"{number:,} {kind}" for kind, number in counts["pairs"].items())
    lines = [
        f"{counts['images']:,} images in {counts['classes']} classes",
        f"near-duplicates  {counts['grouped_images']:,} images in {counts['groups']:,} groups (pairs: {kinds})",
        "                 most in " + ", ".join(f"{name} {number:,}" for name, number in list(counts["pairs_by_class"].items())[:5]),
        f"across labels    {counts['pairs_across_labels']:,} pairs",
    ]
    if leak := counts.get("leak"):
        lines.append(
            f"leakage          {leak['leaked']:.1%} of the test images of a random split, "
            f"{100 * (leak['plain'] - leak['grouped']):+.2f} points of accuracy: {leak['plain']:.2%} against {leak['grouped']:.2%} with "
            f"near-duplicates kept together ({leak['seeds']} splits)"
        )
    lines += [
        f"label issues     {counts['label_issues']:,} (out-of-fold accuracy {counts['out_of_fold_accuracy'] or 0:.2%})",
        "image issues     " + (", ".join(f"{number:,} {issue}" for issue, number in counts["image_issues"].items()) or "none"),
        "  ".join(map(str, written)),
    ]
    print_result(as_json, {"audit": str(out), **counts}, *lines)


def robustness(
    run: RunArgument,
    images: Annotated[int, typer.Option(min=1, help="test images, drawn at random if there are more")] = 300,
    corruption: Annotated[
        list[str] | None, typer.Option(help="blur, noise, jpeg, brightness, darkness or rotation; repeatable (default: all)")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="folder for table and figure (default: RUN)")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure accuracy under blur, noise, compression, lighting and rotation, and on slices of the clean images."""
    from seewhy.api import load
    from seewhy.evaluation.robustness import run_robustness
    from seewhy.reports.tables import save_robustness

    table, slices = run_robustness(load(run), images, corruption)
    written = save_robustness(table, slices, out or run)
    clean = table[table["strength"] == 0].iloc[0]
    by_strength = table[table["strength"] > 0].pivot(index="corruption", columns="strength", values="accuracy")
    percent = slices.assign(**{name: (100 * slices[name]).round(1) for name in ("accuracy", "low", "high")})
    print_result(
        as_json,
        {"robustness": table.to_dict("records"), "slices": slices.to_dict("records")},
        f"clean images  {clean['accuracy']:.1%} ({clean['low']:.1%} to {clean['high']:.1%}), n = {clean['n']}",
        (100 * by_strength.loc[list(dict.fromkeys(table["corruption"][1:]))]).round(1).to_string(),
        "accuracy in % at strengths 1 (mild) to 5\n",
        percent.to_string(index=False),
        "  ".join(map(str, written)),
    )


def compare(
    run_a: Annotated[Path, typer.Argument(metavar="RUN_A", help="folder of a saved run")],
    run_b: Annotated[Path, typer.Argument(metavar="RUN_B", help="folder of another run")],
    data: Annotated[str | None, typer.Option(help="another labelled folder (default: test images that both runs share)")] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare the accuracy of two runs on the same images, with a confidence interval and McNemar's test."""
    from seewhy.api import load
    from seewhy.evaluation.comparison import compare_runs, differences

    a, b = load(run_a), load(run_b)
    result = compare_runs(a, b, data)
    paired, differ = result.paired, differences(a, b)
    lines = [f"{paired.n} images that neither run was trained on" if data is None else f"{paired.n} images of {data}"]
    for name, path, evaluation in (("A", run_a, result.a), ("B", run_b, result.b)):
        low, high = evaluation.metrics["accuracy_ci95"]
        lines.append(f"{name}  {evaluation.metrics['accuracy']:.2%} ({low:.2%} to {high:.2%})  {path}")
    lines.append(f"B - A {100 * paired.difference:+.2f} points (95% interval {100 * paired.low:+.2f} to {100 * paired.high:+.2f})")
    lines.append(f"correct only in A {paired.only_a}, only in B {paired.only_b}; McNemar's exact test p = {paired.p_value:.3g}")
    shown = "; ".join(f"{name} {of_a} | {of_b}" for name, (of_a, of_b) in differ.items())
    lines.append(f"differences (A | B): {shown}" if differ else "same options, data, split, versions and hardware")
    print_result(as_json, {"a": result.a.metrics, "b": result.b.metrics, "paired": vars(paired), "differences": differ}, *lines)
