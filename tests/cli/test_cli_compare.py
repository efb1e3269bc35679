"""`steptron compare`: figures of runs, the keys that differ, and the page's data."""

import json
import re
from pathlib import Path

import pytest
import yaml
from steptron.cli.main import main
from steptron.monitor.dashboard.comparison import differing, names_of, read_run
from steptron.monitor.storage.ledger import Ledger

LOSSES = {"a": [5.0, 3.0, 4.0], "b": [6.0, 2.0]}


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    folders = []
    for name, losses in LOSSES.items():
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        recipe = {"run": {"name": name}, "seed": 1, "stages": {"base": {"lr": {"peak": 0.1 if name == "a" else 0.2}}}}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        lines = [
            {"step": n, "stage": "base", "tokens": 10 * n, "loss": loss, "grad_norm": 0.5, "tokens_per_second": 40 + n}
            for n, loss in enumerate(losses, 1)
        ]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        Ledger(folder).write("run_end", len(losses))
        folders.append(folder)
    return folders


def test_figures_are_those_of_the_steps(runs: list[Path]) -> None:
    figures, _ = read_run(runs[0])
    assert (figures.state, figures.step, figures.tokens, figures.loss, figures.lowest_loss) == ("finished", 3, 30, 4, 3)
    assert (figures.tokens_per_second, figures.mfu) == (42, None)
    assert differing(runs) == {"stages.base.lr.peak": [0.1, 0.2]}


def test_a_folder_without_steps_has_no_figures(tmp_path: Path) -> None:
    figures, _ = read_run(tmp_path)
    assert (figures.state, figures.step, figures.loss) == ("empty", None, None)


def test_names_tell_runs_apart(tmp_path: Path) -> None:
    assert names_of([Path("x/runs/a"), Path("y/runs/a")]) == ["x/runs/a", "y/runs/a"]
    assert names_of([Path("runs/a"), Path("runs/b/")]) == ["a", "b"]
    assert names_of([Path("runs/a"), Path("runs/a")]) == ["a", "a"]


def test_tables_and_page(
    runs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    page = tmp_path / "both.html"
    assert main(["compare", *map(str, runs), "--out", str(page)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ *a +finished +3 +30 +4\.0000 +3\.0000 +0\.5 +42 +–", out, re.M)
    assert re.search(r"^ *stages\.base\.lr\.peak +0\.1 +0\.2", out, re.M)
    assert out.splitlines()[-1] == f"curves: {page}"
    (data,) = re.findall(r'<script type="application/json" data-name="comparison">(.*?)</script>', page.read_text())
    shown = json.loads(data)
    assert [run["curves"]["values"]["loss"]["mean"] for run in shown["runs"]] == list(LOSSES.values())
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page.read_text()), "it loads nothing"


def test_what_is_no_run_is_refused(runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(runs[0]), str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} is not a run folder")
    assert main(["compare", str(runs[0]), "--out", str(tmp_path / "no" / "x.html")]) == 2
    assert "--out" in capsys.readouterr().err
