"""Pictures for docs/monitoring.md: the live page, the report and the terminal, of a run folder or of a made-up run.

    python docs/images/make_monitoring.py [RUN_DIR]

Needs chromium, chromedriver and the `dev` extra. The page is photographed while it is served; the terminal's bytes are
those that `steptron.monitor.sinks.progress` writes for the run's own metrics.
"""

import io
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path

import yaml
from PIL import Image
from rich.console import Console
from rich.text import Text
from selenium import webdriver

from steptron.monitor.dashboard import live, report
from steptron.monitor.sinks.progress import ProgressLine

HERE = Path(__file__).parent
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-sync --no-first-run "
    "--hide-scrollbars"
)
SECTION = "const one = document.querySelector(arguments[0]); one.scrollIntoView(); return one.childElementCount"


def main() -> None:
    """Make all pictures."""
    with tempfile.TemporaryDirectory() as temporary:
        run_dir = Path(sys.argv[1]) if len(sys.argv) > 1 else _made_up(Path(temporary))
        page = report.write_report(run_dir)
        terminal(run_dir, HERE / "monitor-terminal.svg")
        browser = _browser(Path(temporary))
        with live.LiveServer(run_dir, 0) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            _open(browser, server.url, "light")
            _save(browser, "monitor-live.png")
            _open(browser, server.url, "dark")
            _choose(browser, "output norm")
            _scroll(browser, "#cells")
            _save(browser, "monitor-live-dark.png")
            server.shutdown()
        _open(browser, f"file://{page.resolve()}", "light")
        _scroll(browser, "#parameters")
        _save(browser, "monitor-report.png")
        _open(browser, f"file://{page.resolve()}", "light", width=400, height=860)
        _save(browser, "monitor-phone.png")
        browser.quit()


def terminal(run_dir: Path, picture: Path) -> None:
    """Draw the output of `steptron train` for this run: lines as in a file, and the bar, which is one line,
    at four moments."""
    recipe = yaml.safe_load((run_dir / "recipe.yaml").read_text())
    budgets = {name: stage["tokens"] for name, stage in recipe["stages"].items()}
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    recorder = Console(record=True, width=112, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    for share in (0.1, 0.4, 0.7, 1.0):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, width=112, color_system="truecolor")
        with ProgressLine(budgets, console=console) as progress:
            for row in rows[: max(1, round(share * len(rows)))]:
                progress.update(row)
        last = screen.getvalue().rstrip("\n").rpartition("\r")[2].rpartition("\x1b[2K")[2]
        recorder.print(Text.from_ansi(last.rstrip()))
    svg = recorder.export_svg(title="steptron train · the bar at four moments of a run")
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))  # fonts of elsewhere


def _made_up(folder: Path) -> Path:
    """A run of 600 steps, 540 of them done, in which an expert starves, one blows up, one dies, and a rank is slow."""
    tests = HERE.parent.parent / "tests"
    sys.path[:0] = [str(tests / "monitor"), str(tests)]
    from fake_run import FakeRun

    run = FakeRun(folder / "made-up-run", 600, flush_every=20)
    run.advance(540)
    return run.run_dir


def _browser(folder: Path) -> webdriver.Chrome:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS.split(), f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def _open(browser: webdriver.Chrome, url: str, scheme: str, width: int = 1200, height: int = 980) -> None:
    """Show a page and wait until it is drawn."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1.25 if width > 600 else 1.5, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    browser.get(url)
    for _ in range(200):
        if browser.execute_script(
            "return !!document.querySelector('#ledger tr') && document.readyState === 'complete'"
        ):
            break
        time.sleep(0.05)
    time.sleep(1.0)


def _scroll(browser: webdriver.Chrome, section: str) -> None:
    if not browser.execute_script(SECTION, section):
        sys.exit(f"this run has nothing in {section}: make it with monitor.level=full")
    time.sleep(0.5)


def _choose(browser: webdriver.Chrome, statistic: str) -> None:
    """Press the heat map's button of that name, where there is one."""
    script = (
        "[...document.querySelectorAll('#cells .choices button')]"
        ".find((one) => one.textContent.includes(arguments[0]))?.click()"
    )
    browser.execute_script(script, statistic)
    time.sleep(1.0)


def _save(browser: webdriver.Chrome, name: str) -> None:
    """As a PNG, without the channel for what shines through."""
    Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB").save(HERE / name, optimize=True)
    print(f"{HERE / name}: {(HERE / name).stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
