"""Two runs on the same images, and one recipe on several splits."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import seewhy
from seewhy.api import Run
from seewhy.config import make_config
from seewhy.errors import ConfigError, OutputError, RunError
from seewhy.evaluation.comparison import compare_runs, differences
from seewhy.training.repeats import repeat, spread


@pytest.mark.usefixtures("without_report")
def test_a_run_against_a_worse_one_and_against_itself(demo_run: Run, tmp_path: Path) -> None:
    worse = seewhy.train(
        "scenes", backbone="efficientnet_lite0", unfreeze=0, epochs=1, lr=1e-5, split_from=str(demo_run.path), out=tmp_path / "worse"
    )
    found = compare_runs(worse, demo_run)
    assert found.paired.n == demo_run.metrics["test"]["n"]
    assert found.b.metrics["accuracy"] == pytest.approx(demo_run.metrics["test"]["accuracy"])
    assert found.paired.difference == pytest.approx(found.b.metrics["accuracy"] - found.a.metrics["accuracy"])
    assert found.paired.difference > 0.2
    assert found.paired.low > 0
    assert found.paired.p_value < 0.001
    same = compare_runs(demo_run, demo_run)
    assert (same.paired.only_a, same.paired.only_b, same.paired.p_value) == (0, 0, 1.0)
    differ = differences(demo_run, worse)
    assert differ.keys() == {"config.epochs", "config.lr", "config.split_from"}
    assert differ["config.epochs"] == (40, 1)
    assert differences(demo_run, demo_run) == {}


def test_other_machines_are_told(demo_run: Run) -> None:
    manifest = json.loads(json.dumps(demo_run.manifest))
    manifest["versions"]["torch"] = "1.0"
    manifest["hardware"]["threads"] = 64
    manifest["data"]["hash"] = "0" * 64
    manifest["data"]["grey"] = -1  # follows from the hash
    other = dataclasses.replace(demo_run, manifest=manifest)
    assert differences(demo_run, other).keys() == {"versions.torch", "hardware.threads", "data.hash"}


def test_runs_that_cannot_be_compared(demo_run: Run) -> None:
    other = dataclasses.replace(demo_run, classes=("boat", "zebra"))
    with pytest.raises(RunError, match=r"different classes \(only one has 'car'\)"):
        compare_runs(demo_run, other)


@pytest.mark.usefixtures("without_report")
def test_repeats_are_other_splits_and_can_be_resumed(make_folder: Callable[..., Path], tmp_path: Path, cache: Path) -> None:
    data = make_folder({"cat": 12, "dog": 12})
    config = make_config(data=str(data), backbone="efficientnet_lite0", unfreeze=0, epochs=2, group_by="exact")
    folder, table = repeat(config, 2, tmp_path / "many")
    assert table["seed"].tolist() == [0, 1]
    splits = [json.loads((folder / f"seed{seed}" / "split.json").read_text()) for seed in (0, 1)]
    assert splits[0]["test"] != splits[1]["test"]
    record = json.loads((folder / "repeats.json").read_text())
    assert record["n"] == 2
    assert record["test_accuracy"]["mean"] == pytest.approx(table["test_accuracy"].mean())
    with pytest.raises(OutputError, match="exists already"):
        repeat(config, 2, tmp_path / "many")
    _, longer = repeat(config, 3, tmp_path / "many", resume=True)
    pd.testing.assert_frame_equal(longer[:2], table)


def test_repeats_of_one_split_are_refused(tmp_path: Path) -> None:
    config = make_config(data="scenes", split_from=str(tmp_path))
    with pytest.raises(ConfigError, match="--split-from reads one"):
        repeat(config, 2, tmp_path / "x")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="exists already"):
        repeat(make_config(data="scenes"), 2, tmp_path / "file")


def test_spread_by_hand() -> None:
    table = pd.DataFrame({"seed": [3, 4, 5], "test_accuracy": [0.9, 0.95, 0.94]})
    assert spread(table) == {"test_accuracy": {"mean": pytest.approx(0.93), "sd": pytest.approx(statistics.stdev([0.9, 0.95, 0.94]))}}
    assert spread(table[:1])["test_accuracy"]["sd"] is None
    assert np.isfinite(spread(table)["test_accuracy"]["mean"])
