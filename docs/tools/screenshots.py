"""Take the screenshots of the documentation: report, audit page and server page of the demo set, light and dark.

python docs/tools/screenshots.py   trains the demo run into a temporary folder; needs Chromium and the extra `dev`
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

IMAGES = Path(__file__).parents[1] / "images"
SIZE = {"width": 1100, "height": 820}
SEEWHY = [sys.executable, "-m", "seewhy.cli"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def wait_for(port: int, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(f"no server at port {port} after {seconds:g} s")


def shoot(browser: Any, address: str, name: str, image: Path | None = None, scroll: int = 0) -> None:
    """name-light.png and name-dark.png. image: given to the server's page first. scroll: pixels from the top."""
    for theme in ("light", "dark"):
        page = browser.new_page(color_scheme=theme, viewport=SIZE)
        page.goto(address)
        if image is not None:
            page.wait_for_selector("body[data-ready=yes]")
            page.set_input_files("#files", str(image))
            page.wait_for_selector("#strip button", state="attached")
            while page.evaluate("document.body.classList.contains('busy')"):
                page.wait_for_timeout(50)
        page.mouse.wheel(0, scroll)
        page.wait_for_timeout(500)
        file = IMAGES / f"{name}-{theme}.png"
        page.screenshot(path=file)
        Image.open(file).convert("RGB").quantize(256).save(file, optimize=True)  # a third of the size
        page.close()


def main() -> None:
    with tempfile.TemporaryDirectory() as place, sync_playwright() as play:
        folder, port = Path(place), free_port()
        run = folder / "demo"
        cache = os.environ.setdefault("SEEWHY_CACHE", str(folder / "cache"))
        subprocess.run([*SEEWHY, "train", "scenes", "--backbone", "efficientnet_lite0", "--unfreeze", "0", "--out", str(run)], check=True)
        subprocess.run([*SEEWHY, "audit", "scenes", "--out", str(folder / "audit"), "--seeds", "2"], check=True)
        subprocess.run([*SEEWHY, "export", str(run)], check=True)
        server = subprocess.Popen([*SEEWHY, "serve", str(run), "--port", str(port)])
        try:
            wait_for(port)
            chromium = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
            browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            image = sorted((Path(cache) / "scenes" / "images" / "boat").iterdir())[3]
            shoot(browser, (run / "report.html").as_uri(), "report")
            shoot(browser, (folder / "audit" / "audit.html").as_uri(), "audit", scroll=740)  # where the label issues are
            shoot(browser, f"http://127.0.0.1:{port}/", "serve", image)
            shutil.copy(run / "figures" / "heatmaps.png", IMAGES / "heatmaps.png")
            browser.close()
        finally:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()
