"""The command line: results on stdout, one line and status 2 for every mistake, options that come from the config."""

from __future__ import annotations

import errno
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from seewhy import cli
from seewhy.api import Run
from seewhy.config import TrainConfig

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """call("predict", ...) -> (status, stdout, stderr), as the console script gives them."""

    def run(*arguments: object) -> tuple[int, str, str]:
        status = cli.run_guarded(lambda: cli.call([str(a) for a in arguments]))
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def boats(demo_set: Path) -> list[Path]:
    return sorted((demo_set / "images" / "boat").iterdir())[:6]


def assert_one_line(result: tuple[int, str, str], *words: str) -> None:
    status, out, err = result
    lines = [line for line in err.strip().splitlines() if line.startswith("seewhy: ")]
    assert (status, out, len(lines)) == (2, "", 1), err
    assert "Traceback" not in err
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "nosuch"], ["nosuch", "caltech101, scenes"]),
        (["train", "scene"], ["did you mean scenes"]),
        (["train"], ["name a dataset"]),
        (["train", "scenes", "--frobnicate"], ["--frobnicate", "train --help"]),
        (["train", "scenes", "--backbone", "resnet19"], ["resnet19", "did you mean resnet18"]),
        (["train", "scenes", "--unfreeze", "some"], ["unfreeze", "0, 1, 2"]),
        (["train", "scenes", "--protocol", "random"], ["protocol", "'caltech30'"]),
        (["train", "scenes", "--views", "-1"], ["views"]),
        (["train", "scenes", "--epochs", "many"], ["--epochs", "valid integer", "train --help"]),
        (["train", "scenes", "--set", "nonsense=1"], ["nonsense"]),
        (["train", "scenes", "--set", "lr"], ["name=value"]),
        (["train", "scenes", "--config", "no.yaml"], ["no.yaml", "no such config"]),
        (["train", "scenes", "--weights", "no.pth"], ["no.pth", "no such weights"]),
        (["train", "scenes", "--set", "mixup=mixup", "--set", "views=two"], ["views"]),
        (["evaluate", "runs/none"], ["runs/none", "no such run"]),
        (["predict", "runs/none", "a.jpg"], ["runs/none"]),
        (["predict"], ["RUN", "predict --help"]),
        (["nonsense"], ["nonsense"]),
    ],
)
def test_mistakes_are_one_line(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line(call(*arguments), *words)
    assert list(tmp_path.iterdir()) == []


def test_mistakes_with_a_run(call: Call, demo_run: Run, boats: list[Path], tmp_path: Path) -> None:
    assert_one_line(call("predict", demo_run.path, "nowhere.jpg"), "nowhere.jpg")
    assert_one_line(call("explain", demo_run.path, boats[0], "--target", "bat"), "bat", "did you mean boat")
    assert_one_line(call("explain", demo_run.path, boats[0], "--method", "gradcam--"), "gradcam--", "gradcam++")
    assert_one_line(call("evaluate", demo_run.path, "--part", "exam"), "exam", "train, val, test")
    assert_one_line(call("predict", demo_run.path, boats[0], "--out", tmp_path / "a.xls"), "a.xls", ".parquet")
    (tmp_path / "bad.jpg").write_text("no image")
    assert_one_line(call("predict", demo_run.path, tmp_path / "bad.jpg", boats[0]), "bad.jpg", "not an image", "--skip-bad")
    assert_one_line(call("explain", demo_run.path, tmp_path / "bad.jpg", "--out", tmp_path / "maps"), "bad.jpg")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jpg"]


def test_every_marked_field_is_an_option_and_help_fits(call: Call) -> None:
    status, out, _ = call("train", "--help")
    assert status == 0
    marked = [n for n, f in TrainConfig.model_fields.items() if isinstance(f.json_schema_extra, dict) and f.json_schema_extra["cli"]]
    assert len(marked) >= 12
    for name in marked:
        assert f"--{name.replace('_', '-')}" in out


def test_evaluate_prints_what_metrics_json_holds(call: Call, demo_run: Run) -> None:
    status, out, _ = call("evaluate", demo_run.path, "--json")
    assert status == 0
    assert json.loads(out) == {"test": json.loads((demo_run.path / "metrics.json").read_text())["test"]}
    status, out, _ = call("evaluate", demo_run.path)
    assert f"accuracy                 {demo_run.metrics['test']['accuracy']:.2%}" in out


def test_predict_table_json_and_files_agree(call: Call, demo_run: Run, boats: list[Path], tmp_path: Path) -> None:
    expected = demo_run.predict(boats).records(3)
    status, out, _ = call("predict", demo_run.path, boats[0].parent / "00[0-5].jpg", "--top-k", 3, "--json")
    assert status == 0
    assert json.loads(out) == expected
    call("predict", demo_run.path, *boats, "--top-k", 3, "--out", tmp_path / "a.csv")
    table = pd.read_csv(tmp_path / "a.csv")
    assert list(table["class_1"]) == [record["top"][0]["class"] for record in expected]
    assert table["prob_3"].tolist() == pytest.approx([record["top"][2]["prob"] for record in expected])
    status, out, _ = call("predict", demo_run.path, boats[0])
    assert out.startswith(f"{boats[0]}:  {expected[0]['top'][0]['class']} ")


def test_predict_skip_bad(call: Call, demo_run: Run, boats: list[Path], tmp_path: Path) -> None:
    (tmp_path / "bad.jpg").write_bytes(b"")
    status, out, err = call("predict", demo_run.path, tmp_path / "bad.jpg", boats[0], "--skip-bad", "--json")
    assert status == 0
    assert [record["path"] for record in json.loads(out)] == [str(boats[0])]
    assert "bad.jpg (empty file)" in err


def test_explain_writes_overlays(call: Call, demo_run: Run, boats: list[Path], tmp_path: Path) -> None:
    status, out, _ = call("explain", demo_run.path, *boats[:2], "--method", "gradcam", "--target", "fish", "--out", tmp_path, "--json")
    assert status == 0
    assert [record["class"] for record in json.loads(out)] == ["fish", "fish"]
    assert {path.name for path in tmp_path.iterdir()} == {"000.fish.gradcam.png", "001.fish.gradcam.png"}


def test_train_json_config_file_and_out(call: Call, demo_run: Run, tmp_path: Path) -> None:
    """A run from the demo run's own record, by --config: same numbers."""
    shutil.copy(demo_run.path / "run.json", tmp_path / "run.json")
    status, out, _ = call("train", "--config", tmp_path / "run.json", "--out", tmp_path / "again", "--json")
    assert status == 0
    answer = json.loads(out)
    assert answer["run"] == str(tmp_path / "again")
    assert answer["metrics"] == demo_run.metrics
    assert Path(answer["report"]).is_file()


def test_cache_lists_and_clears(call: Call, cache: Path) -> None:
    cache.mkdir()
    (cache / "features" / "abc").mkdir(parents=True)
    (cache / "features" / "abc" / "rows.bin").write_bytes(b"x" * 1000)
    _, out, _ = call("cache", "--json")
    assert json.loads(out)["entries"] == [{"name": "features/abc", "size_bytes": 1000}]
    assert call("cache", "--clear")[1].startswith("freed 0.0 MB")
    assert json.loads(call("cache", "--json")[1])["entries"] == []


def test_the_console_script_itself(tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("seewhy")
    version = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.startswith("seewhy 0.")
    bad = subprocess.run([script, "train", "nosuch"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.startswith("seewhy: nosuch")
    assert bad.stderr.count("\n") == 1


def test_help_does_not_import_torch() -> None:
    code = "import sys, seewhy.cli; sys.exit(bool({'torch', 'timm', 'lightning', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_explain_scores_and_compares_with_baselines(call: Call, demo_run: Run, boats: list[Path], tmp_path: Path) -> None:
    status, out, _ = call("explain", demo_run.path, boats[0], "--evaluate", "--method", "gradcam", "--out", tmp_path / "scores", "--json")
    assert status == 0
    answer = json.loads(out)
    rows = answer["scores"]
    assert answer["sanity"][0]["randomised_to"] == "classifier"
    assert {row["method"] for row in rows} == {
        "gradcam",
        "random",
        "centre",
        "object area (chance level)",
    }  # the demo set knows its outlines
    assert {row["score"] for row in rows} >= {
        "average drop",
        "confidence increase",
        "deletion AUC",
        "insertion AUC",
        "ROAD",
        "pointing game",
        "energy-based pointing game",
    }
    assert all(row["low"] <= row["mean"] <= row["high"] for row in rows)
    assert sorted(path.name for path in (tmp_path / "scores").iterdir()) == ["sanity.csv", "scores.csv", "scores.png"]
    status, out, _ = call("explain", demo_run.path, boats[0], "--evaluate", "--out", tmp_path / "scores")
    assert status == 0
    assert "gradcam" in out
    assert "ROAD +" in out
    assert "randomised" in out
    assert_one_line(call("explain", demo_run.path, boats[0], "--evaluate", "--method", "gradcam--"), "gradcam--", "gradcam++")
    assert_one_line(call("explain", demo_run.path, boats[0], "--evaluate", "--target", "boat"), "--target", "leave")


def test_explain_by_several_methods_writes_an_overlay_each(call: Call, demo_run: Run, boats: list[Path], tmp_path: Path) -> None:
    options = ("--method", "gradcam", "--method", "occlusion", "--out", tmp_path / "maps", "--json")
    status, out, _ = call("explain", demo_run.path, boats[0], *options)
    assert status == 0
    records = json.loads(out)
    assert [record["method"] for record in records] == ["gradcam", "occlusion"]
    assert sorted(Path(record["overlay"]).name for record in records) == sorted(path.name for path in (tmp_path / "maps").iterdir())


def test_a_light_installation_says_what_is_missing() -> None:
    code = (
        "import sys\nfor name in ('torch', 'lightning'): sys.modules[name] = None\n"
        "from seewhy.cli import call, run_guarded\nsys.exit(run_guarded(lambda: call(['train', 'scenes'])))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert re.fullmatch(r"seewhy: this needs \w+, which is not installed; the full installation \(README\) brings it\n", done.stderr)


# ---------------------------------------------------------------- trust


def test_predict_says_nothing_where_unsure(call: Call, demo_run: Run, boats: list[Path], tmp_path: Path) -> None:
    table = demo_run.predict(boats).table(1)
    least = float(table["prob_1"].median())
    status, out, _ = call("predict", demo_run.path, *boats, "--min-confidence", least, "--json")
    answers = [record["decision"] for record in json.loads(out)]
    assert status == 0
    assert answers == [c if p >= least else None for c, p in zip(table["class_1"], table["prob_1"], strict=True)]
    assert None in answers
    status, out, _ = call("predict", demo_run.path, *boats, "--min-confidence", least)
    assert out.count("unsure: ") == answers.count(None)
    call("predict", demo_run.path, *boats, "--target-precision", 0.8, "--out", tmp_path / "a.csv")
    written = pd.read_csv(tmp_path / "a.csv").fillna("")
    assert (
        written["decision"]
        == [c if p >= demo_run.threshold_for(0.8) else "" for c, p in zip(table["class_1"], table["prob_1"], strict=True)]
    ).all()
    assert_one_line(call("predict", demo_run.path, *boats, "--target-precision", 0.999), "no probability promises")
    assert_one_line(call("predict", demo_run.path, *boats, "--target-precision", 0.9, "--min-confidence", 0.5), "give one of them")


def test_audit_prints_what_it_writes(call: Call, boats: list[Path], tmp_path: Path) -> None:
    for name, files in (("a", boats[:4]), ("b", boats[2:])):
        (tmp_path / "data" / name).mkdir(parents=True)
        for file in files:
            shutil.copy(file, tmp_path / "data" / name)
    status, out, _ = call("audit", tmp_path / "data", "--out", tmp_path / "audit", "--seeds", 2)
    assert status == 0
    assert "across labels    2 pairs" in out
    summary = json.loads((tmp_path / "audit" / "audit.json").read_text())
    assert summary["pairs"]["exact"] == 2
    status, out, _ = call("audit", tmp_path / "data", "--out", tmp_path / "audit", "--seeds", 2, "--json")
    assert json.loads(out) == {"audit": str(tmp_path / "audit"), **summary}
    assert_one_line(call("audit", tmp_path / "nowhere"), "no such folder or dataset")


def test_compare_and_robustness_print_tables(call: Call, demo_run: Run, tmp_path: Path) -> None:
    status, out, _ = call("compare", demo_run.path, demo_run.path)
    assert status == 0
    assert "96 images that neither run was trained on" in out
    assert "McNemar's exact test p = 1" in out
    status, out, _ = call("robustness", demo_run.path, "--images", 8, "--corruption", "jpeg", "--out", tmp_path)
    assert status == 0
    assert "n = 8" in out
    assert (tmp_path / "robustness.csv").is_file()
    assert_one_line(call("robustness", demo_run.path, "--corruption", "fog"), "unknown corruption 'fog'")


@pytest.mark.usefixtures("without_report")
def test_repeats_print_mean_and_spread(call: Call, make_folder: Callable[..., Path], tmp_path: Path) -> None:
    data = make_folder({"cat": 10, "dog": 10})
    options = ["--backbone", "efficientnet_lite0", "--unfreeze", 0, "--epochs", 1, "--group-by", "exact", "--repeats", 2]
    status, out, _ = call("train", data, *options, "--out", tmp_path / "many")
    assert status == 0
    assert "±" in out
    assert sorted(path.name for path in (tmp_path / "many").iterdir()) == ["repeats.csv", "repeats.json", "seed0", "seed1"]


def test_images_of_nothing_known_are_flagged(call: Call, demo_run: Run, boats: list[Path], tmp_path: Path) -> None:
    """Noise and grey are told from boats; on the test part about 5% are flagged, as the threshold has it on val."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (200, 200, 3), dtype=np.uint8)).save(tmp_path / "noise.png")
    Image.new("RGB", (200, 200), (128, 128, 128)).save(tmp_path / "grey.png")
    status, out, _ = call("predict", demo_run.path, tmp_path, *boats, "--json")
    assert status == 0
    flags = {Path(record["path"]).name: record["ood"] for record in json.loads(out)}
    assert flags.pop("noise.png")
    assert flags.pop("grey.png")
    assert sum(flags.values()) <= 1
    unknowns = demo_run.manifest["ood"]
    assert unknowns["val_flagged"] <= 0.05
    assert unknowns["test_flagged"] <= 0.15
    _, out, _ = call("predict", demo_run.path, tmp_path / "noise.png")
    assert "out-of-distribution: " in out


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), "Connection reset by peer; check the network"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "Name or service not known; check the network"),
        (TimeoutError(errno.ETIMEDOUT, "Connection timed out"), "Connection timed out; check the network"),
        (OSError(errno.EHOSTUNREACH, "No route to host"), "No route to host; check the network"),
        (OSError(errno.EIO, "Input/output error", "a.jpg"), "a.jpg: Input/output error; check the disk and its permissions"),
    ],
)
def test_a_network_that_fails_is_not_called_a_disk(error: OSError, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise error

    assert cli.run_guarded(fail) == 2
    assert capsys.readouterr().err == f"seewhy: {line}\n"
