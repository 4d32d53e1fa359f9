"""Test the table of methods and scores on a network whose evidence is known: intervals, baselines, written files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.stats import bootstrap

from seewhy.errors import ConfigError, OutputError
from seewhy.evaluation.metrics import mean_interval
from seewhy.explain import method_comparison
from seewhy.explain.faithfulness import FAITHFULNESS_METRICS
from seewhy.explain.method_comparison import beats_baselines, pivot_scores, sanity_check, score_methods
from seewhy.reports.tables import save_scores
from tests.cheap_run import cheap_run
from tests.explain.test_explainer import colour_run

CHEAP = ("average drop", "confidence increase", "deletion AUC", "insertion AUC")


@pytest.fixture
def corners(tmp_path: Path) -> Path:
    """18 dark images with a coloured block in a corner, and its mask."""
    rng = np.random.default_rng(0)
    for n in range(18):
        left, top = (int(v) for v in rng.choice([0, 56], 2))
        image, mask = Image.new("RGB", (80, 80), (20, 20, 20)), Image.new("L", (80, 80))
        image.paste([(250, 10, 10), (10, 10, 250)][n % 2], (left, top, left + 24, top + 24))
        mask.paste(255, (left, top, left + 24, top + 24))
        for drawn, kind, suffix in ((image, "images", "png"), (mask, "masks", "png")):
            (tmp_path / kind / "block").mkdir(parents=True, exist_ok=True)
            drawn.save(tmp_path / kind / "block" / f"{n:02d}.{suffix}")
    return tmp_path / "images"


def test_a_network_that_looks_at_the_block_is_seen_to(corners: Path) -> None:
    table = score_methods(colour_run(), [corners], ["gradcam", "eigencam"], CHEAP)
    assert set(table["method"]) == {"gradcam", "eigencam", "random", "centre", "object area (chance level)"}
    assert set(table["n"]) == {18}
    found = table.set_index(["method", "score"])["mean"]
    assert found["gradcam", "pointing game"] == 1
    assert found["object area (chance level)", "energy-based pointing game"] == pytest.approx((24 / 80) ** 2, abs=0.01)
    assert found["gradcam", "energy-based pointing game"] > 3 * found["centre", "energy-based pointing game"]
    assert found["gradcam", "deletion AUC"] < found["random", "deletion AUC"]
    assert found["gradcam", "insertion AUC"] > found["random", "insertion AUC"]
    better = beats_baselines(table)
    assert better["gradcam", "pointing game"]
    assert better["gradcam", "energy-based pointing game"]
    assert not any(name in ("random", "centre", "object area (chance level)") for name, _ in better)


def test_images_without_outline_are_scored_without(tmp_path: Path) -> None:
    Image.new("RGB", (60, 60), "red").save(tmp_path / "a.png")
    table = score_methods(colour_run(), [tmp_path / "a.png"], ["gradcam"], ["average drop"])
    assert set(table["score"]) == {"average drop"}
    assert table["n"].tolist() == [1, 1, 1]
    assert (table["low"] == table["mean"]).all()  # one image has no spread


def test_methods_that_give_one_map_are_scored_once(corners: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With average pooling and a linear head Grad-CAM, HiResCAM and XGrad-CAM are one map, up to rounding."""
    processed: list[int] = []
    score = method_comparison.class_probabilities

    def counted(*args: Any) -> Any:
        processed.append(1)
        return score(*args)

    run = cheap_run(size=64)
    alone = score_methods(run, [corners], ["xgradcam"], ["average drop"])
    monkeypatch.setattr(method_comparison, "class_probabilities", counted)
    table = score_methods(run, [corners], ["gradcam", "hirescam", "xgradcam", "eigencam"], ["average drop"])
    batches = 2  # 18 images
    assert len(processed) == batches * (1 + 1 + 2)  # the one map, EigenCAM's, and the two that know nothing
    found = table[table["score"] == "average drop"].set_index("method")["mean"]
    assert found["gradcam"] == found["hirescam"] == found["xgradcam"] != found["eigencam"]
    assert found["xgradcam"] == pytest.approx(alone.set_index(["method", "score"])["mean"]["xgradcam", "average drop"], abs=1e-4)


