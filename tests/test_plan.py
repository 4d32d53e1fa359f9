"""What a run will take: the arithmetic by hand, and a plan beside the run itself."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from seewhy import cli
from seewhy.api import Run
from seewhy.cli_plan import seconds_of, shown
from seewhy.config import make_config
from seewhy.errors import ConfigError, DataError
from seewhy.plan import PICTURE_BYTES, REPORT_S, START_S, Rates, cost_of, plan, variants

RATES = Rates(check=100, features=50, embed=200, train=10, answer=40, row_bytes=1000, weight_bytes=5_000, base_bytes=10**9)


def config(**options: object):
    return make_config(**{"data": "x", "backbone": "resnet18", "epochs": 2, "test_flip": False, **options}).resolved()


def test_a_cached_run_by_hand() -> None:
    cost = cost_of(RATES, config(views=2), 1000)
    assert cost.seconds == {
        "start": START_S,
        "checking pictures": 10.0,  # 1,000 at 100 a second
        "near-duplicates": 5.0,
        "features": (2 * 700 + 300) / 50,  # two views of 700, one of 100 + 200
        "fit": 2 * (700 / 10 + 100 / 40),
        "evaluation": (300 + 700 + 300) / 40,  # val and test, then the references and both again for what is unknown
        "report": REPORT_S,
    }
    assert cost.disk_bytes == 1700 * 1000 + 1280 * 4 * 1000 + 5_000
    assert cost.memory_bytes == 10**9 + 1000 * PICTURE_BYTES + 30_000
    assert cost.total_seconds == pytest.approx(START_S + REPORT_S + 10 + 5 + 34 + 145 + 32.5)


def test_what_changes_the_cost() -> None:
    base = cost_of(RATES, config(), 1000)
    assert cost_of(RATES, config(), 1000, machines=2).seconds["features"] == base.seconds["features"] / 2
    assert cost_of(RATES, config(), 1000, machines=2).seconds["fit"] == base.seconds["fit"] / 2
    assert cost_of(RATES, config(unfreeze=0, views=2), 1000, machines=4).seconds["fit"] == 2 * (700 / 10 + 100 / 40)  # one process for all
    assert cost_of(RATES, config(unfreeze=0, views=0), 1000, machines=4).seconds["fit"] == pytest.approx(
        2 * (700 * (1 / 10 + 1 / 50) + 100 / 40 + 100 / 50) / 4  # pictures are decoded by all of them
    )
    assert cost_of(RATES, config(test_flip=True), 1000).seconds["features"] == (2 * 700 + 2 * 300) / 50
    assert "near-duplicates" not in cost_of(RATES, config(group_by="exact"), 1000).seconds
    assert "near-duplicates" not in cost_of(RATES, config(), 100_000).seconds
    fresh = cost_of(RATES, config(views=0), 1000)
    assert fresh.seconds["fit"] == pytest.approx(2 * (700 * (1 / 10 + 1 / 50) + 100 / 40 + 100 / 50))  # the frozen part in each epoch
    assert fresh.disk_bytes == 1280 * 4 * 1000 + 5_000
    lite = cost_of(RATES, config(backbone="efficientnet_lite0", unfreeze=0, views=2), 1000)
    assert lite.seconds["features"] == (2 * 700 + 300 - 1000) / 50  # the plain views are there from looking for near-duplicates
    ten = cost_of(RATES, config(group_by="exact"), 10_000)
    one = cost_of(RATES, config(group_by="exact"), 1_000)
    assert ten.seconds["features"] == 10 * one.seconds["features"]


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("15m", 900), ("1.5h", 5400), ("2 d", 172_800)])
def test_budgets(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "15", "m", "-3m", "1e9h", "15 minutes"])
def test_budgets_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="write it as 90s, 15m, 2h or 1d"):
        seconds_of(text)


def test_times_in_the_unit_that_fits() -> None:
    assert [shown(s) for s in (3.4, 89, 91, 3600, 7200, 200_000)] == ["3 s", "89 s", "1.5 min", "60.0 min", "2.0 h", "2.3 d"]


def test_ways_to_spend_a_budget() -> None:
    ways = variants(config())
    assert [(way.backbone, way.unfreeze) for way in ways] == [
        ("resnet18", 0),
        ("resnet18", 1),
        ("efficientnet_lite0", 0),
        ("efficientnet_lite0", 1),
    ]
    assert {way.resolved().epochs for way in ways} == {40, 8}  # each with its own recipe


def test_a_plan_beside_the_run(demo_run: Run) -> None:
    """Within the noise of a busy machine; disk to the byte but for figures and report."""
    rates, cost, count = plan(demo_run.config)
    assert count == 480
    took = demo_run.manifest["seconds"]["total"]
    assert took / 6 < cost.total_seconds < 6 * took + START_S
    assert rates.row_bytes == 1280 * 4
    assert 0 < rates.embed < math.inf
    rows = 2 * 336 + 48 + 96
    assert cost.disk_bytes == rows * 1280 * 4 + rates.weight_bytes
    assert rates.weight_bytes == pytest.approx((demo_run.path / "model.safetensors").stat().st_size, rel=0.02)


@pytest.mark.usefixtures("demo_set")
def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.run_guarded(
            lambda: cli.call(["plan", "scenes", "--backbone", "efficientnet_lite0", "--unfreeze", "0", "--pictures", "5000", "--json"])
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["pictures"] == 5000
    assert found["total_seconds"] == pytest.approx(sum(found["seconds"].values()))


def test_data_that_is_none(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match="none of 2 pictures drawn from it can be used"):
        plan(make_config(data=str(tmp_path)))
