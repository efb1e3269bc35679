"""Commands that messages tell people to type: a shell makes of them what is meant, and steptron takes them."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import steptron
import torch
from steptron.checkpoint.coordinator import ALONE
from steptron.checkpoint.find import way_back
from steptron.checkpoint.retention import Retention
from steptron.checkpoint.save import save
from steptron.checkpoint.staging import pieces_of
from steptron.cli.main import main, parse
from steptron.config.identity import at_start
from steptron.config.resolve import resolve, to_yaml
from steptron.doctor.recipe import recipe_fits
from steptron.errors import RecipeError, typed
from steptron.train.inspect import print_summary, summarise
from steptron.train.mirror_remote import refuse_mirror_of_another_run

from hints import commands

SMALL = str(Path(__file__).parents[1] / "config" / "small.yaml")
ODD = "it's a run; $HOME [bold] & more"
"""A name that a shell takes apart where it is not quoted, and rich for markup."""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """The folder of a run that has not got as far as a checkpoint."""
    folder = tmp_path / ODD
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(to_yaml(resolve(SMALL)))
    return folder


def save_step(folder: Path, step: int) -> None:
    """Write a checkpoint with one tensor."""
    pieces, counters = pieces_of({"w": torch.ones(2)}), {"stage": "base", "stage_tokens": 5, "tokens": 5}
    save(
        folder,
        step=step,
        pieces=pieces,
        counters=counters,
        recipe_hash="",
        layout={},
        keep=Retention(newest=9),
        coordinator=ALONE,
    )


def test_words_are_as_a_shell_takes_them() -> None:
    assert typed("resume", "runs/demo", "--step", 64) == "`steptron resume runs/demo --step 64`"
    assert commands(typed("resume", Path("a b"), ODD)) == [["steptron", "resume", "a b", ODD]]


def placeholders_in_commands(path: Path) -> list[str]:
    """Texts of a source file with a command in backticks that has something put in unquoted."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.JoinedStr):
            continue
        text = ""
        for part in node.values:
            quoted = isinstance(part, ast.FormattedValue) and ast.unparse(part.value).startswith("shlex.quote(")
            text += str(part.value) if isinstance(part, ast.Constant) else "quoted" if quoted else "\0"
        inside = text.split("`")[1::2]
        if any("\0" in command and " " in command.replace("\0", "").strip() for command in inside):
            found.append(f"{path.name}:{node.lineno}: {text}")
    return found


def test_no_message_puts_anything_into_a_command_unquoted() -> None:
    sources = list(Path(steptron.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    assert [text for path in sources for text in placeholders_in_commands(path)] == []


def test_what_an_unquoted_placeholder_looks_like(tmp_path: Path) -> None:
    path = tmp_path / "bad.py"
    path.write_text("f'x `steptron resume {a}` {b}'\nf'`steptron resume {shlex.quote(a)}` {b}'\nf'`{a}`'\n")
    assert len(placeholders_in_commands(path)) == 1


@pytest.mark.parametrize("inside", ["checkpoints/step-64", "checkpoints/step-00000064", "checkpoints", "metrics.jsonl"])
def test_a_part_of_a_run_leads_to_the_command_for_the_run(run_dir: Path, inside: str, capsys) -> None:
    step = ["--step", "64"] if "64" in inside else []
    for argv, way_out in (
        (["resume"], ["resume", str(run_dir), *step, "seed=3"]),
        (["monitor", "report"], ["monitor", "report", str(run_dir)]),
        (["monitor", "replay"], ["monitor", "replay", str(run_dir)]),
        (["monitor", "serve", "--run"], ["monitor", "serve", "--run", str(run_dir)]),
    ):
        assert main([*argv, str(run_dir / inside), *(["seed=3"] if argv == ["resume"] else [])]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert commands(err)[-1] == ["steptron", *way_out]
        parse(commands(err)[-1][1:])


def test_a_folder_that_is_in_no_run_is_not_called_a_part_of_one(tmp_path: Path, capsys) -> None:
    (tmp_path / "recipe.yaml").write_text("a recipe of one's own beside the runs")
    assert main(["resume", str(tmp_path / "runs" / "none")]) == 2
    assert "part of the run" not in capsys.readouterr().err


def test_every_hint_names_the_folder_as_one_word(run_dir: Path, capsys) -> None:
    recipe = resolve(SMALL)
    recipe = replace(recipe, run=replace(recipe.run, dir=str(run_dir)))
    save_step(run_dir / "checkpoints", 8)
    copies = run_dir.parent / "mirror" / recipe.run.name
    save_step(copies, 8)
    new = at_start(None, run_dir)
    with pytest.raises(RecipeError) as refused:
        refuse_mirror_of_another_run(str(copies.parent), recipe.run.name, run_dir, new, new=True)
    run_folder = next(finding for finding in recipe_fits(recipe, run_dir) if finding.name == "run.dir")
    print_summary(summarise(run_dir))
    for text in (way_back(run_dir), str(refused.value), run_folder.fix, capsys.readouterr().out):
        assert str(run_dir) in commands(text)[0], text
        parse(commands(text)[0][1:])


def test_the_way_back_names_checkpoints_that_are_there(run_dir: Path) -> None:
    assert way_back(run_dir).endswith("begins at its first step")
    checkpoints = run_dir / "checkpoints"
    for step in (4, 8, 12, 16):
        save_step(checkpoints, step)
    next((checkpoints / "step-00000016").glob("*.distcp")).unlink()
    assert "continues from step-00000012" in way_back(run_dir)
    assert way_back(run_dir).endswith("with --step 8 or --step 4")
