"""`steptron monitor`: the report's path, rows of a query, and what is handed on."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest
from steptron.cli.main import main
from steptron.monitor.statistics.registry import Registry
from steptron.monitor.storage.store import Store


@pytest.fixture
def run_dir(tmp_path):
    registry = Registry()
    registry.add("loss", unit="nats", reduction="sum", axes={}, vital=True)
    registry.add("norm", unit="1", reduction="sum", axes={"parameter": ["a", "b,c"]})
    written = Store(tmp_path / "metrics", "rank-00000", registry, 10)
    for step in (1, 2):
        written.add(step, np.array([step / 4, step, np.nan], np.float32))
    written.close()
    return tmp_path


def test_report_says_where_the_page_is(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "base", "tokens": 8, "loss": 2.5}\n')
    assert main(["monitor", "report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    assert (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("view", "says"),
    [(["report"], "is not a run folder"), (["query"], "has no metrics")],
    ids=["report", "query"],
)
def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys, view, says):
    arguments = ["SELECT 1"] if view == ["query"] else []
    assert main(["monitor", *view, str(tmp_path / "none"), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err


SQL = "SELECT step, parameter, norm FROM parameter ORDER BY ALL"


def test_query_prints_a_table(run_dir, capsys):
    assert main(["monitor", "query", str(run_dir), "SELECT step, loss FROM run ORDER BY step"]) == 0
    out = capsys.readouterr().out
    assert [word for word in out.split() if word[0].isdigit()] == ["1", "0.25", "2", "0.5"]
    assert main(["monitor", "query", str(run_dir / "metrics"), "SHOW TABLES"]) == 0
    assert "parameter" in capsys.readouterr().out


def test_query_prints_csv_and_json(run_dir, capsys):
    assert main(["monitor", "query", str(run_dir), SQL, "--csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["step,parameter,norm", "1,a,1.0"]
    assert lines[2] == '1,"b,c",nan'
    assert main(["monitor", "query", str(run_dir), SQL, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert rows[2] == {"step": 2, "parameter": "a", "norm": 2.0}


def test_wrong_sql_is_one_line(run_dir, capsys):
    assert main(["monitor", "query", str(run_dir), "SELECT nothing FROM run"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: SQL: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("source", "options", "says"),
    [
        ("grpc://127.0.0.1:1", [], "--run is missing"),
        ("grpc://127.0.0.1:1", ["--run", "x"], "no metrics server answers"),
    ],
    ids=["which run", "nobody there"],
)
def test_a_server_that_cannot_be_asked_is_one_line(capsys, source, options, says):
    assert main(["monitor", "query", source, "SELECT 1", *options]) == 2
    err = capsys.readouterr().err
    assert says in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "module", "called"),
    [
        (["serve", "--run", "runs/x", "--port", "1234"], "dashboard.live", ("runs/x", "1234")),
        (["replay", "runs/x"], "detect.replay", ("runs/x",)),
    ],
    ids=["live page", "replay"],
)
def test_views_hand_on_to_their_modules(monkeypatch, arguments, module, called):
    seen = []
    function = {"dashboard.live": "serve", "detect.replay": "replay"}[module]
    fake = types.SimpleNamespace(**{function: lambda *given: seen.append(tuple(map(str, given))) or 7})
    monkeypatch.setitem(sys.modules, f"steptron.monitor.{module}", fake)
    assert main(["monitor", *arguments]) == 7
    assert seen == [called]


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from steptron.cli.main import main\n"
        "try: main(['monitor', 'serve', '--help'])\n"
        "except SystemExit: print(sorted({'torch', 'pyarrow', 'duckdb', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--token-file" in done.stdout
    assert done.stderr.strip() == "[]"
