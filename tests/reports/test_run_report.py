"""report.html: one file, everything inside, nothing fetched, hostile names escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from seewhy.api import Run
from seewhy.evaluation.evaluate import Evaluation
from seewhy.reports.run_report import confused_pairs, other_class, pick_examples


@pytest.fixture
def html(demo_run: Run) -> str:
    return (demo_run.path / "report.html").read_text(encoding="utf-8")


def test_it_is_self_contained_and_small(html: str, demo_run: Run) -> None:
    addresses = re.findall(r'(?:src|href|srcset)="([^"]{0,30})', html)
    assert addresses
    assert all(address.startswith("data:image/") for address in addresses)
    assert "http://" not in html
    assert "https://" not in html
    assert (demo_run.path / "report.html").stat().st_size < 15e6


def test_tags_are_balanced(html: str) -> None:
    class Balance(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []

        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in ("meta", "img", "br", "source", "!doctype"):
                self.open.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.open.pop() == tag

    balance = Balance()
    balance.feed(html)
    assert balance.open == []


def test_it_tells_the_numbers_of_the_run(html: str, demo_run: Run) -> None:
    test = demo_run.metrics["test"]
    assert f"<b>{100 * test['accuracy']:.1f}%</b>" in html
    for row in test["per_class"]:
        assert f'<td class="left">{row["class"]}</td>' in html
    assert demo_run.manifest["data"]["hash"][:16] in html
    assert "scenes classified with efficientnet_lite0" in html
    assert f"{100 * demo_run.manifest['ood']['test_flagged']:.1f}% are flagged" in html


def evaluation(labels: list[int], logits: list[list[float]], classes: tuple[str, ...]) -> Evaluation:
    paths = tuple(f"p{n}.jpg" for n in range(len(labels)))
    return Evaluation("test", paths, np.array(labels), np.array(logits, dtype=np.float32), classes, np.arange(len(labels)))


def test_examples_by_hand() -> None:
    logits = [[5, 0], [9, 0], [0, 3], [4, 0], [0, 8]]
    test = evaluation([0, 0, 1, 1, 0], logits, ("a", "b"))
    assert pick_examples(test) == {
        "Confident and correct": [1, 2],  # the surest one of each class
        "Confident and wrong": [4, 3],  # the surest first
        "Least confident": [0],  # what is left
    }
    assert [other_class(test, n) for n in (0, 4)] == [1, 0]  # the second of a right answer, the true one of a wrong one


def test_confused_pairs_by_hand() -> None:
    found = confused_pairs(evaluation([0, 0, 0, 1], [[0, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]], ("a", "b", "c")))
    assert found == [
        {"true": "a", "predicted": "b", "count": 2, "paths": ["p0.jpg", "p1.jpg"]},
        {"true": "b", "predicted": "c", "count": 1, "paths": ["p3.jpg"]},
    ]


def test_hostile_names_are_escaped(demo_run: Run, tmp_path: Path) -> None:
    """A class called <script> must not become one."""
    import dataclasses

    from seewhy.reports.run_report import write_report

    hostile = "<script>alert(1)</script>"
    classes = (hostile, *demo_run.classes[1:])
    test = demo_run.evaluate()
    renamed = dataclasses.replace(test, classes=classes)
    manifest = {**demo_run.manifest, "metrics": {**demo_run.metrics, "test": renamed.metrics}}
    run = dataclasses.replace(demo_run, classes=classes, manifest=manifest)
    history = [{"epoch": 1.0, "train_loss": 1.0, "val_loss": 1.0, "train_accuracy": 0.5, "val_accuracy": 0.5}]
    write_report(run, history, renamed, tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert hostile not in text
    assert "&lt;script&gt;alert(1)" in text