def test_a_method_that_does_not_beat_the_centre_is_shown_not_to() -> None:
    rows = [("good", 0.9, 0.8, 0.95), ("no better", 0.55, 0.45, 0.65), ("random", 0.3, 0.2, 0.4), ("centre", 0.5, 0.4, 0.6)]
    table = pd.DataFrame(
        [{"method": m, "score": "pointing game", "better": "higher", "mean": x, "low": a, "high": b, "n": 9} for m, x, a, b in rows]
    )
    assert beats_baselines(table) == {("good", "pointing game"): True, ("no better", "pointing game"): False}
    assert beats_baselines(table.assign(better="lower")) == {("good", "pointing game"): False, ("no better", "pointing game"): False}
    shown = pivot_scores(table)["pointing game +"]
    assert shown["good"] == "0.900 (0.800 to 0.950) *"
    assert shown["no better"] == "0.550 (0.450 to 0.650)"


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown method 'gradcma'; use one of gradcam"):
        score_methods(colour_run(), [tmp_path], ["gradcma"])
    with pytest.raises(ConfigError, match="unknown score 'beauty'; use one of average drop"):
        score_methods(colour_run(), [tmp_path], ["gradcam"], ["beauty"])
    with pytest.raises(ConfigError, match="unknown method 'gradcma'"):
        sanity_check(colour_run(), [tmp_path], ["gradcma"])


def test_table_and_figure_are_written(corners: Path, tmp_path: Path) -> None:
    table = score_methods(colour_run(), [corners / "block" / "00.png"], ["gradcam"], ["average drop"])
    sanity = pd.DataFrame([{"method": "gradcam", "spearman_mean": 0.1}])
    csv, png, other = save_scores(table, sanity, tmp_path / "out" / "deeper")
    pd.testing.assert_frame_equal(pd.read_csv(other), sanity)
    pd.testing.assert_frame_equal(pd.read_csv(csv), table, check_exact=False)
    assert Image.open(png).width > 400
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be written"):
        save_scores(table, sanity, tmp_path / "file")


def test_interval_of_the_mean_is_scipys_percentile_bootstrap() -> None:
    values = np.random.default_rng(0).exponential(size=60)
    low, high = mean_interval(values, resamples=20_000)
    reference = bootstrap((values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(1)).confidence_interval
    assert (low, high) == pytest.approx((reference.low, reference.high), rel=0.02)
    assert low < values.mean() < high


def test_every_score_says_which_way_is_better() -> None:
    assert {score.better for score in FAITHFULNESS_METRICS.values()} == {"higher", "lower"}


# ---------------------------------------------------------------- the network forgets


def test_maps_of_a_forgetting_network_lose_their_likeness(tmp_path: Path) -> None:
    run = cheap_run()
    before = {key: value.clone() for key, value in run.backbone.model.state_dict().items()}
    for n in range(4):
        Image.fromarray(np.random.default_rng(n).integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(tmp_path / f"{n}.png")
    table = sanity_check(run, [tmp_path], ["gradcam", "eigencam"], layers=["layer3"])
    assert table["n"].tolist() == [4] * len(table)
    found = table.set_index(["method", "randomised_to"])["spearman_mean"]
    assert found["gradcam"].index[0] == "fc"
    assert found["gradcam"].index[1].startswith("layer4")
    # EigenCAM at layer3 knows neither the classifier nor layer4, so it cannot notice; Grad-CAM does at once.
    assert found["eigencam"].iloc[1] == pytest.approx(1, abs=1e-6)
    assert found["eigencam"].iloc[-1] < 0.9
    assert found["gradcam"].iloc[0] < 0.9
    assert all(torch.equal(value, before[key]) for key, value in run.backbone.model.state_dict().items())
    alone = sanity_check(run, [tmp_path], ["gradcam"], layers=["layer3"], parts=1)
    assert alone["randomised_to"].tolist() == ["fc"]
    again = sanity_check(run, [tmp_path], ["gradcam"], layers=["layer3"])
    np.testing.assert_allclose(again["spearman_mean"], found["gradcam"], atol=1e-6)
