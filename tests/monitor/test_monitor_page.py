"""The page in a browser: the live one while a run continues, and the report as a file. Debian's chromium, driven by
selenium.

The browser is started once for all that follows; what it logs and asks for is looked at in the end.
"""

import io
import json
import shutil
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from fake_run import FakeRun
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from steptron.monitor.dashboard import comparison, live, report

from packages import need
from waiting import wait_until

FLAGS = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"
EVIL = "<img src=x onerror=document.title='broken'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    need(("chromium", "chromedriver"), ("chromium", "chromium-driver"))
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    profile = tmp_path_factory.mktemp("profile")
    for flag in (*FLAGS.split(), f"--user-data-dir={profile}", "--window-size=1200,900"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> FakeRun:
    run = FakeRun(tmp_path_factory.mktemp("runs") / "night", 60, flush_every=4, note=EVIL)
    run.advance(30)
    return run


@pytest.fixture(scope="module")
def page(browser, run) -> Iterator[webdriver.Chrome]:
    """The live page of `run`, drawn."""
    with live.LiveServer(run.run_dir, 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        _open(browser, server.url)
        wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "#ledger tbody tr"), "the page is drawn")
        wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, ".heat canvas"), "the heat map is drawn")
        yield browser
        server.shutdown()
        thread.join()


def _open(driver: webdriver.Chrome, url: str) -> None:
    """Go there; the logs begin there too: chromium starts with a page of its own."""
    driver.get("about:blank")
    driver.get_log("browser")
    driver.get_log("performance")
    driver.get(url)


def _text(driver: webdriver.Chrome, selector: str) -> str:
    return driver.execute_script("return document.querySelector(arguments[0]).textContent", selector)


def _heat(driver: webdriver.Chrome) -> np.ndarray:
    """The heat map's cells as they are on the screen, without its labels: RGB."""
    canvas = driver.find_element(By.CSS_SELECTOR, ".heat canvas")
    driver.execute_script("arguments[0].scrollIntoView({ block: 'center' })", canvas)
    pixels = np.asarray(Image.open(io.BytesIO(canvas.screenshot_as_png)).convert("RGB"))
    return pixels[8:-40, 70:-90]


def _set_slider(driver: webdriver.Chrome, value: int) -> None:
    script = "const s = document.querySelector('#cells input[type=range]'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))"
    driver.execute_script(script, value)


