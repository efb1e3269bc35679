"""report.html: self-contained, whatever state the run folder is in."""

import dataclasses
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from fake_run import make_recipe, make_steps

from steptron.errors import SteptronError
from steptron.monitor import report
from steptron.monitor.collector import Collector
from steptron.monitor.ledger import Ledger

LAYERS = list(range(1, 9))


def _make_run(run_dir: Path, steps: int = 40, done: int | None = None, with_experts: bool = True) -> Path:
    run_dir.mkdir(exist_ok=True)
    recipe = make_recipe(run_dir, steps, flush_every=7)
    plain = json.loads(json.dumps(dataclasses.asdict(recipe)))
    (run_dir / "recipe.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
    ledger = Ledger(run_dir)
    ledger.write("run_start", 0, world_size=1)
    with Collector(recipe, run_dir, LAYERS if with_experts else [], 16) as collector:
        for metrics, counts_LE, sources in list(make_steps(recipe))[:done]:
            collector.step(metrics, counts_LE if with_experts else None, sources)
    if done is None:
        ledger.write("run_end", steps)
    return run_dir


class _Page(HTMLParser):
    """Attributes that name something to load, and the texts of style, script and data."""

    def __init__(self):
        super().__init__()
        self.links: list[str] = []
        self.texts: dict[str, str] = {}
        self._inside = ""

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.links += [attributes[name] for name in ("src", "href", "srcset", "data", "action") if attributes.get(name)]
        self._inside = tag if tag != "script" else attributes.get("id", "script")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        self.texts[self._inside] = self.texts.get(self._inside, "") + data


def _parse(path: Path) -> tuple[_Page, dict]:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page, json.loads(page.texts["data"], parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_nothing_is_loaded_from_anywhere(tmp_path):
    path = report.write_report(_make_run(tmp_path / "run"))
    page, _ = _parse(path)
    assert page.links == ["data:,"]
    text = path.read_text(encoding="utf-8").replace('"http://www.w3.org/2000/svg"', "")
    assert re.findall(r"https?:|//[a-z]+\.|@import|url\(|import\(|fetch\(|XMLHttpRequest|WebSocket", text) == []


def test_the_page_holds_the_run(tmp_path):
    run_dir = _make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    _, data = _parse(report.write_report(run_dir))
    assert data["curves"]["step"] == [row["step"] for row in rows]
    assert data["curves"]["stage"] == [row["stage"] for row in rows]
    for key in ("loss", "lm_loss", "lr", "tokens_per_second", "grad_norm"):
        assert data["curves"]["values"][key]["mean"] == pytest.approx([row[key] for row in rows], rel=1e-5)
    for stage in ("base", "long", "anneal"):
        for source in ("prose", "code"):
            tokens = sum(row["tokens_by_source"][source] for row in rows if row["stage"] == stage)
            assert data["sources"][stage][source] == tokens
    assert [(stage["name"], stage["first"], stage["last"], stage["seq_len"]) for stage in data["stages"]] == [
        ("base", 1, 20, 512),
        ("long", 21, 32, 4096),
        ("anneal", 33, 40, 16384),
    ]
    assert [stage["tokens"] for stage in data["stages"]] == [stage["budget"] for stage in data["stages"]]
    assert (data["experts"]["layers"], data["experts"]["experts"]) == (LAYERS, 16)
    assert [event["event"] for event in data["ledger"]] == ["run_start", "run_end"]
    assert (data["run"]["name"], data["run"]["state"], data["run"]["step"]) == ("run", "finished", 40)


@pytest.mark.parametrize(
    ("steps", "done", "with_experts", "state"),
    [
        pytest.param(10, 1, True, "running", id="one step"),
        pytest.param(40, 25, True, "running", id="under way"),
        pytest.param(40, None, False, "finished", id="no experts"),
        pytest.param(40, 0, True, "empty", id="no step"),
    ],
)
def test_runs_in_any_state(tmp_path, steps, done, with_experts, state):
    run_dir = _make_run(tmp_path / "run", steps, done, with_experts)
    _, data = _parse(report.write_report(run_dir))
    assert data["run"]["state"] == state
    assert (data["experts"] is not None) == (with_experts and done != 0)
    assert (data["curves"] is not None) == (done != 0)


def test_a_torn_run_folder_shows_what_is_whole(tmp_path):
    run_dir = _make_run(tmp_path / "run", 40, 25)
    for name, text in (("metrics.jsonl", '{"step": 26, "lo'), ("ledger.jsonl", '{"time": "20')):
        with (run_dir / name).open("a") as file:
            file.write(text)
    (run_dir / "recipe.yaml").write_text("run: {name: [unfin")
    newest = max((run_dir / "metrics").glob("*.parquet"))
    newest.write_bytes(newest.read_bytes()[:-40])
    _, data = _parse(report.write_report(run_dir))
    assert data["curves"]["step"] == list(range(1, 26))
    assert data["run"]["name"] == "run"
    assert data["experts"]["slices"][-1][1] == 21
    assert [event["event"] for event in data["ledger"]] == ["run_start"]


@pytest.mark.parametrize("keep", ["metrics.jsonl", "ledger.jsonl", "recipe.yaml"])
def test_one_file_is_enough(tmp_path, keep):
    whole = _make_run(tmp_path / "run", 10)
    (tmp_path / "part").mkdir()
    shutil.copy(whole / keep, tmp_path / "part")
    _parse(report.write_report(tmp_path / "part"))


def test_a_folder_that_is_no_run_is_an_error_of_the_user(tmp_path):
    with pytest.raises(SteptronError, match="is no run folder"):
        report.write_report(tmp_path)


def test_texts_of_the_run_cannot_break_out_of_the_page(tmp_path):
    run_dir = _make_run(tmp_path / "run", 10)
    evil = "</script><script>alert(1)</script><!-- /*STYLE*/ /*SCRIPT*/"
    Ledger(run_dir).write("resume", 3, reason=evil)
    page, data = _parse(report.write_report(run_dir))
    assert data["ledger"][-1]["reason"] == evil
    assert "alert" not in page.texts["script"]


def test_values_that_are_not_finite(tmp_path):
    run_dir = _make_run(tmp_path / "run", 10)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "stage": "anneal", "tokens": 1, "loss": NaN, "grad_norm": Infinity}\n')
    Ledger(run_dir).write("spike", 11, loss=float("nan"))
    _, data = _parse(report.write_report(run_dir))
    assert data["curves"]["values"]["loss"]["mean"][-1] is None
    assert data["curves"]["not_finite"] == [11]
    assert data["ledger"][-1]["loss"] == "nan"


def test_a_long_run_stays_small(tmp_path):
    """100,000 steps, as many points as fit; a spike of one step is still to be seen."""
    keys = ("loss", "lm_loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "tokens_per_second", "mfu", "step_time")
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 100_001):
            value = 3 + step % 7 / 9 + 40 * (step == 77_777)
            values = ", ".join(f'"{key}": {value}' for key in keys)
            file.write(f'{{"step": {step}, "stage": "base", "tokens": {step * 8192}, {values}}}\n')
    path = report.write_report(tmp_path)
    _, data = _parse(path)
    assert path.stat().st_size < 1_500_000
    assert max(data["curves"]["values"]["loss"]["high"]) == 43
    assert data["curves"]["step"][-1] == 100_000


# What a person does: over the loss, drag to zoom, over the heat map, the slider, an axis by tokens.
_GESTURES = """
const move = (node, type, x, y) => {
  const box = node.getBoundingClientRect();
  node.dispatchEvent(new PointerEvent(type, { clientX: box.left + x, clientY: box.top + y, pointerType: "mouse" }));
};
const plot = document.querySelector(".plot"), slider = document.querySelector("input[type=range]");
plot.setPointerCapture = () => {};
for (const [type, x] of [["pointermove", 200], ["pointerdown", 200], ["pointermove", 500], ["pointerup", 500]]) move(plot, type, x, 90);
move(plot, "pointermove", 300, 90);
document.title = at("tip").textContent;
slider.value = 0;
slider.dispatchEvent(new Event("input"));
move(document.querySelector(".heat canvas"), "pointermove", 150, 20);
document.title += " & " + at("tip").textContent;
document.querySelectorAll("#tools [aria-pressed]")[1].click();
"""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize("done", [None, 1, 0], ids=["whole", "one step", "no step"])
def test_a_browser_draws_it_without_an_error(tmp_path, done):
    path = report.write_report(_make_run(tmp_path / "run", 40, done))
    if done is None:
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("</body>", f"<script>setTimeout(() => {{{_GESTURES}}}, 100)</script></body>"))
    options = "--headless --no-sandbox --disable-gpu --disable-background-networking --disable-component-update"
    more = "--disable-sync --no-first-run --enable-logging=stderr --virtual-time-budget=1000 --dump-dom"
    command = ["chromium", *options.split(), *more.split(), f"--user-data-dir={tmp_path}/profile", f"file://{path}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "CONSOLE" not in result.stderr
    drawn = result.stdout.split('id="data"')[0]
    assert "<h2>Ledger</h2>" in drawn
    assert ("No step has been recorded yet" in drawn) == (done == 0)
    if done != 0:
        for title in ("Loss", "Learning rate", "Gradient norm", "Speed", "Expert load", "Tokens by source", "Stages"):
            assert f"<h2>{title}</h2>" in drawn
        assert "NaN" not in drawn
    if done is None:
        title = re.findall(r"<title>(.*)</title>", drawn)[0]
        assert re.match(r"step \d+ · .* tokens · [a-z]+total\d.* &amp; layer 1 · expert \d+load[\d.]+ × mean", title)
        assert "<b>step 1</b> · base" in drawn
