"""The pages in a real browser: no script errors, nothing fetched, sorting and zooming work, light and dark differ."""

from __future__ import annotations

from pathlib import Path

import pytest

from seewhy.api import Run
from seewhy.curation.audit import audit_images
from seewhy.data.image_set import open_images
from seewhy.reports.audit_report import save_audit
from tests.browser import address_of, open_page


@pytest.mark.parametrize("dark", [False, True])
def test_report_in_a_browser(demo_run: Run, dark: bool) -> None:
    file = demo_run.path / "report.html"
    assert file.stat().st_size < 15_000_000
    with open_page(address_of(file), dark) as (page, errors, outside):
        assert page.locator("h2").all_inner_texts()[-1] == "How to reproduce"
        recalls = "#classes tbody td:nth-child(3)"
        page.get_by_role("button", name="recall %").click()
        found = [float(text) for text in page.locator(recalls).all_inner_texts()]
        assert found == sorted(found)
        page.get_by_role("button", name="recall %").click()
        assert [float(text) for text in page.locator(recalls).all_inner_texts()] == found[::-1]
        width = page.locator("#matrix").bounding_box()["width"]
        page.get_by_role("button", name="2×").click()
        assert page.locator("#matrix").bounding_box()["width"] == pytest.approx(2 * width, rel=0.02)
        assert page.locator("#matrix title").first.text_content().startswith("boat predicted as boat: ")
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == ("rgb(15, 17, 22)" if dark else "rgb(244, 245, 248)")
        figures = page.evaluate("[...document.querySelectorAll('picture')].map(p => p.children[1].currentSrc === p.children[0].srcset)")
        assert figures == [dark] * 3  # each has a dark variant, shown in dark mode only
        broken = page.evaluate("[...document.images].filter(image => image.complete && !image.naturalWidth).length")
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert (errors, outside, broken, overflow) == ([], [], 0, 0)


def test_pages_fit_a_phone(demo_run: Run) -> None:
    with open_page(address_of(demo_run.path / "report.html"), width=390) as (page, errors, _):
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert errors == []


@pytest.mark.usefixtures("demo_set")
def test_audit_page_in_a_browser(tmp_path: Path) -> None:
    save_audit(audit_images(open_images("scenes"), seeds=2), tmp_path)
    with open_page(address_of(tmp_path / "audit.html"), width=390) as (page, errors, outside):
        assert page.locator("h1").inner_text() == "Audit of scenes"
        broken = page.evaluate("[...document.images].filter(image => image.complete && !image.naturalWidth).length")
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert (errors, outside, broken, overflow) == ([], [], 0, 0)