def _quiet(driver: webdriver.Chrome, origin: str) -> None:
    """Nothing was logged, and nothing asked for but from `origin`."""
    assert [entry for entry in driver.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []
    asked = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [entry["params"]["request"]["url"] for entry in asked if entry["method"] == "Network.requestWillBeSent"]
    assert urls
    assert [url for url in urls if not url.startswith((origin, "data:"))] == []


def test_the_run_is_there_at_a_glance(page):
    assert _text(page, "h1") == "night"
    assert "running" in _text(page, ".state")
    assert "step30" in _text(page, "#tiles").replace("Step", "step")
    titles = [node.text for node in page.find_elements(By.CSS_SELECTOR, "h2")]
    for title in (
        "Loss",
        "Gradient norm",
        "Experts and heads",
        "Output norm: max ÷ median",
        "Activation RMS: min ÷ median",
    ):
        assert title in titles
    for title in ("Residual RMS", "Router entropy", "Parameters", "Ranks", "Loss by source", "Stages", "Ledger"):
        assert title in titles
    assert "held out" in _text(page, "#charts .card")
    dots = page.find_elements(By.CSS_SELECTOR, "#charts .card:first-child circle")
    assert len(dots) >= 3, "evaluations at steps 1, 11 and 21 are dots"
    assert "Experts" in _text(page, "#strip nav")
    assert "NaN" not in _text(page, "main")
    assert page.title.endswith("night · Steptron"), "texts of the run are shown, not run"
    assert EVIL in _text(page, "#ledger")


def test_the_heat_map_is_visible_and_the_slider_moves_it(page):
    newest = _heat(page)
    style = "return getComputedStyle(document.querySelector('#cells .card')).backgroundColor"
    background = np.array([int(part) for part in page.execute_script(style).strip("rgb()").split(",")])
    assert (np.abs(newest.astype(int) - background).sum(axis=-1) > 25).mean() > 0.9, "cells stand out from the card"
    assert len(np.unique(newest.reshape(-1, 3), axis=0)) > 30, "in many colours"
    assert "step 30" in _text(page, "#cells .when")
    _set_slider(page, 0)
    assert "step 1 " in _text(page, "#cells .when")
    first = _heat(page)
    assert (first != newest).any(axis=-1).mean() > 0.3, "another picture"
    slider = page.find_element(By.CSS_SELECTOR, "#cells input[type=range]")
    slider.send_keys(Keys.ARROW_RIGHT)
    assert "step 2 " in _text(page, "#cells .when"), "by keyboard too"
    page.find_element(By.CSS_SELECTOR, ".heat canvas").send_keys(Keys.ARROW_DOWN)
    assert "layer 2 · expert 0" in _text(page, "#tip")


def test_another_statistic_is_another_picture(page):
    before = _heat(page)
    page.find_element(By.XPATH, "//section[@id='cells']//button[contains(., 'output norm')]").click()
    wait_until(lambda: "output norm of each expert" in _text(page, "#cells .unit"), "output norms are shown")
    assert (_heat(page) != before).any(axis=-1).mean() > 0.3
    select = page.find_element(By.CSS_SELECTOR, "#cells select")
    select.send_keys("head gate", Keys.ENTER)
    wait_until(lambda: "of each head" in _text(page, "#cells .unit"), "heads are shown")


def test_parameters_are_found_by_name(page):
    box = page.find_element(By.CSS_SELECTOR, "#parameters input")
    box.send_keys("layers.5.moe")
    names = [node.text for node in page.find_elements(By.CSS_SELECTOR, "#parameters tbody .name")]
    assert sorted(names) == sorted(
        f"layers.5.moe.{part}.weight" for part in ("router", "experts.gate", "experts.up", "experts.down")
    )


def test_a_new_step_and_its_alarm_appear_by_themselves(page, run):
    _set_slider(page, 3)
    assert "expert death" not in _text(page, "#alerts")
    run.advance(20)
    wait_until(lambda: "step50" in _text(page, "#tiles").replace("Step", "step"), "step 50")
    wait_until(lambda: "expert 3 has activation RMS" in _text(page, "#alerts"), "the alarm")
    assert page.find_elements(By.CSS_SELECTOR, "#ledger tr.grave .badge")
    assert page.find_elements(By.CSS_SELECTOR, "#charts .plot .event"), "alarms are marked in the curves"
    assert "step 4 " in _text(page, "#cells .when"), "a slider that was moved stays where it is"
    _set_slider(page, 10_000)
    wait_until(lambda: "step 50" in _text(page, "#cells .when"), "the newest slice")
    run.advance(2)
    wait_until(lambda: "step 52" in _text(page, "#cells .when"), "a slider at its end follows")
    assert page.find_element(By.CSS_SELECTOR, "#parameters input").get_attribute("value") == "layers.5.moe"


def test_a_name_has_one_colour_in_all_charts(page):
    script = """return [...document.querySelectorAll('#losses .key, #sources .key, #spread .key, #layers .key')].map((key) =>
      [key.firstElementChild.nextSibling.textContent, (key.querySelector('[style*=tone]') || key).style.getPropertyValue('--tone')])"""
    tones: dict[str, set[str]] = {}
    shown = page.execute_script(script)
    for name, tone in shown:
        tones.setdefault(name, set()).add(tone)
    assert {"prose", "code"} < tones.keys()
    assert sum(name == "prose" for name, _ in shown) == 2, "the losses and the tokens"
    layers = [name for name, _ in shown if name.startswith("layer ")]
    assert len(layers) > 2 * len(set(layers)), "they are named again and again"
    assert {name: found for name, found in tones.items() if len(found) > 1} == {}
    assert tones["prose"] != tones["code"]


def test_tiles_say_what_the_legends_of_their_curves_say(page):
    script = """const titles = { Loss: 'Loss', Speed: 'Speed', 'Gradient norm': 'Gradient norm' };
      return Object.keys(titles).map((title) => {
        const tile = [...document.querySelectorAll('.tile')].find((one) => one.querySelector('.name').textContent === title);
        const plot = [...document.querySelectorAll('#charts .card')].find((one) => one.querySelector('h2').textContent === title);
        return [tile.querySelector('.value').firstChild.textContent, plot.querySelector('.key b').textContent]; })"""
    for tile, legend in page.execute_script(script):
        assert tile == legend


def test_the_ledger_is_filtered_by_kind_and_text(page):
    shown = lambda: [row.text for row in page.find_elements(By.CSS_SELECTOR, "#ledger tbody tr") if row.is_displayed()]  # noqa: E731
    everything = len(shown())
    page.find_element(By.CSS_SELECTOR, "#ledger [data-kind=alarm]").click()
    hidden = len(shown())
    assert 0 < hidden < everything
    page.find_element(By.CSS_SELECTOR, "#ledger [data-kind=alarm]").click()
    page.find_element(By.CSS_SELECTOR, "#ledger input").send_keys("blow_up")
    assert shown()
    assert all("blow_up" in row for row in shown())


def test_the_live_page_was_quiet_all_the_time(page):
    _quiet(page, page.current_url.partition("#")[0])


def test_the_report_is_the_same_page_without_a_server(browser, run, tmp_path):
    path = report.write_report(run.run_dir)
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        _open(browser, f"file://{path}")
        wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, ".heat canvas"), "the heat map is drawn")
        assert "this file needs no network" in _text(browser, "#foot")
        before = _heat(browser)
        _set_slider(browser, 0)
        assert (_heat(browser) != before).any(axis=-1).mean() > 0.3
        assert (before.mean() > 128) == (scheme == "light")
    _quiet(browser, "file:///")


