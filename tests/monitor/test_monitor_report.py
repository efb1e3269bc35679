"""report.html: self-contained, whatever state the run folder is in. How it looks and works is
test_monitor_page.py's."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_run import EXPERTS, LAYERS, FakeRun
from steptron.errors import SteptronError
from steptron.monitor.dashboard import report
from steptron.monitor.storage.ledger import Ledger


def _make_run(run_dir: Path, steps: int = 40, done: int | None = None, level: str = "full") -> Path:
    run = FakeRun(run_dir, steps, flush_every=7, level=level)
    if done is None:
        run.finish()
    else:
        run.advance(done)
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
        self._inside = tag if tag != "script" else attributes.get("data-name", "script")

    def handle_endtag(self, tag):
        self._inside = ""

    def handle_data(self, data):
        self.texts[self._inside] = self.texts.get(self._inside, "") + data


def _parse(path: Path) -> tuple[_Page, dict]:
    page = _Page()
    page.feed(path.read_text(encoding="utf-8"))
    texts = {
        name: text for name, text in page.texts.items() if name not in ("script", "style", "title", "noscript", "")
    }
    named = {name: text for name, text in texts.items() if text.startswith(("{", "[", "null"))}
    return page, {
        name: json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))
        for name, text in named.items()
    }


def test_nothing_is_loaded_from_anywhere(tmp_path):
    path = report.write_report(_make_run(tmp_path / "run"))
    page, _ = _parse(path)
    assert [link for link in page.links if not link.startswith("#")] == ["data:,"]
    text = path.read_text(encoding="utf-8").replace('"http://www.w3.org/2000/svg"', "")
    assert re.findall(r"https?:|//[a-z]+\.|@import|url\(|import\(|XMLHttpRequest|WebSocket", text) == []
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")


def test_the_page_holds_the_run(tmp_path):
    run_dir = _make_run(tmp_path / "run")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    _, data = _parse(report.write_report(run_dir))
    assert data["curves"]["step"] == [row["step"] for row in rows]
    assert data["curves"]["stage"] == [row["stage"] for row in rows]
    for key in ("loss", "total_loss", "lr", "tokens_per_second", "grad_norm"):
        assert data["curves"]["values"][key]["mean"] == pytest.approx([row[key] for row in rows], rel=1e-5)
    run = data["run"]
    for stage in ("base", "long", "anneal"):
        for source in ("prose", "code"):
            tokens = sum(row["tokens_by_source"][source] for row in rows if row["stage"] == stage)
            assert run["sources"][stage].get(source, 0) == tokens
    assert [(stage["name"], stage["first"], stage["last"], stage["seq_len"]) for stage in run["stages"]] == [
        ("base", 1, 20, 512),
        ("long", 21, 32, 4096),
        ("anneal", 33, 40, 16384),
    ]
    assert [stage["tokens"] for stage in run["stages"]] == [stage["budget"] for stage in run["stages"]]
    assert (run["name"], run["state"], run["step"]) == ("run", "finished", 40)
    cells = data["cells/layer_expert/out_norm"]
    assert (cells["rows"], len(cells["cells"]), cells["slices"][-1]) == (list(LAYERS), EXPERTS, [40, 40, "anneal"])
    assert {"series/parameter", "series/rank", "series/layer", "series/source", "spread/layer_expert"} <= data.keys()
    assert {"cells/layer_expert/tokens", "cells/layer_head/gate_mean"} <= data.keys()
    events = [event["event"] for event in data["ledger"]["events"]]
    assert (events[0], events[-1], events.count("alarm")) == ("run_start", "run_end", 4)


@pytest.mark.parametrize(
    ("steps", "done", "level", "state"),
    [
        pytest.param(10, 1, "full", "running", id="one step"),
        pytest.param(40, 25, "full", "running", id="under way"),
        pytest.param(40, None, "off", "finished", id="no plane"),
        pytest.param(40, 0, "full", "empty", id="no step"),
    ],
)
def test_runs_in_any_state(tmp_path, steps, done, level, state):
    _, data = _parse(report.write_report(_make_run(tmp_path / "run", steps, done, level)))
    assert data["run"]["state"] == state
    assert ("cells/layer_expert/tokens" in data) == (level != "off" and done != 0)
    assert (data["curves"] is not None) == (done != 0)


def test_a_torn_run_folder_shows_what_is_whole(tmp_path):
    run_dir = _make_run(tmp_path / "run", 40, 25)
    for name, text in (("metrics.jsonl", '{"step": 26, "lo'), ("ledger.jsonl", '{"time": "20')):
        with (run_dir / name).open("a") as file:
            file.write(text)
    (run_dir / "recipe.yaml").write_text("run: {name: [unfin")
    newest = max((run_dir / "metrics" / "layer_expert").glob("*.parquet"))
    newest.write_bytes(newest.read_bytes()[:-40])
    _, data = _parse(report.write_report(run_dir))
    assert data["curves"]["step"] == list(range(1, 26))
    assert data["run"]["name"] == "run"
    assert data["cells/layer_expert/tokens"]["slices"][-1][1] == 21
    assert data["ledger"]["events"][0]["event"] == "run_start"


@pytest.mark.parametrize("keep", ["metrics.jsonl", "ledger.jsonl", "recipe.yaml"])
def test_one_file_is_enough(tmp_path, keep):
    whole = _make_run(tmp_path / "run", 10)
    (tmp_path / "part").mkdir()
    shutil.copy(whole / keep, tmp_path / "part")
    _parse(report.write_report(tmp_path / "part"))


def test_a_folder_that_is_no_run_is_an_error_of_the_user(tmp_path):
    with pytest.raises(SteptronError, match="is not a run folder"):
        report.write_report(tmp_path)


def test_texts_of_the_run_cannot_break_out_of_the_page(tmp_path):
    run_dir = _make_run(tmp_path / "run", 10)
    evil = "</script><script>alert(1)</script><!-- <!--SCRIPT--> <!--DATA-->"
    Ledger(run_dir).write("resume", 3, reason=evil)
    page, data = _parse(report.write_report(run_dir))
    assert data["ledger"]["events"][-1]["reason"] == evil
    assert "alert(1)" not in page.texts["script"] + page.texts["style"]


def test_values_that_are_not_finite(tmp_path):
    run_dir = _make_run(tmp_path / "run", 10)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11, "stage": "anneal", "tokens": 1, "loss": NaN, "grad_norm": Infinity}\n')
    Ledger(run_dir).write("spike", 11, loss=float("nan"))
    _, data = _parse(report.write_report(run_dir))
    assert data["curves"]["values"]["loss"]["mean"][-1] is None
    assert data["curves"]["not_finite"] == [11]
    assert data["ledger"]["events"][-1]["loss"] == "nan"


def test_a_long_run_stays_small(tmp_path):
    """100,000 steps, as many points as fit; a spike of one step is still to be seen."""
    keys = (
        "loss",
        "mtp_loss",
        "balance_loss",
        "total_loss",
        "grad_norm",
        "lr",
        "tokens_per_second",
        "mfu",
        "step_time",
    )
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
