"""The page of `soup report` in a real headless Chromium: what a person does with it, and that nothing leaves it."""

from __future__ import annotations

import base64
import os
import shutil
import time

import pytest

from soup.report import page
from soup.report.chosen import choose
from soup.report.content import gather

pytestmark = pytest.mark.slow

EVIL = "<script>window.evil=1</script><img src=x onerror=window.evil=2>"
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser():
    """Where CI lacks it the tests fail; elsewhere they are skipped."""
    from selenium import webdriver

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not binary or not driver:
        missing = "chromium and chromedriver are not here: apt-get install chromium chromium-driver"
        pytest.fail(missing) if os.environ.get("CI") or os.geteuid() == 0 else pytest.skip(missing)
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    # Root needs --no-sandbox; a machine without a GPU draws WebGL in software.
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--enable-unsafe-swiftshader"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as started:
        yield started


class Shown:
    """A page that is open. `js("return 1")` runs there; what it has logged and asked for is checked at the end."""

    def __init__(self, browser):
        self.browser = browser

    def js(self, code, *words):
        return self.browser.execute_script(code, *words)

    def until(self, code, timeout_s=60):
        end = time.monotonic() + timeout_s
        while not (found := self.js(f"return {code}")):
            assert time.monotonic() < end, f"never: {code}"
            time.sleep(0.05)
        return found

    def click(self, selector):
        from selenium.webdriver.common.by import By

        element = self.browser.find_element(By.CSS_SELECTOR, selector)
        self.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", element)
        element.click()

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        ActionChains(self.browser).send_keys(*keys).perform()

    def column(self, name):
        """Texts of a column's visible cells."""
        return self.js(
            "const named = (one) => one.dataset.key === arguments[0];"
            "const at = [...document.querySelectorAll('#table th')].findIndex(named);"
            "const rows = [...document.querySelectorAll('#table tbody tr:not([hidden])')];"
            "return rows.map((row) => row.cells[at].innerText.trim())",
            name,
        )

    def drawn(self):
        """Names of the runs that the first figure draws."""
        return set(
            self.js(
                "return document.getElementById('plot-0').data.filter((one) => one.hoverinfo !== 'skip')"
                ".flatMap((one) => [one.text].flat()).filter(Boolean)"
            )
        )

    def type(self, text):
        self.js("const one = document.getElementById('filter'); one.value = ''; one.focus()")
        self.press(text)

    def shot(self, path):
        self.js("document.getElementById('plot-parallel')?.scrollIntoView({behavior: 'instant'})")
        self.js("return document.getElementById('plot-parallel') !== null") and self.until(
            "document.querySelector('#plot-parallel canvas') !== null"
        )
        self.js("scrollTo({top: 0, behavior: 'instant'})")
        time.sleep(0.5)
        width, height = self.js("return [innerWidth, document.documentElement.scrollHeight]")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, 4200), "scale": 1}
        taken = self.browser.execute_cdp_cmd(
            "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
        )
        path.write_bytes(base64.b64decode(taken["data"]))


@pytest.fixture
def show(browser, tmp_path):
    """`show(folders)` opens the report of all that is there. Afterwards: no error was logged, no request left."""
    opened = []

    def shown(made, words=(), size="desktop", dark=False):
        path = tmp_path / "report.html"
        page.write(gather(choose(made.root, list(words))), path)
        width, height = SIZES[size]
        browser.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"},
        )
        value = "dark" if dark else "light"
        browser.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": value}]}
        )
        browser.get_log("browser"), browser.get_log("performance")
        browser.get(path.as_uri())
        one = Shown(browser)
        one.until("document.documentElement.dataset.ready")
        opened.append((one, path.as_uri()))
        return one

    yield shown
    for one, address in opened:
        wrong = [line for line in browser.get_log("browser") if "GL Driver Message" not in line["message"]]
        assert not wrong, wrong
        asked = one.js("return performance.getEntriesByType('resource').map((one) => one.name)")
        asked = [url for url in asked if not url.startswith(("data:", "blob:", address))]
        assert not asked, asked
        sent = [
            line["message"]
            for line in browser.get_log("performance")
            if "requestWillBeSent" in line["message"]
        ]
        assert all(address in line or '"url":"data:' in line or '"url":"blob:' in line for line in sent), sent


@pytest.fixture(scope="module")
def twelve(folders):
    made = folders()
    made.sweep(12, states=("failed", "diverged", "interrupted", "new"))
    return made


