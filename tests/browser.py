"""Debian's chromium (or another), headless, for the tests of pages; they skip where there is none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)


def chromium() -> str:
    """The browser's path, or a skip."""
    found = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no chromium here: install it (Debian's package chromium) or set CHROMIUM to its path")
    return found


@contextmanager
def open_page(address: str, dark: bool = False, width: int = 1100, height: int = 900) -> Iterator[tuple[Any, list[str], list[str]]]:
    """(page, script errors so far, requests that left this machine so far); the page is loaded."""
    from playwright.sync_api import sync_playwright

    path = chromium()
    errors: list[str] = []
    outside: list[str] = []
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=path, args=list(FLAGS))
        try:
            page = browser.new_page(color_scheme="dark" if dark else "light", viewport={"width": width, "height": height})
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            home = address.split("/", 3)[2] if address.startswith("http") else ""

            def note(request: Any) -> None:
                if not request.url.startswith(("file:", "data:", "blob:")) and (not home or f"//{home}/" not in request.url):
                    outside.append(request.url)

            page.on("request", note)
            page.goto(address)
            yield page, errors, outside
        finally:
            browser.close()


def address_of(file: Path) -> str:
    return file.resolve().as_uri()
