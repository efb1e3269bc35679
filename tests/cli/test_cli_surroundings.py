"""Locales and encodings that cannot show every character, and wrong variables of the launcher."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from steptron.cli import main as cli

POOR = {
    "C without UTF-8 mode": {"LC_ALL": "C", "PYTHONUTF8": "0"},
    "ascii streams": {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    "C": {"LC_ALL": "C"},
    "Latin-1 that is not installed": {"LC_ALL": "en_US.ISO-8859-1"},
    "Latin-1 streams": {"PYTHONIOENCODING": "latin-1", "LC_ALL": "C", "PYTHONUTF8": "0"},
}
NAME = "łódź-日本"
"""A name that neither ASCII nor Latin-1 has."""


SEVERAL = """
import sys
from steptron.cli.main import main
from steptron.cli.surroundings import show_any_text

show_any_text()
for line in sys.argv[1:]:
    print(f"exit {main(line.split())}", file=sys.stderr)
"""
"""The script of an interpreter that runs several commands, each an argument."""


def steptron(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return interpreter("-m", "steptron", *words, cwd=cwd, **environment)


def interpreter(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG", "PYTHON"))}
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        cwd=cwd,
        env={**kept, "PYTHONPATH": str(Path(cli.__file__).parents[2]), "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.mark.parametrize("name", POOR)
def test_help_and_errors_are_shown_everywhere(name: str, tmp_path: Path) -> None:
    for words, code in (["--help"], 0), (["train", "--help"], 0), (["train", NAME], 2):
        done = steptron(*words, cwd=tmp_path, **POOR[name])
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
        assert done.stderr.count(b"\n") == (code == 2)
        assert done.stdout.startswith(b"usage: steptron") == (code == 0)


def test_build_train_inspect_and_check(tmp_path: Path) -> None:
    """Text, folders and run names may hold any character, where neither names of files nor streams are UTF-8; every
    file is."""
    poorest = POOR["C without UTF-8 mode"] | POOR["ascii streams"]
    (tmp_path / "text.jsonl").write_text(
        "".join(f'{{"text": "{NAME} – the {i} fox sees a slow dog under the {i % 7} house"}}\n' for i in range(200)),
        encoding="utf-8",
    )
    source, run = f"{NAME}/tokens/{NAME}", f"runs/{NAME}"
    (tmp_path / "mine.yaml").write_text(
        "# @package _global_\ndefaults: [/pretrain/demo, _self_]\n"
        f"run: {{name: {NAME}}}\n"
        f"data: {{tokenizer: '{NAME}/tokens/tokenizer.json', sources: {{{NAME}: {{path: '{source}'}}}}}}\n"
        f"stages: {{{NAME}: {{tokens: 64, seq_len: 16, batch_size: 2, mix: {{{NAME}: 1}}, lr: {{peak: 1}}}}}}\n"
        "model: {vocab_size: 512, hidden_size: 32, ffn_size: 32, moe: {ffn_size: 16, shared_ffn_size: 16}}\n",
        encoding="utf-8",
    )
    build = f"data build text.jsonl --out {NAME}/tokens --name {NAME} --vocab-size 300 --workers 1"
    done = interpreter("-c", SEVERAL, build, "train mine.yaml", f"inspect {run}", "doctor", cwd=tmp_path, **poorest)
    assert b"Traceback" not in done.stderr, done.stderr
    assert re.findall(rb"^exit (\d)", done.stderr, re.M)[:3] == [b"0"] * 3, done.stderr
    assert done.stderr.count(b"exit ") == 4, "the doctor may find something missing here"
    assert (tmp_path / source / "source.json").is_file()
    assert b"warning: stages." in done.stderr
    texts = [
        path.read_text(encoding="utf-8")
        for path in (tmp_path / run).rglob("*")
        if path.suffix in (".yaml", ".json", ".jsonl")
    ]
    assert any(NAME in text for text in texts)
    assert b"tokens by stage and source" in done.stdout
    assert b"steptron doctor" in done.stdout


@pytest.mark.parametrize("variable", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"])
@pytest.mark.parametrize("value", ["x", "-1", "1.5", "0x1", "²"])
def test_a_launchers_variable_that_is_no_number_is_named(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(variable, value)
    assert cli.main(["train", "demo"]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"error: {variable}={value} in the environment must be a whole number;")


def test_empty_variables_are_as_if_unset(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(variable, "")
    assert cli.main(["train", "nothing"]) == 2
    assert capsys.readouterr().err.startswith("error: nothing: no file")
    assert not {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & set(os.environ)