def test_sorts_by_every_column_by_mouse_and_by_keyboard(show, twelve):
    from selenium.webdriver.common.keys import Keys

    one = show(twelve)
    begun = [float(value) for value in one.column("eval_loss") if value]
    assert begun == sorted(begun) and one.column("eval_loss")[-1] == "", (
        "the best first, without a value last"
    )
    one.click("th[data-key='optim.lr'] button")
    rates = [float(value) for value in one.column("optim.lr")]
    assert rates == sorted(rates)
    one.click("th[data-key='optim.lr'] button")
    assert [float(value) for value in one.column("optim.lr")] == rates[::-1]
    sorts = one.js("return [...document.querySelectorAll('#table th')].map((one) => one.ariaSort)")
    assert sorts.count("descending") == 1 and sorts.count("none") == len(sorts) - 1
    one.press(Keys.TAB)  # to the next header
    assert one.js("return document.activeElement.closest('th').dataset.key") == "optim.scheduler"
    assert one.js("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    one.press(Keys.ENTER)
    assert one.column("optim.scheduler") == sorted(one.column("optim.scheduler"))
    one.press(Keys.SPACE)
    assert one.column("optim.scheduler") == sorted(one.column("optim.scheduler"), reverse=True)
    one.click("th[data-key='eval_loss'] button")
    one.click("th[data-key='eval_loss'] button")
    assert one.column("eval_loss")[-1] == "", "what has no value is last downwards too"


def test_filters_the_table_the_curves_and_the_sections(show, twelve):
    one = show(twelve)
    assert len(one.drawn()) == 11  # one is new
    one.type("r=32 optim.lr>1e-4 finished")
    one.until("document.getElementById('count').textContent.startsWith('1 of 12')")
    assert one.column("lora.r") == ["32"]
    (name,) = one.until("document.getElementById('plot-0').data.length === 2") and one.drawn()
    assert "lora.r=32" in name
    assert one.js("return document.querySelectorAll('details.run[data-id]:not([hidden])').length") == 1
    one.type("no such thing")
    one.until("document.getElementById('count').textContent.startsWith('0 of 12')")
    one.click("#clear")
    one.until("document.getElementById('count').textContent.startsWith('12 of 12')")
    one.js(
        "const s = document.getElementById('state'); s.value = 'failed'; s.dispatchEvent(new Event('change'))"
    )
    assert one.column("state") == ["failed"]


def test_hovers_and_highlights(show, twelve):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    one = show(twelve)
    plot = one.browser.find_element(By.CSS_SELECTOR, "#plot-1 .nsewdrag")
    at = one.js(
        "const plot = document.getElementById('plot-1'), line = plot.data.at(-2), l = plot._fullLayout;"
        "const box = plot.querySelector('.nsewdrag').getBoundingClientRect();"
        "return [l.xaxis.d2p(line.x[3]) - box.width / 2, l.yaxis.d2p(line.y[3]) - box.height / 2]"
    )
    ActionChains(one.browser).move_to_element_with_offset(plot, round(at[0]), round(at[1])).perform()
    label = one.until("document.querySelector('#plot-1 .hoverlayer')?.textContent")
    assert "lora.r=" in label and "step" in label
    row = one.browser.find_elements(By.CSS_SELECTOR, "#table tbody tr")[1]
    one.js("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", row)
    ActionChains(one.browser).move_to_element(row).perform()
    one.until("document.getElementById('plot-0').data.at(-1).x.length > 5")
    buttons = one.js("return [...document.querySelectorAll('.modebar-btn')].map((one) => one.dataset.title)")
    assert buttons and not [title for title in buttons if "loud" in title or "hare" in title], buttons


def test_smooths_zooms_and_draws_other_metrics(show, twelve):
    from selenium.webdriver.common.keys import Keys

    one = show(twelve)
    rough = "Math.max(...document.getElementById('plot-0').data.flatMap((one) => one.y.slice(1).map("
    rough += "(y, i) => y === null || one.y[i] === null ? 0 : y - one.y[i])))"
    before = one.js(f"return {rough}")
    one.js("document.getElementById('smoothing').focus()")
    one.press(Keys.PAGE_UP * 8)
    one.until(f"{rough} < {before / 2}")
    assert one.js("return document.getElementById('smoothing-told').textContent") != "0"
    span = "document.getElementById('plot-0').layout.xaxis.range.reduce((a, b) => b - a)"
    whole = one.js(f"return {span}")
    one.click("#closer")
    one.until(f"{span} < {whole * 0.6}")
    one.js("document.getElementById('whole').focus()")
    one.press(Keys.ENTER)
    one.until(f"{span} > {whole * 0.9}")
    one.js(
        "const s = document.getElementById('metric-0'); s.value = 'lr'; s.dispatchEvent(new Event('change'))"
    )
    one.until("Math.max(...document.getElementById('plot-0').data[0].y) < 0.01")
    assert one.js("return document.getElementById('plot-0').ariaLabel").startswith("lr:")
    one.js("const s = document.getElementById('axis'); s.value = '1'; s.dispatchEvent(new Event('change'))")
    one.until("document.getElementById('plot-1').data[0].x[0] >= 1024")


def test_a_stretch_of_an_axis_filters_all(show, twelve):
    from selenium.webdriver import ActionChains
    from selenium.webdriver.common.by import By

    one = show(twelve)
    one.click("#parallel-title")
    one.until("document.querySelectorAll('#plot-parallel .axis-brush').length === 4")
    brush = one.browser.find_element(By.CSS_SELECTOR, "#plot-parallel .axis-brush .background")
    height = brush.rect["height"]
    ActionChains(one.browser).move_to_element_with_offset(
        brush, 0, round(-height / 2) + 8
    ).click_and_hold().move_by_offset(0, round(height / 3)).release().perform()
    one.until("!document.getElementById('count').textContent.startsWith('12 of')")
    assert one.column("lora.r") and all(int(value) >= 8 for value in one.column("lora.r"))
    one.click("#clear")
    one.until("document.getElementById('count').textContent.startsWith('12 of 12')")


def test_a_link_opens_a_runs_settings(show, twelve):
    one = show(twelve)
    one.click("#table tbody tr td a")
    one.until("document.activeElement.tagName === 'SUMMARY'")
    told = one.js("return document.activeElement.parentElement.innerText")
    assert "lora.r" in told and "python -m soup --config-path" in told and "read from the optim" in told


def test_a_phone_and_the_dark(show, twelve):
    one = show(twelve, size="phone", dark=True)
    assert one.js("return document.documentElement.scrollWidth - innerWidth") <= 0, (
        "the page scrolls down only"
    )
    one.click("#table tbody tr td a")
    one.click("details.run[open] ~ details summary, details.run[open] details summary")
    value = "document.querySelector('.settings td:nth-child(3)')?.getBoundingClientRect()"
    assert one.until(f"{value}?.width && {value}")["right"] <= 390, (
        "what is in force is seen without scrolling"
    )
    ground = one.js("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert max(ground) < 60
    assert min(one.js("return getComputedStyle(document.body).color.match(/\\d+/g).map(Number)")) > 180
    labels = one.js(
        "return [...document.querySelectorAll('select, input, button, .plot, .scroll')]"
        ".filter((one) => !(one.labels?.length || one.ariaLabel || one.innerText || one.getAttribute('aria-labelledby')"
        " || one.querySelector('.plot'))).map((one) => one.outerHTML.slice(0, 80))"
    )
    assert not labels, "each has a name"
    one.browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "light"}]}
    )
    one.until("getComputedStyle(document.body).backgroundColor.match(/\\d+/g)[0] > 200")


