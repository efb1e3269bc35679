"""The progress line, on a terminal and in a file."""

import io
import logging
import re

import pytest
from fake_run import make_recipe, make_steps
from rich.console import Console
from steptron.monitor.sinks import progress
from steptron.monitor.sinks.progress import ProgressLine

BUDGETS = {"base": 600, "long": 400}


def _metrics(step: int, stage: str, tokens: int, seconds: float = 2.0) -> dict:
    values = {"step": step, "stage": stage, "tokens": tokens, "loss": 2.34567, "grad_norm": 0.81234, "lr": 1e-3}
    return values | {"batch_tokens": 100, "step_time": seconds, "mfu": 0.384}


def _console(terminal: bool, width: int = 100) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, force_terminal=terminal, width=width, color_system=None), text


def test_a_file_gets_a_plain_line(tmp_path):
    console, text = _console(False)
    with ProgressLine(BUDGETS, 10, console=console, memory=lambda: 3 << 29) as line:
        line.update(_metrics(1, "base", 100))
    assert text.getvalue() == (
        "base 1/2 · step 1/10 · loss 2.3457 · grad norm 0.812 · 50 tokens/s · MFU 38% · 1.5 GiB · lr 0.001 · 10.0% · "
        "ETA 0:18\n"
    )


def test_what_is_not_known_is_left_out():
    console, text = _console(False)
    with ProgressLine(BUDGETS, 10, console=console) as line:
        line.update(_metrics(1, "base", 100) | {"mfu": None})
    assert "50 tokens/s · lr 0.001" in text.getvalue()


def test_plain_lines_come_every_few_seconds_and_at_each_stage(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    console, text = _console(False)
    with ProgressLine(BUDGETS, 10, console=console) as line:
        for step in range(1, 11):
            line.update(_metrics(step, "base" if step <= 6 else "long", 100 * step))
            now[0] += 2.0
    steps = [int(row.split("step ")[1].split("/")[0]) for row in text.getvalue().splitlines()]
    assert steps == [1, 4, 7, 10]


def test_time_left_goes_by_tokens_at_the_speed_of_this_stage():
    console, text = _console(False)
    with ProgressLine(BUDGETS, 10, console=console) as line:
        for step in range(1, 7):
            line.update(_metrics(step, "base", 100 * step, seconds=1.0))
        line.update(_metrics(7, "long", 700, seconds=20.0))
        assert line.tokens_per_second() == 5.0
    assert "ETA 1:00" in text.getvalue().splitlines()[-1]


def test_a_resumed_run_starts_where_it_was():
    console, text = _console(True)
    with ProgressLine(BUDGETS, 10, tokens=500, console=console) as line:
        line.update(_metrics(6, "base", 600))
    assert "60%" in text.getvalue()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_a_terminal_gets_one_line_that_fits(tmp_path, width):
    recipe = make_recipe(tmp_path, 20)
    console, text = _console(True, width)
    budgets = {name: stage.tokens for name, stage in recipe.stages.items()}
    with ProgressLine(budgets, 20, console=console, memory=lambda: 1 << 30) as line:
        for metrics, _, _ in make_steps(recipe):
            line.update(metrics)
        line.say("checkpoint step-00000020 written")
    last = [row for row in text.getvalue().replace("\r", "\n").splitlines() if "step 20" in row][-1]
    assert len(last.split("\x1b")[0]) <= width
    for part in ("anneal 3/3", "100%", "step 20/20", "loss ", "tokens/s", "ETA 0:00", "━"):
        assert part in last
    for part, least in (("grad norm ", 100), ("MFU ", 110), ("1.0 GiB", 120)):
        assert (part in last) == (width >= least)
    assert "checkpoint step-00000020 written\n" in text.getvalue()


@pytest.fixture
def log():
    """The log with what shows its warnings."""
    logger, shown = logging.getLogger("steptron"), progress.Warnings()
    logger.addHandler(shown)
    yield logging.getLogger("steptron.monitor.anything")
    logger.removeHandler(shown)


def test_a_warning_is_shown_once_and_nothing_else_is(log, capsys):
    for _ in range(2):
        log.warning("a probe\nmeans %s", "nothing")
    log.info("a step")
    log.error("the command line's")
    log.warning("another", exc_info=ValueError("a bug"))
    assert capsys.readouterr() == ("", "warning: a probe means nothing\nwarning: another\n")


def test_a_warning_stands_above_the_bar(log, capsys):
    console, text = _console(True)
    with ProgressLine(BUDGETS, 10, console=console) as line:
        line.update(_metrics(1, "base", 100))
        log.warning("no module is called x")
        line.update(_metrics(2, "base", 200))
    assert capsys.readouterr().err == ""
    rows = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue()).replace("\r", "\n").splitlines()
    assert rows.count("warning: no module is called x") == 1, "a row of its own"
    assert any("step 2" in row for row in rows), "and the bar goes on"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (12_345, "12.3K"),
        (4_500_000, "4.50M"),
        (999_999, "1000K"),
        (17_200_000_000_000, "17.2T"),
    ],
)
def test_short_counts(number, text):
    assert progress.short(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0:00"), (42, "0:42"), (754, "12:34"), (12_309, "3:25:09"), (183_600, "2 d 03 h")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
