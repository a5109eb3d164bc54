"""Makes docs/pictures/: a sweep as `soup status --watch` draws it, and its report as Chromium does.

    python docs/pictures.py run.root=FOLDER [SWEEP]

The sweep is a real one. Where it still runs, its picture is taken when half of its points are done, and the report's
when all are. Needs the extra `report`, selenium, and Debian's chromium and chromium-driver.
"""

from __future__ import annotations

import base64
import io
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from soup import sweep as sweeps
from soup.cli import status, watch
from soup.record import DONE
from soup.report import page
from soup.report.chosen import choose
from soup.report.content import gather
from soup.sweep import Sweep

FOLDER = Path(__file__).parent / "pictures"
COLUMNS, LINES = 80, 24
WIDTH, HEIGHT = 1180, 1500


def main(words: list[str]) -> None:
    root = Path(next(word.partition("=")[2] for word in words if word.startswith("run.root="))).absolute()
    sweep = sweeps.find(root, *(word for word in words if "=" not in word))
    FOLDER.mkdir(exist_ok=True)
    _watch(sweep)
    while status._active(status.look(sweep)):
        time.sleep(status.WATCH_S)
    _report(root, sweep)


def _watch(sweep: Sweep) -> None:
    found: dict[str, Any] = status.look(sweep, whole=False)
    while status._active(found) and 2 * sum(found["counts"].get(state, 0) for state in DONE) < len(
        found["points"]
    ):
        time.sleep(status.WATCH_S)
        found = status.look(sweep, whole=False)
    console = Console(
        record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True, color_system="truecolor"
    )
    console.print(watch.view(found, COLUMNS, LINES))
    svg = console.export_svg(title="soup status --watch")
    # Without the fonts that rich would fetch: any monospaced one will do.
    svg = re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL).replace("Fira Code", "DejaVu Sans Mono")
    (FOLDER / "status.svg").write_text(svg, encoding="utf-8")


def _report(root: Path, sweep: Sweep) -> None:
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    words = (
        "--headless=new",
        "--no-sandbox",
        "--enable-unsafe-swiftshader",
        f"--window-size={WIDTH},{HEIGHT}",
    )
    for word in (*words, "--hide-scrollbars"):
        options.add_argument(word)
    with (
        tempfile.TemporaryDirectory() as folder,
        webdriver.Chrome(
            options=options, service=webdriver.ChromeService("/usr/bin/chromedriver")
        ) as browser,
    ):
        path = Path(folder) / "report.html"
        page.write(gather(choose(root, [sweep.id])), path)
        browser.get(path.as_uri())
        while not browser.execute_script("return document.documentElement.dataset.ready"):
            time.sleep(0.1)
        browser.execute_script("document.getElementById('parallel')?.scrollIntoView({behavior: 'instant'})")
        time.sleep(3)
        browser.execute_script("scrollTo({top: 0, behavior: 'instant'})")
        time.sleep(1)
        clip = {"x": 0, "y": 0, "width": WIDTH, "height": HEIGHT, "scale": 1}
        shot = browser.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
    _write_small(base64.b64decode(shot["data"]), FOLDER / "report.png")


def _write_small(png: bytes, path: Path) -> None:
    """With a palette, which such a picture needs no more than."""
    from PIL import Image

    with Image.open(io.BytesIO(png)) as picture:
        picture.convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