@pytest.mark.parametrize("done", [1, 0], ids=["one step", "no step"])
def test_a_run_that_has_hardly_begun_is_drawn_without_an_error(browser, tmp_path, done):
    run = FakeRun(tmp_path / "run", 40)
    run.advance(done)
    _open(browser, f"file://{report.write_report(run.run_dir)}")
    wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "#ledger tbody tr"), "the page is drawn")
    assert ("No step has been recorded yet" in _text(browser, "#charts")) == (done == 0)
    assert "NaN" not in _text(browser, "main")
    _quiet(browser, "file:///")


@pytest.mark.parametrize(
    ("end", "state", "tone"),
    [
        ({}, "✓finished", "green"),
        ({"reason": "SIGTERM: saved", "exit_code": 75}, "■saved, resumable", "amber"),
        ({"reason": "stage long needs 4 ranks", "exit_code": 76}, "■saved, resumable", "amber"),
        ({"reason": "step 9: the policy", "exit_code": 3}, "■stopped", "amber"),
        ({"reason": "no room", "exit_code": 1}, "✕failed", "rose"),
    ],
    ids=["done", "signal", "other ranks", "policy", "full disk"],
)
def test_only_a_run_that_is_done_has_a_green_tick(browser, tmp_path, end, state, tone):
    run = FakeRun(tmp_path / "run", 10, level="off")
    run.finish(**end)
    _open(browser, f"file://{report.write_report(run.run_dir)}")
    wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "#ledger tbody tr"), "the page is drawn")
    assert _text(browser, ".state") == state
    badge = browser.find_element(By.CSS_SELECTOR, "#ledger [data-kind=run_end] .badge")
    assert tone in badge.get_attribute("style")
    assert ("✓" in badge.text) == (end == {})
    assert end.get("reason", "3 stages") in _text(browser, "#head")


def test_what_the_recipe_does_not_have_is_no_line_at_zero(browser, tmp_path):
    run = FakeRun(tmp_path / "run", 10, level="off")
    run.rows = (({**metrics, "mtp_loss": 0.0, "balance_loss": 0.0}, *rest) for metrics, *rest in run.rows)
    run.finish()
    _open(browser, f"file://{report.write_report(run.run_dir)}")
    wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "#ledger tbody tr"), "the page is drawn")
    ticks = browser.find_elements(By.CSS_SELECTOR, "#charts .card:first-child .plot text[text-anchor=end]")
    lowest = min(float(tick.text) for tick in ticks if tick.text != "step")
    assert lowest > 0.5, "the axis begins where the losses are"
    titles = [node.text for node in browser.find_elements(By.CSS_SELECTOR, "h2")]
    assert "Loss" in titles
    assert "Balance loss" not in titles


def test_runs_side_by_side_are_drawn_in_one_plot(browser, run, tmp_path):
    other = FakeRun(tmp_path / "other", 20, level="off")
    other.finish()
    comparison.write_page([run.run_dir, other.run_dir], tmp_path / "both.html")
    _open(browser, f"file://{tmp_path / 'both.html'}")
    wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, "#charts .plot path.mean"), "the page is drawn")
    names = [node.text for node in browser.find_elements(By.CSS_SELECTOR, "#alerts button.key")]
    assert names == ["night", "other"]
    loss = "#charts .card:first-child path.mean"
    paths = [node.get_attribute("d") for node in browser.find_elements(By.CSS_SELECTOR, loss)]
    assert [path.count("L") + 1 for path in paths] == [52, 20], "a point for each step"
    browser.find_element(By.XPATH, "//button[text()='by tokens']").click()
    assert browser.find_elements(By.CSS_SELECTOR, loss)[0].get_attribute("d") != paths[0]
    browser.find_element(By.CSS_SELECTOR, "#alerts button.key").click()
    assert len(browser.find_elements(By.CSS_SELECTOR, loss)) == 1, "a run can be hidden"
    assert "NaN" not in _text(browser, "main")
    _quiet(browser, "file:///")


def test_a_phone_needs_no_sideways_scrolling(browser, run):
    size = {"width": 390, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    _open(browser, f"file://{report.write_report(run.run_dir)}")
    wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, ".heat canvas"), "the heat map is drawn")
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
