"""What `seewhy plan` says: a table of stages, disk and memory, and what fits a budget."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import typer

from seewhy.cli_shared import print_json
from seewhy.config import TrainConfig
from seewhy.errors import ConfigError

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


def seconds_of(text: str) -> float:
    """`90s`, `15m`, `2h`, `1.5d` -> seconds; ConfigError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if not found:
        raise ConfigError(f"--budget {text!r}: write it as 90s, 15m, 2h or 1d")
    return float(found.group(1)) * UNITS[found.group(2)]


def shown(seconds: float) -> str:
    """`42 s`, `3.5 min`, `7.2 h`, `3.1 d`."""
    for unit, name in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.1f} {name}"
    return f"{seconds:.0f} s"


def size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def show_plan(config: TrainConfig, pictures: int | None, machines: int, budget: str | None, as_json: bool) -> None:
    """Prints the plan of one config, and with a budget of the other ways to train."""
    from seewhy.plan import plan, variants

    limit = seconds_of(budget) if budget is not None else None
    rates, cost, count = plan(config, pictures, machines)
    ways: list[tuple[TrainConfig, Any]] = []
    for variant in variants(config) if limit is not None else []:
        ways.append((variant, plan(variant, pictures, machines)[1]))
    if as_json:
        answer: dict[str, Any] = {"pictures": count, "machines": machines, **asdict(cost), "total_seconds": cost.total_seconds}
        rows = [
            {"backbone": way.backbone, "unfreeze": way.unfreeze, "seconds": other.total_seconds, "disk_bytes": other.disk_bytes}
            for way, other in ways
        ]
        print_json({**answer, "rates": asdict(rates), "budget_seconds": limit, "ways": rows})
        return
    typer.echo(f"{count:,} pictures, {config.backbone}, --unfreeze {config.unfreeze}" + (f", {machines} machines" if machines > 1 else ""))
    for name, seconds in cost.seconds.items():
        typer.echo(f"  {name:20} {shown(seconds):>9}")
    typer.echo(f"  {'all':20} {shown(cost.total_seconds):>9}   disk {size(cost.disk_bytes)}, memory {size(cost.memory_bytes)}")
    frozen = f"frozen part {rates.features:,.0f}, " if rates.features else ""
    typer.echo(
        f"measured now, pictures/s: checking {rates.check:,.0f}, {frozen}training step {rates.train:,.0f}, answering {rates.answer:,.0f}"
    )
    for way, other in ways:
        fits = "fits" if limit is not None and other.total_seconds <= limit else "too long"
        typer.echo(f"  {way.backbone} --unfreeze {way.unfreeze}: {shown(other.total_seconds)}, {fits}")