def test_nothing_that_a_run_says_runs(show, folders):
    made = folders()
    made.run("a1", run__name=EVIL)
    made.run("b2", state="failed", error=EVIL, log=EVIL, lora__target_modules=EVIL)
    made.run("c3", run__name="<b>bold</b>", lora__target_modules="<a href='javascript:evil=3'>")
    one = show(made, ["a1", "b2", "c3"])
    one.click("#points-title")
    time.sleep(0.3)
    assert one.js("return window.evil") is None
    assert EVIL in one.js("return document.body.textContent")
    assert one.js("return document.querySelectorAll('main img, main script').length") == 0
    # And were something not escaped, the page's policy would stop it.
    one.js(
        "document.body.insertAdjacentHTML('beforeend', arguments[0])", "<p onclick='window.evil=4' id='bad'>"
    )
    one.js("document.getElementById('bad').click()")
    assert one.js("return window.evil") is None
    one.browser.get_log("browser")  # the policy says so there


@pytest.mark.parametrize("state", ["finished", "new", "failed"])
def test_one_run(show, folders, state):
    made = folders()
    made.run("a1", state=state, lines=0 if state == "failed" else 30)
    one = show(made)
    assert len(one.column("#")) == 1
    assert one.js("return document.querySelector('details.run').open")


def test_five_hundred_points(show, folders, tmp_path, capsys):
    """Says how long it takes, and asserts no time: another test may have the other core."""
    made = folders()
    names = {point.words for point in made.sweep(500, lines=60).points()}
    one = show(made)
    assert len(one.column("#")) == 500 and one.drawn() == names
    size = (tmp_path / "report.html").stat().st_size
    assert size < 6_000_000
    told = one.js(
        "return [document.documentElement.dataset.ready,"
        " performance.getEntriesByName('first-contentful-paint')[0].startTime]"
    )
    with capsys.disabled():
        print(f"\n500 points, {size / 1e6:.1f} MB: drawn after {told[0]} ms, readable after {told[1]:.0f} ms")
    one.type("r=32")
    one.until("document.getElementById('count').textContent.startsWith('100 of 500')")
    one.click("th[data-key='optim.lr'] button")
    rates = [float(value) for value in one.column("optim.lr")]
    assert rates == sorted(rates) and len(rates) == 100


def test_screenshots(show, twelve, tmp_path):
    """Written where SOUP_SCREENSHOTS says, to be looked at."""
    from pathlib import Path

    from PIL import Image

    folder = Path(os.environ.get("SOUP_SCREENSHOTS", tmp_path))
    for size, dark in (("desktop", False), ("desktop", True), ("phone", False)):
        path = folder / f"report-{size}{'-dark' if dark else ''}.png"
        show(twelve, size=size, dark=dark).shot(path)
        with Image.open(path) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 24)) > 500
