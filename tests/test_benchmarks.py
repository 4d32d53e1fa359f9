"""The benchmarks' own arithmetic, and that each of them answers --help: their numbers are made elsewhere."""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import common  # noqa: E402  # lies beside the benchmarks


def test_candidates_take_turns_and_warm_up_once() -> None:
    calls: list[str] = []
    seconds = common.interleave({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert [len(times) for times in seconds.values()] == [2, 2]


def test_rates_and_ratios_by_hand() -> None:
    seconds = {"ours": [2.0, 4.0, 1.0], "peer": [4.0, 4.0, 5.0]}
    assert common.rates(seconds, 100) == {"ours": 50.0, "peer": 25.0}
    assert common.ratio(seconds, "peer", "ours") == 2.0  # the median of 2, 1 and 5


def test_measured_process() -> None:
    code = "import json, time; block = bytearray(300_000_000); time.sleep(0.3); print('words'); print(json.dumps({'n': 3}))"
    began = time.perf_counter()
    found = common.measure([sys.executable, "-c", code])
    assert 0.3 <= found["seconds"] <= time.perf_counter() - began + 0.01
    assert found["answer"] == {"n": 3}
    assert 0.25 < found["own_gb"] <= found["peak_gb"] + 0.01


def test_a_failing_process_is_no_measurement() -> None:
    with pytest.raises(SystemExit, match="status 3"):
        common.measure([sys.executable, "-c", "raise SystemExit(3)"])


def test_results_are_rendered_in_the_order_of_their_columns() -> None:
    entry = {
        "question": "How many?",
        "rows": [{"b": 1, "a": 2}, {"b": 3}],
        "hardware": {"cpu": "Some", "cores": 2, "memory_gb": 4.0, "gpu": None},
        "versions": {"python": "3", "torch": "2", "timm": "1", "onnxruntime": "1"},
        "command": "python benchmarks/x.py",
        "date": "2026-01-01",
    }
    text = common.render({"x": json.loads(json.dumps(entry))})
    assert "## How many?\n\n| b | a |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |" in text
    assert "`python benchmarks/x.py`, 2026-01-01, Some, 2 cores, 4.0 GB, GPU: none" in text


@pytest.mark.parametrize("file", sorted(path.name for path in BENCHMARKS.glob("*.py") if path.stem not in ("common", "ood_scores")))
def test_every_benchmark_has_a_quick_answer(file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Run as `python benchmarks/FILE --help` runs it, but in this process, which has imported the large packages already."""
    text = (BENCHMARKS / file).read_text()
    assert '"--quick"' in text
    assert f"python benchmarks/{file}" in text.split('"""')[1]  # how to run it stands at its head
    monkeypatch.setattr(sys, "argv", [file, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARKS / file), run_name="__main__")
    assert ended.value.code == 0
    assert "--quick" in capsys.readouterr().out


def test_times_of_another_processor_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(common, "FOLDER", tmp_path)
    entry = {"rows": [{"images/s": 1}], "command": "python x.py"}
    for cpu, speed in (("Slow", 1), ("Fast", 2), ("Fast", 3), ("Slow", 4)):
        monkeypatch.setattr("seewhy.models.saved_run.hardware", lambda cpu=cpu: {"cpu": cpu, "cores": 2, "memory_gb": 4.0, "gpu": None})
        common.record("x", "How fast?", {**entry, "rows": [{"images/s": speed}]})
    kept = {name: entry["rows"][0]["images/s"] for name, entry in json.loads(common.RESULTS.read_text()).items()}
    assert kept == {"x": 4, "x | Fast": 3}
    assert "## How fast?, on Fast\n" in (tmp_path / "RESULTS.md").read_text()
