"""Test the page in a real browser, served and as a static site: predictions, heatmaps of any class, phone, keyboard."""

from __future__ import annotations

import base64
import functools
import http.server
import re
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from seewhy.api import Run
from seewhy.deploy import static_site
from seewhy.errors import OutputError
from tests.browser import open_page
from tests.deploy.test_server import served

WAIT = 60_000  # milliseconds; the machine may be busy


def ready(page: Any) -> None:
    page.wait_for_selector("body[data-ready=yes]", timeout=WAIT)


def until(page: Any, condition: str) -> None:
    """Waits for it; the page's policy forbids Playwright's own way, which evaluates strings in the page."""
    ends = time.monotonic() + WAIT / 1000
    while not page.evaluate(condition):
        assert time.monotonic() < ends, condition
        page.wait_for_timeout(30)


def give(page: Any, *files: Path) -> None:
    """Through the file dialog's input, and until all are answered."""
    before = page.locator("#strip button").count()
    page.set_input_files("#files", [str(file) for file in files])
    until(page, f"document.querySelectorAll('#strip button').length === {before + len(files)}")
    until(page, "!document.body.classList.contains('busy')")


def shares(page: Any) -> dict[str, float]:
    """Class -> percent, as the bars say."""
    names, values = page.locator("#bars .name").all_inner_texts(), page.locator("#bars .share").all_inner_texts()
    return {name: float(value.strip("%<> ")) for name, value in zip(names, values, strict=True)}


def drawn(page: Any) -> Any:
    return page.evaluate("document.getElementById('image').toDataURL()")


@pytest.fixture(scope="module")
def address(demo_onnx: Path) -> Iterator[str]:
    with served(str(demo_onnx)) as (_, found):
        yield found


@contextmanager
def static(folder: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()


def agrees_with_the_run(page: Any, run: Run, images: list[Path], within: float) -> None:
    """Every image's bars against `predict`, in percent."""
    expected = run.predict(images)
    for n, button in enumerate(page.locator("#strip button").all()[-len(images) :]):
        button.click()
        for name, share in shares(page).items():
            known = 100 * expected.probs[n, run.classes.index(name.replace(" ", "_"))]
            assert share == pytest.approx(known, abs=within), (images[n], name)


def every_class_has_its_heatmap(page: Any) -> None:
    seen = {drawn(page)}
    for button in range(5):
        page.locator("#bars button").nth(button).click()
        assert page.locator("#bars button[aria-pressed=true]").count() == 1
        seen.add(drawn(page))
    assert len(seen) >= 4  # a class without any evidence looks like another one
    page.locator("#opacity").fill("0")
    clear = drawn(page)
    page.locator("#opacity").fill("75")
    assert clear not in {drawn(page)}


@pytest.mark.parametrize("dark", [False, True])
def test_served_page(address: str, demo_run: Run, demo_images: list[Path], dark: bool) -> None:
    with open_page(address, dark) as (page, errors, outside):
        ready(page)
        assert "8 classes; accuracy" in page.locator("#about").inner_text()
        give(page, *demo_images[::6])
        agrees_with_the_run(page, demo_run, demo_images[::6], within=0.1)
        every_class_has_its_heatmap(page)
        page.locator("#search").fill("tree")
        page.locator("#search").press("Tab")
        assert page.locator("#bars button[aria-pressed=true] .name").inner_text() == "tree"
        assert "tree" in page.locator("#caption").inner_text()
        overflow = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert (errors, outside, overflow) == ([], [], 0)


def test_unknown_images_and_bad_files_are_said_in_words(address: str, demo_images: list[Path], tmp_path: Path) -> None:
    noise = tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 260, 3), dtype=np.uint8)).save(noise)
    (tmp_path / "broken.jpg").write_bytes(demo_images[0].read_bytes()[:1000])
    with open_page(address) as (page, errors, outside):
        ready(page)
        give(page, noise)
        assert page.locator("#verdict").inner_text() == "Unlike the training images"
        assert re.match(r"The closest class is \w+ \([\d.]+%\)\. Do not rely on it\.", page.locator("#remark").inner_text())
        page.set_input_files("#files", str(tmp_path / "broken.jpg"))
        until(page, "document.getElementById('problem').textContent !== ''")
        assert page.locator("#problem").inner_text().startswith("broken.jpg: truncated; send JPEG")
        give(page, demo_images[0])  # and the next one is answered
        assert page.locator("#problem").inner_text() == ""
        assert outside == []
        assert all("422" in error for error in errors)  # the browser reports the refused request, nothing else


def test_dropped_pasted_and_taken_images(address: str, demo_images: list[Path]) -> None:
    hand_over = """([kind, data]) => {
        const transfer = new DataTransfer();
        const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
        transfer.items.add(new File([bytes], kind + ".jpg", { type: "image/jpeg" }));
        const paste = () => new ClipboardEvent("paste", { clipboardData: transfer });
        document.dispatchEvent(kind === "paste" ? paste() : new DragEvent("drop", { dataTransfer: transfer }));
    }"""
    data = base64.b64encode(demo_images[0].read_bytes()).decode()
    with open_page(address) as (page, errors, _):
        ready(page)
        for number, kind in enumerate(("paste", "drop"), start=1):
            page.evaluate(hand_over, [kind, data])
            until(page, f"document.querySelectorAll('#strip button').length === {number}")
        page.locator("#camera").click()
        until(page, "document.getElementById('video').videoWidth > 0")
        page.locator("#shoot").click()
        until(page, "document.querySelectorAll('#strip button').length === 3")
        assert not page.locator("#booth").is_visible()
        assert errors == []


def test_by_keyboard_on_a_phone(address: str, demo_images: list[Path]) -> None:
    with open_page(address, width=390, height=800) as (page, errors, _):
        ready(page)
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.id") == "choose"
        give(page, demo_images[0])
        assert page.evaluate("document.activeElement.id") == "verdict"  # a screen reader reads it now
        page.keyboard.press("Tab")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        assert page.locator("#bars button").nth(1).get_attribute("aria-pressed") == "true"
        assert page.evaluate("document.activeElement.dataset.number") == page.locator("#bars button").nth(1).get_attribute("data-number")
        usable = "[...document.querySelectorAll('button, input:not([hidden])')]"
        names = page.evaluate(f"{usable}.filter(e => !(e.innerText || e.ariaLabel || e.labels?.length)).length")
        assert names == 0  # everything that can be used has a name
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert errors == []


def test_static_folder_answers_in_the_browser(demo_run: Run, demo_onnx: Path, demo_images: list[Path], tmp_path: Path) -> None:
    if shutil.which("npm") is None:
        pytest.skip("no npm here to fetch onnxruntime-web with: install Node.js")
    try:
        folder = static_site.write_static_site(demo_onnx, tmp_path / "site")
    except OutputError as error:
        pytest.skip(f"onnxruntime-web cannot be had: {error}")
    with static(folder) as address, open_page(address) as (page, errors, outside):
        ready(page)
        give(page, *demo_images[::8])
        # The browser decodes JPEG a little differently, a grey level here and there.
        agrees_with_the_run(page, demo_run, demo_images[::8], within=3.0)
        every_class_has_its_heatmap(page)
        assert (errors, outside) == ([], [])
