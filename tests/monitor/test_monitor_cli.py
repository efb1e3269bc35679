"""`steptron monitor report RUN_DIR`."""

from steptron.cli.main import main


def test_report_says_where_the_page_is(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "stage": "base", "tokens": 8, "loss": 2.5}\n')
    assert main(["monitor", "report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}/report.html\n"
    assert (tmp_path / "report.html").exists()


def test_a_folder_that_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["monitor", "report", str(tmp_path / "none")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert "is no run folder" in err
